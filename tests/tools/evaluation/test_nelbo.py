import fcntl
import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from independent import Row, Source, stock
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data_prep.shards import Manifest, ShardedRows
from pretrain.model.modeling_diffullama import IGNORE
from pretrain.step import read_rows
from tools.compare import main as compare
from tools.evaluation import nelbo_folder
from tools.evaluation.corpus_nelbo import Noise, Place, RowScore, diffusion_scores, exact_scores, summary
from tools.nelbo import main

MASK = 384  # of tiny_checkpoint


class Known:
    """A model that gives each masked token the loss `loss(token, how many of its row are masked)`."""

    config = SimpleNamespace(mask_token_id=MASK)
    device = torch.device("cpu")

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, input_ids, labels):
        masked = (labels != IGNORE).sum(1, keepdim=True).expand_as(labels)
        assert ((input_ids == MASK) == (labels != IGNORE)).all()
        return SimpleNamespace(nll=self.loss(labels, masked)[labels != IGNORE])


def perfect(law: torch.Tensor) -> Known:
    """Predicts independent tokens of this law."""
    return Known(lambda labels, _: -law.log()[labels.clamp(min=0)])


def rows_of(source: Source, isolated: bool = False):
    rows = read_rows(source.places, source.numbers, isolated)
    return rows, [Place("s", n, i, len(source.rows)) for i, n in enumerate(source.numbers)]


def measure(checkpoint, corpus, output: Path, *flags: str) -> dict:
    assert main([str(checkpoint), str(corpus), "--output", str(output), *flags]) == 0
    return json.loads((output / "results.json").read_text())


def one_error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("likelihood", ["nelbo", "mask_count"])
def test_a_known_distribution_has_its_entropy(likelihood):
    """Independent tokens of a known law, predicted perfectly: in nats, bits and as a perplexity, and in each bucket."""
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    entropy = -(law * law.log()).sum().item()
    rng = np.random.default_rng(1)
    rows, places = rows_of(Source([Row(n, rng.choice(4, 32, p=law.numpy()), [32]) for n in range(600)]))
    scores = diffusion_scores(perfect(law), rows, places, Noise(likelihood, 2, 0), 64)
    found = summary(scores, 600 * 31 * 4.0, exact=False)
    assert found["tokens"] == 600 * 31 and found["n"] == 600 and found["stderr"] == found["nelbo_stderr"] < 0.05
    for name in ("nelbo", "ce_to_t0.25", "ce_to_t0.5", "ce_to_t0.75", "ce_to_t1"):
        assert abs(found[name] - entropy) < 3 * found[f"{name}_stderr"], name
    assert found["perplexity_bound"] == pytest.approx(math.exp(found["nelbo"]))
    assert found["bits_per_token"] == pytest.approx(found["nelbo"] / math.log(2))
    assert found["bits_per_byte"] == pytest.approx(found["bits_per_token"] / 4)


@pytest.mark.parametrize("likelihood", ["nelbo", "mask_count"])
def test_both_ways_average_over_all_times(likelihood):
    """Where the loss depends on how many tokens are masked, Eq. 7 weighs each number from 1 to M alike."""
    length = 9
    rows, places = rows_of(Source([Row(n, np.full(length, 7), [length]) for n in range(40)]))
    model = Known(lambda _, masked: masked.double() ** 2)
    found = [
        summary(diffusion_scores(model, rows, places, Noise(likelihood, 100, seed), 500), None, False)["nelbo"]
        for seed in range(3)
    ]
    expected = np.mean(np.arange(1, length) ** 2)
    assert np.mean(found) == pytest.approx(expected, rel=0.03 if likelihood == "nelbo" else 0.005)


def test_counting_masks_is_less_noisy_than_drawing_times(tiny_checkpoint, corpus_dir, tmp_path):
    found = {}
    for likelihood in ("nelbo", "mask_count"):
        results = measure(tiny_checkpoint, corpus_dir, tmp_path / likelihood, "--likelihood", likelihood)
        found[likelihood] = results["tasks"]["nelbo/all"]
    a, b = found["nelbo"], found["mask_count"]
    assert b["stderr"] < a["stderr"] / 3
    assert abs(a["nelbo"] - b["nelbo"]) < 3 * math.hypot(a["stderr"], b["stderr"])


def test_standard_errors_are_those_of_repeated_samples():
    """Of many samples of rows, the estimates spread as each of them says."""
    law = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    model = perfect(law)
    rng = np.random.default_rng(0)
    found = []
    for seed in range(60):
        rows, places = rows_of(Source([Row(n, rng.choice(3, 16, p=law.numpy()), [16]) for n in range(40)]))
        found.append(summary(diffusion_scores(model, rows, places, Noise("nelbo", 1, seed), 64), None, False))
    spread = np.std([one["nelbo"] for one in found], ddof=1)
    said = np.sqrt(np.mean([one["stderr"] ** 2 for one in found]))
    assert 0.65 < spread / said < 1.3


def test_draws_and_rows_divide_all_times_evenly():
    noise = Noise("nelbo", 3, 5, eps=0.0)
    maskable = np.ones(4, dtype=bool)
    times = np.array([[noise.draw(Place("s", 10 * i, i, 8), k, maskable)[0] for k in range(3)] for i in range(8)])
    for k in range(3):
        assert sorted(((times[:, k] - k / 3) % 1 * 8).astype(int)) == list(range(8))
    apart = (times - times[:, :1] - np.arange(3) / 3 + 0.5) % 1 - 0.5
    assert abs(apart).max() < 1 / 8
    assert (np.argsort(times[:, 0]) != np.arange(8)).any()  # a row's stratum is not its place in the corpus


def drawn(seed: int, source: str, row: int, draw: int) -> np.random.Generator:
    """The documented stream of a draw."""
    key = hashlib.sha256(f"{seed}\n{source}\n{row}\n{draw}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def test_equals_an_independent_computation(tiny_checkpoint, corpus_dir, tmp_path):
    """From transformers' own model under a full mask, with the definition's noise; t is read off the stratum."""
    results = measure(
        tiny_checkpoint, corpus_dir, tmp_path / "out", "--likelihood", "nelbo",
        "--rows", "5", "--draws", "2", "--batch_size", "3", "--seed", "9",
    )  # fmt: skip
    model = stock(tiny_checkpoint)
    total, tokens = 0.0, 0
    for source in Manifest.load(corpus_dir).sources:
        stored = ShardedRows(corpus_dir, source.validation)
        count = min(5, len(stored))
        nelbo, taken = 0.0, set()
        lines = (tmp_path / "out/samples/nelbo" / f"{source.name}.jsonl").read_text().splitlines()
        for i, line in enumerate(map(json.loads, lines)):
            row = i * len(stored) // count
            assert line["doc_id"] == row
            ids = torch.from_numpy(stored.row(row)[0].astype(np.int64))
            strata = []
            for stratum in range(count):  # which one is the row's is random: the one that gives the row's sum
                estimate = 0.0
                for draw in range(2):
                    generator = drawn(9, source.name, row, draw)
                    u = ((stratum + generator.random()) / count + draw / 2) % 1
                    t = 1e-3 + (1 - 1e-3) * u
                    masked = torch.from_numpy(generator.random(32) < t)
                    masked[0] = False
                    logits = model(
                        torch.where(masked, MASK, ids)[None], attention_mask=torch.zeros(1, 1, 32, 32)
                    ).logits  # fmt: skip
                    nll = F.cross_entropy(logits[0, :-1], ids[1:], reduction="none")
                    estimate += nll[masked[1:]].sum().item() / t / 2
                strata.append(estimate)
            [found] = [k for k in range(count) if strata[k] / 31 == pytest.approx(line["metrics"]["nelbo"], rel=1e-4)]
            taken.add(found)
            nelbo += strata[found]
        assert taken == set(range(count))
        task = results["tasks"][f"nelbo/{source.name}"]
        assert task["nelbo"] == pytest.approx(nelbo / (31 * count), rel=1e-4) and task["tokens"] == 31 * count
        total, tokens = total + nelbo, tokens + 31 * count
    assert results["tasks"]["nelbo/all"]["nelbo"] == pytest.approx(total / tokens, rel=1e-4)


def test_an_autoregressive_model_has_the_loss_of_transformers(base_dir, corpus_dir, tmp_path):
    folder = base_dir("gpt2")
    results = measure(folder, corpus_dir, tmp_path / "out", "--batch_size", "5")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert results["kind"] == "autoregressive" and results["likelihood"] == {"name": "exact"}
    for source in Manifest.load(corpus_dir).sources:
        stored = ShardedRows(corpus_dir, source.validation)
        rows = [stored.row(r) for r in range(len(stored))]
        ids = torch.stack([torch.from_numpy(ids.astype(np.int64)) for ids, _ in rows])
        labels = ids.clone()
        for label, (_, lengths) in zip(labels, rows):
            label[int(lengths.sum()) :] = -100  # the padding of a unit's last row
        with torch.no_grad():
            expected = model(ids, labels=labels).loss.item()
        found = results["tasks"][f"nelbo/{source.name}"]
        assert found["nelbo"] == pytest.approx(expected, rel=1e-5) and found["exact"] is True
        assert found["tokens"] == (labels[:, 1:] != -100).sum() and "ce_to_t1" not in found
        assert found["bits_per_byte"] == pytest.approx(found["bits_per_token"] * source.tokens / source.bytes)


def test_isolated_documents_and_padding_are_read_alone(base_dir, tiny_checkpoint):
    """Exactly: each document by itself. By diffusion: what stands in other documents changes nothing."""
    from tools.decoding import load

    rng = np.random.default_rng(0)
    ids = rng.integers(2, 380, 20)
    rows, places = rows_of(Source([Row(0, ids, [7, 1, 9])]), isolated=True)  # and three places of padding
    model = AutoModelForCausalLM.from_pretrained(base_dir("llama")).eval()
    [score] = exact_scores(model, rows, 2)
    with torch.no_grad():
        parts = [torch.from_numpy(ids[begin:end])[None] for begin, end in ((0, 7), (8, 17))]
        expected = sum(model(part, labels=part).loss.item() * (part.shape[1] - 1) for part in parts)
    assert score.tokens == 14 and score.nll == pytest.approx(expected, rel=1e-5)

    diffusion, _ = load(str(tiny_checkpoint), device="cpu")
    noise = Noise("nelbo", 6, 0)
    [score] = diffusion_scores(diffusion, rows, places, noise, 4)
    assert score.tokens == 14 and sum(score.bucket_masked) > 0
    changed = ids.copy()
    changed[7] = (changed[7] + 5) % 380  # a document of one token, which is never masked
    other, _ = rows_of(Source([Row(0, changed, [7, 1, 9])]), isolated=True)
    assert diffusion_scores(diffusion, other, places, noise, 4)[0].nll == pytest.approx(score.nll, rel=1e-5)
    joined, joined_places = rows_of(Source([Row(0, changed, [7, 1, 9])]))
    assert diffusion_scores(diffusion, joined, joined_places, noise, 4)[0].tokens == 16


def test_the_batch_size_changes_nothing(tiny_checkpoint, corpus_dir, tmp_path):
    found = [
        measure(tiny_checkpoint, corpus_dir, tmp_path / size, "--rows", "7", "--draws", "3", "--batch_size", size)
        for size in ("1", "4", "64")
    ]
    for other in found[1:]:
        assert other["tasks"].keys() == found[0]["tasks"].keys()
        for task, scores in found[0]["tasks"].items():
            for name, value in scores.items():
                expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
                assert other["tasks"][task][name] == expected, (task, name)


def test_an_interrupted_run_continues_to_the_same_table(tiny_checkpoint, corpus_dir, tmp_path, monkeypatch, capsys):
    """Stopped at the third batch, with a torn line: the finished rows are not measured again."""
    flags = ("--rows", "6", "--draws", "2", "--batch_size", "4")
    whole = measure(tiny_checkpoint, corpus_dir, tmp_path / "whole", *flags)
    calls = []

    def stop_at(number):
        def scores(*arguments):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return diffusion_scores(*arguments)

        return scores

    out = tmp_path / "stopped"
    command = [str(tiny_checkpoint), str(corpus_dir), "--output", str(out), *flags]
    monkeypatch.setattr(nelbo_folder, "diffusion_scores", stop_at(3))
    assert main(command) == 130 and "continues from there" in capsys.readouterr().err
    with open(out / "samples/nelbo/short.jsonl", "a") as file:
        file.write('{"doc_id": 4, "do')
    assert not (out / "results.json").exists()
    for flag, value, name in (
        ("--seed", "1", "seed"), ("--rows", "5", "settings.rows"), ("--draws", "3", "likelihood.draws"),
        ("--split", "train", "settings.split"),
    ):  # fmt: skip
        assert main([*command, flag, value]) == 2 and f"was begun with {name} " in one_error(capsys)
    calls.clear()
    monkeypatch.setattr(nelbo_folder, "diffusion_scores", stop_at(1000))
    assert measure(tiny_checkpoint, corpus_dir, out, *flags) == whole
    rows = sum(min(6, sum(shard.rows for shard in s.validation)) for s in Manifest.load(corpus_dir).sources)
    assert len(calls) == rows // 2 - 2
    for name in ("samples/nelbo/all.jsonl", "samples/nelbo/short.jsonl", "results.md", "nelbo.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    calls.clear()
    assert measure(tiny_checkpoint, corpus_dir, out, *flags) == whole and not calls


def test_a_bound_and_an_exact_loss_are_compared_row_by_row(tiny_checkpoint, base_dir, corpus_dir, tmp_path, capsys):
    ours = measure(tiny_checkpoint, corpus_dir, tmp_path / "ours")
    exact = measure(base_dir("llama"), corpus_dir, tmp_path / "base")
    arguments = [str(tmp_path / "base"), str(tmp_path / "ours"), "--output", str(tmp_path / "compared")]
    assert compare([*arguments, "--resamples", "200"]) == 0
    text = (tmp_path / "compared/compare.md").read_text()
    for task in ("nelbo/short", "nelbo/long", "nelbo/all"):
        difference = ours["tasks"][task]["nelbo"] - exact["tasks"][task]["nelbo"]
        assert f"| {task.replace('_', chr(92) + '_')} | nelbo | ours | base | {difference:+.4f} |" in text
    assert "exact for base, an upper bound for ours" in text and "lower is better" in text
    assert (tmp_path / "ours/results.md").read_text().count("| short |") == 1
    assert "perplexity ≤" in (tmp_path / "ours/results.md").read_text()


def test_bad_commands_are_one_line_errors(tiny_checkpoint, corpus_dir, tmp_path, capsys):
    def error(*flags: str, checkpoint=tiny_checkpoint, corpus=corpus_dir, output=tmp_path / "out") -> str:
        assert main([str(checkpoint), str(corpus), "--output", str(output), *flags]) == 2
        assert not (output / "results.json").exists()
        return one_error(capsys)

    for name in ("rows", "draws", "batch_size"):
        assert f"--{name} is 0, expected at least 1" in error(f"--{name}", "0")
    assert "--seed is -1" in error("--seed", "-1")
    assert "leave --trust_remote_code out" in error("--trust_remote_code", "--isolate_documents")
    assert "manifest.json not found" in error(corpus=tmp_path / "nowhere")
    assert "cannot be loaded" in error(checkpoint=tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    assert "holds other things" in error(output=tmp_path / "mine")
    (tmp_path / "file").write_text("")
    assert "is a file" in error(output=tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_a_corpus_that_does_not_fit_the_model_is_refused(tiny_checkpoint, base_dir, corpus_dir, tmp_path, capsys):
    def error(corpus: Path, checkpoint=tiny_checkpoint, *flags: str) -> str:
        assert main([str(checkpoint), str(corpus), "--output", str(tmp_path / "out"), *flags]) == 2
        assert not (tmp_path / "out" / "results.json").exists()
        return one_error(capsys)

    def changed(name: str, change) -> Path:
        shutil.copytree(corpus_dir, tmp_path / name)
        path = tmp_path / name / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return tmp_path / name

    def longer(content):
        content["seq_len"] = 4096

    def without_validation(content):
        for source in content["sources"]:
            source["tokens"] -= sum(shard["tokens"] for shard in source["validation"])
            source["validation"] = []

    assert "ids up to 499" in error(changed("ids", lambda c: c["tokenizer"].update(vocab_size=500)))
    assert "another tokenizer" in error(changed("tokenizer", lambda c: c["tokenizer"].update(fingerprint="f" * 64)))
    assert "rows of 4096 tokens" in error(changed("long", longer))
    assert "no validation rows" in error(changed("none", without_validation))
    assert "the name of the sum" in error(changed("all", lambda c: c["sources"][0].update(name="all")))
    small = tmp_path / "small"
    shutil.copytree(base_dir("llama"), small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"mask_token_id": 9999}))
    assert "mask_token_id is 9999" in error(corpus_dir, small)
    file = corpus_dir / Manifest.load(corpus_dir).sources[0].validation[0].file
    cut = changed("cut", lambda c: None)
    (cut / file.relative_to(corpus_dir)).write_bytes(file.read_bytes()[:-100])
    assert "truncated or replaced" in error(cut)


def test_two_processes_do_not_write_one_folder(tiny_checkpoint, corpus_dir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([str(tiny_checkpoint), str(corpus_dir), "--output", str(tmp_path / "out")]) == 2
    assert "another process writes" in one_error(capsys)


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    folder = nelbo_folder.Folder(tmp_path / "out")
    about = {"model": "m", "settings": {"rows": 3}, "weights": "a"}
    with folder.opened(about):
        pass
    folder.check_own({"model": "m", "settings": {"rows": 3}})  # what is known before the model is loaded
    with pytest.raises(UserError, match="was begun with weights 'a', this command has 'b'"):
        folder.check_own(about | {"weights": "b"})


def test_a_loss_that_is_no_number_stops_the_command(tiny_checkpoint, corpus_dir, tmp_path, monkeypatch, capsys):
    def broken(model, rows, places, *_):
        return [RowScore(31, math.nan, [], []) for _ in places]

    monkeypatch.setattr(nelbo_folder, "diffusion_scores", broken)
    assert main([str(tiny_checkpoint), str(corpus_dir), "--output", str(tmp_path / "out")]) == 2
    assert "the loss of row 0 of short is nan" in one_error(capsys)


def test_without_the_shift_first_tokens_count():
    rows, places = rows_of(Source([Row(n, np.full(8, 1), [6]) for n in range(3)]))
    model = perfect(torch.tensor([0.5, 0.5]))
    model.config = SimpleNamespace(mask_token_id=MASK, diffusion={"shift": False})
    assert [score.tokens for score in diffusion_scores(model, rows, places, Noise("nelbo", 1, 0), 2)] == [6] * 3


def test_the_code_in_the_checkpoint_gives_the_same(tiny_checkpoint, corpus_dir, tmp_path):
    flags = ("--rows", "3", "--draws", "2")
    found = [
        measure(tiny_checkpoint, corpus_dir, tmp_path / str(len(more)), *flags, *more)["tasks"]["nelbo/all"]["nelbo"]
        for more in ((), ("--trust_remote_code",))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_isolated_documents_begin_at_position_0():
    given = {}

    def model(**arguments):
        given.update(arguments)
        return SimpleNamespace(nll=torch.ones(int((arguments["labels"] != IGNORE).sum())))

    rows, places = rows_of(Source([Row(0, np.full(8, 3), [3, 5])]), isolated=True)
    model.config, model.device = Known.config, Known.device
    diffusion_scores(model, rows, places, Noise("mask_count", 1, 0), 1)
    assert given["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert given["visibility"].documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]


def test_a_batch_of_which_not_all_rows_were_written_is_measured_again(tmp_path):
    """So that later batches hold the same rows as without the stop."""
    path = tmp_path / "s.jsonl"
    places = [Place("s", n, n, 6) for n in range(6)]
    lines = [nelbo_folder.line_of(p, np.arange(4), RowScore(3, 1.5, [], [])) for p in places[:3]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"doc_')
    assert nelbo_folder.finished_lines(path, places, 2) == lines[:2]
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:2])
