"""`python -m tools.figures quality`: perplexity, distinct-2, the texts, and what a folder keeps."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from tools.decoding import Request
from tools.figures import main
from tools.paper_figures.autoregressive import Draws, continue_all, load_autoregressive
from tools.paper_figures.grid import labels
from tools.paper_figures.perplexity import Judge, distinct_2, perplexity

TEXTS = ["The Fox saw a goose and went to the river.", "Once upon a time", "A king."]


@pytest.fixture(scope="module")
def judge_dir(base_dir) -> Path:
    return base_dir("gpt2")


@pytest.fixture(scope="module")
def judge(judge_dir) -> Judge:
    return Judge(*load_autoregressive(str(judge_dir), "--judge", "cpu"), name="judge", batch_size=2)


def command(checkpoint, judge_dir, folder, *more: str) -> list[str]:
    settings = ["--steps", "2", "4", "--length", "6", "--texts", "3", "--batch_size", "2"]
    return ["quality", str(checkpoint), "--judge", str(judge_dir), *settings, "--output", str(folder), *more]


def points_of(folder: Path) -> list[dict]:
    return json.loads((folder / "quality.json").read_text())["points"]


def test_nats_are_transformers_own_loss(judge):
    """In a batch with padding, each text alone with the start token in front, and with a context that is not scored."""
    found = judge.judge([("", text) for text in TEXTS])
    for text, got in zip(TEXTS, found):
        ids = torch.tensor([[1, *judge.tokenizer(text)["input_ids"]]])
        loss = judge.model(input_ids=ids, labels=ids).loss
        assert got.tokens == ids[0, 1:].tolist()
        assert got.nats == pytest.approx(loss.item() * len(got.tokens), rel=1e-5)
    (after,) = judge.judge([("The Fox saw", TEXTS[0])])
    ids = torch.tensor([[1, *judge.tokenizer(TEXTS[0])["input_ids"]]])
    given = 1 + len(judge.tokenizer("The Fox saw")["input_ids"])
    targets = ids.clone()
    targets[:, :given] = -100
    loss = judge.model(input_ids=ids, labels=targets).loss.item()
    assert after.nats == pytest.approx(loss * (ids.shape[1] - given), rel=1e-5)
    assert after.tokens == ids[0, given:].tolist()


def test_a_token_across_the_end_of_the_context_counts_as_written(judge):
    whole = judge.tokenizer("The Fox")["input_ids"]
    cut = judge.tokenizer("The F")["input_ids"]
    given = next((i for i, (a, b) in enumerate(zip(whole, cut)) if a != b), len(cut))
    assert judge.judge([("The F", "The Fox")])[0].tokens == whole[given:]


def test_a_uniform_judge_gives_the_size_of_the_vocabulary(tokenizer):
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = Judge(model, tokenizer, "uniform").judge([("", text) for text in TEXTS])
    value, error = perplexity([j.nats for j in found], [len(j.tokens) for j in found])
    assert value == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert error == pytest.approx(0, abs=1e-2)


def test_the_standard_error_is_that_of_simulated_texts():
    """Of texts of different lengths: the spread of the perplexity over many draws is the error of each, on average."""
    draws = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(1000):
        tokens = torch.randint(5, 30, (40,), generator=draws)
        nats = tokens * (1 + 0.3 * torch.randn(40, generator=draws))
        value, error = perplexity(nats.tolist(), tokens.tolist())
        assert value is not None and error is not None
        values.append(value)
        errors.append(error)
    assert torch.tensor(values).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.1)
    assert perplexity([2.0], [2]) == (pytest.approx(math.e), None) and perplexity([0.0], [0]) == (None, None)


def test_distinct_2_by_hand():
    assert distinct_2([[1, 2, 3], [1, 2]]) == 2 / 3  # 12 23 | 12; no pair 31 between the texts
    assert distinct_2([[5, 5, 5, 5]]) == 1 / 3
    assert distinct_2([[1], []]) is None


def test_an_empty_text_has_no_tokens(judge):
    found = judge.judge([("", ""), ("The", "The"), ("", "A king.")])
    assert [len(j.tokens) > 0 for j in found] == [False, False, True] and found[0].nats == found[1].nats == 0


def test_too_long_a_text_for_the_judge_is_told(judge):
    with pytest.raises(UserError, match="tokens of the judge judge, which takes 256"):
        judge.judge([("", "The Fox saw a goose. " * 60)])


def test_autoregressive_texts_depend_on_their_own_numbers_alone(judge):
    model, tokenizer = judge.model, judge.tokenizer
    asked = [Request("[MASK:9]", [], n) for n in range(3)] + [Request("The Fox[MASK:9]", [])]

    def texts(batch_size: int, temperature: float) -> list[str]:
        batches = continue_all(model, tokenizer, asked, 7, batch_size, temperature, 9)
        return [c.text for batch in batches for c in batch]

    assert texts(4, 1.0) == texts(1, 1.0) and len(set(texts(4, 1.0))) == 4
    greedy = texts(2, 0.0)
    assert greedy[0] == greedy[1] == greedy[2]
    ids = torch.tensor([tokenizer("The Fox")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9,
                              min_new_tokens=9, pad_token_id=0)  # fmt: skip
    assert greedy[3] == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_draws_are_of_the_models_distribution():
    scores = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    draws = Draws([torch.Generator().manual_seed(0)], temperature=2.0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[int(draws(torch.empty(1, 0), scores).argmax())] += 1
    assert torch.allclose(counts / 4000, (scores[0] / 2).softmax(0), atol=0.03)


@pytest.mark.slow
def test_a_folder_is_complete_and_continued(tiny_checkpoint, judge_dir, tmp_path, capsys, monkeypatch):
    """All points at once are those of a folder that grew, and points that are there are not written again."""
    at_once, grown = tmp_path / "at_once", tmp_path / "grown"
    rules = ("--rules", "random", "threshold=0.9,block_length=3", "--also", str(judge_dir))
    assert main(command(tiny_checkpoint, judge_dir, at_once, *rules)) == 0
    assert main(command(tiny_checkpoint, judge_dir, grown, "--steps", "2")) == 0
    before = (grown / "quality.json").read_text()
    assert main(command(tiny_checkpoint, judge_dir, grown, *rules, "--batch_size", "3")) == 0
    assert before.splitlines()[1:40] == (grown / "quality.json").read_text().splitlines()[1:40]
    expected = {json.dumps(p["point"]): p for p in points_of(at_once)}
    found = {json.dumps(p["point"]): p for p in points_of(grown)}
    assert found.keys() == expected.keys() and len(found) == 5
    for key, point in found.items():
        assert [t["text"] for t in point["texts"]] == [t["text"] for t in expected[key]["texts"]]
        assert point["perplexity"] == pytest.approx(expected[key]["perplexity"], rel=1e-4)
        assert point["distinct_2"] == expected[key]["distinct_2"] and point["nfe"] == expected[key]["nfe"]
        assert len({t["text"] for t in point["texts"]}) == 3
        total = sum(t["nats"] for t in point["texts"]) / sum(t["judged_tokens"] for t in point["texts"])
        assert point["perplexity"] == pytest.approx(math.exp(total))
    capsys.readouterr()
    monkeypatch.setattr("tools.paper_figures.quality.load", None)  # nothing is loaded where nothing is missing
    monkeypatch.setattr("tools.paper_figures.quality.load_autoregressive", None)
    assert main(command(tiny_checkpoint, judge_dir, grown, *rules)) == 0
    assert "0 points measured, 5 were there" in capsys.readouterr().out
    table = (grown / "quality.md").read_text()
    assert "repetition, not quality: read both" in table and table.count("| autoregressive |") == 1
    assert (grown / "quality.png").stat().st_size > 10_000
    for more, message in ((["--seed", "1"], "points of seed 0"), (["--length", "7"], "points of length 6")):
        assert main(command(tiny_checkpoint, judge_dir, grown, *more)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_are_continued_and_not_scored(tiny_checkpoint, judge_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The Fox saw\nOnce upon\n")
    more = ("--prompts", str(prompts), "--steps", "3", "--also", str(judge_dir))
    assert main(command(tiny_checkpoint, judge_dir, tmp_path / "out", *more)) == 0
    for point in points_of(tmp_path / "out"):
        contexts = [t["context"] for t in point["texts"]]
        assert contexts == ["The Fox saw", "Once upon", "The Fox saw"]
        assert all(t["text"].startswith(t["context"]) for t in point["texts"])
        assert point["texts"][0]["text"] != point["texts"][2]["text"]
        whole = AutoTokenizer.from_pretrained(judge_dir)(point["texts"][0]["text"])["input_ids"]
        assert 0 < point["texts"][0]["judged_tokens"] < len(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "4", "0"], "--steps has 0, expected at least 1"),
        (["--texts", "0"], "--texts has 0, expected at least 1"),
        (["--length", "300"], "takes 256 tokens, --length 300 and a start token are more"),
        (["--temperatures", "-1"], "--temperatures has -1.0, expected 0 or more"),
        (["--rules", "nonsense"], "--rules nonsense: expected random, "),
        (["--rules", "threshold=2"], "--rules threshold=2: threshold is 2.0, expected a probability"),
        (["--rules", "steps=3"], "--rules steps=3 names steps; give it by --steps"),
        (["--prompts", "no_such_file"], "--prompts no_such_file cannot be read"),
        (["--also", "no/such/model"], "no/such/model cannot be loaded"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(
    tiny_checkpoint, judge_dir, tmp_path, capsys, monkeypatch, more, message
):
    monkeypatch.setattr("tools.paper_figures.quality.load", None)
    monkeypatch.setattr("tools.paper_figures.quality.load_autoregressive", None)
    assert main(command(tiny_checkpoint, judge_dir, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_each_kind_of_model_in_its_place(tiny_checkpoint, judge_dir, tmp_path, capsys):
    assert main(command(tiny_checkpoint, tiny_checkpoint, tmp_path / "out")) == 2
    assert "is a diffusion model (mask_token_id 384); expected an autoregressive one" in capsys.readouterr().err
    assert main(command(judge_dir, judge_dir, tmp_path / "out")) == 2
    assert "is an autoregressive model (no mask_token_id" in capsys.readouterr().err
    assert main(command(tiny_checkpoint, judge_dir, tmp_path / "out", "--also", str(tiny_checkpoint))) == 2
    assert "--also" in capsys.readouterr().err


def test_other_files_in_the_way_are_told(tiny_checkpoint, judge_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(tiny_checkpoint, judge_dir, tmp_path / "file")) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    (tmp_path / "quality.json").write_text("{}")
    assert main(command(tiny_checkpoint, judge_dir, tmp_path)) == 2
    assert "is no file of this command" in capsys.readouterr().err
    prompts = tmp_path / "gap.txt"
    prompts.write_text("The [MASK:3] saw\n")
    assert main(command(tiny_checkpoint, judge_dir, tmp_path / "out", "--prompts", str(prompts))) == 2
    assert "expected texts to continue" in capsys.readouterr().err


def test_labels_are_short_and_differ():
    assert labels(["exports/a", "b/"]) == {"exports/a": "a", "b/": "b"}
    assert labels(["x/1/m", "x/2/m"]) == {"x/1/m": "1/m", "x/2/m": "2/m"}
    assert labels(["m", "x/m"]) == {"m": "m", "x/m": "x/m"}
