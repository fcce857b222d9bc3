"""Real runs, of seconds: they are made together, because starting takes longer than training."""

import json
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from helpers import (
    ROOT,
    START_SECONDS,
    assert_same_metrics,
    config,
    error_lines,
    kill,
    launch,
    run,
    run_all,
    start,
    wait_for,
    write_jsonl,
)

from data_prep.prepare import prepare
from data_prep.shards import Manifest
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.objectives import MaskedDiffusion
from pretrain.runtime.metrics import read_metrics
from pretrain.runtime.stop import STOPPED
from pretrain.step import Batch, read_step

pytestmark = pytest.mark.slow

AUTOREGRESSIVE = {"objective": "autoregressive"}
RANDOM = {"model.init": "random"}
UNSHIFTED = {"diffusion.shift": "false", "train.steps": 20}
SENTENCES = {"data.path": "sentences", "train.steps": 2, "annealing.form": "window"}  # as documents: several a row
BF16 = {"model.dtype": "bf16"}
SPLITS = [(1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3), (2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3), (2, 4, 3)]
RESUMED_STEPS = 3


class Run(NamedTuple):
    name: str
    ranks: int
    stage: int
    settings: dict = {}  # noqa: RUF012
    family: str = "llama"

    def arguments(self, tiny_run) -> tuple[list[str], Path]:
        return tiny_run(self.name, self.family, self.stage, **self.settings)


RESUMED = [
    Run("alone", 1, 1),
    Run("fp32", 2, 3),
    Run("bf16_1", 2, 1, BF16),
    Run("bf16_3", 2, 3, BF16),
    Run("resumed_autoregressive_0", 2, 0, AUTOREGRESSIVE),
    Run("resumed_autoregressive_3", 2, 3, AUTOREGRESSIVE),
]
RUNS = [
    *(Run(f"split{r}{micro}{stage}", r, stage, {"train.micro_batch_size": micro}) for r, micro, stage in SPLITS),
    *(Run(f"autoregressive{ranks}{stage}", ranks, stage, AUTOREGRESSIVE) for ranks in (1, 2) for stage in (0, 3)),
    Run("random10", 1, 0, RANDOM, "llama_tied"),
    Run("random23", 2, 3, RANDOM, "llama_tied"),
    Run("random_autoregressive10", 1, 0, RANDOM | AUTOREGRESSIVE, "gpt2"),
    Run("random_autoregressive23", 2, 3, RANDOM | AUTOREGRESSIVE, "gpt2"),
    Run("other_seed", 1, 0, RANDOM | {"train.seed": 1}, "llama_tied"),
    Run("unshifted10", 1, 0, UNSHIFTED),
    Run("unshifted23", 2, 3, UNSHIFTED),
    Run("maskable", 1, 3, {"train.steps": 1, "diffusion.normalize_by": "maskable"}),
    *(
        Run(f"{loss}_{family}", 2, 3, {"train.steps": 3, "model.loss": loss}, family)
        for loss in ("plain", "chunked")
        for family in ("llama", "llama_tied")
    ),
    Run("isolated", 2, 3, SENTENCES | {"data.isolate_documents": True}, "gpt2"),
    Run("not_isolated", 2, 3, SENTENCES, "gpt2"),
    Run("keep", 1, 3, {"checkpoint.every": 1, "checkpoint.keep": 2, "train.steps": 4}),
    *(r._replace(settings=r.settings | {"train.steps": RESUMED_STEPS}) for r in RESUMED),  # never stopped
]


@pytest.fixture(scope="module")
def sentences_dir(tokenizer_dir, tales, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sentences")
    sentences = [sentence for tale in tales[:40] for sentence in tale.split(". ")]
    corpus = config(folder, tokenizer_dir, [write_jsonl(folder / "a.jsonl", sentences)], seq_len=32)
    prepare(corpus, progress=False)
    return corpus.output_dir


@pytest.fixture(scope="module")
def made(tiny_run, sentences_dir) -> dict[str, Path]:
    """The folders of RUNS."""
    folders = {}
    for ranks in (1, 2):
        chosen = [r for r in RUNS if r.ranks == ranks]
        for r in chosen:
            if "data.path" in r.settings:
                r.settings["data.path"] = sentences_dir
        runs = [r.arguments(tiny_run) for r in chosen]
        run_all(ranks, runs, launcher="torchrun")
        folders |= {r.name: folder for r, (_, folder) in zip(chosen, runs)}
    return folders


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_stages_ranks_and_accumulation_give_the_same_losses_and_gradients(made, split):
    """ZeRO 0 to 3, 1 rank × 4 passes, 2 × 2 and 2 × 1: one run, to 1e-5 over 5 steps."""
    reference = read_metrics(made["split120"])
    assert len(reference) == 6 and reference[-1]["loss"] != reference[1]["loss"]
    assert_same_metrics(read_metrics(made["split{}{}{}".format(*split)]), reference, rel=1e-5)


@pytest.mark.parametrize("split", ["13", "20", "23"])
def test_the_autoregressive_objective_does_not_depend_on_the_split_either(made, split):
    reference = read_metrics(made["autoregressive10"])
    assert reference[-1]["val_loss"] < reference[0]["val_loss"] and "masked_ce" not in reference[1]
    assert_same_metrics(read_metrics(made[f"autoregressive{split}"]), reference, rel=1e-5)


@pytest.mark.parametrize("kind", ["random", "random_autoregressive"])
def test_new_weights_are_the_same_on_any_ranks_and_stage(made, kind):
    assert_same_metrics(read_metrics(made[f"{kind}23"]), read_metrics(made[f"{kind}10"]), rel=1e-5)


def test_new_weights_are_new_and_the_seed_decides_them(made):
    random, other, base = (read_metrics(made[name])[0] for name in ("random10", "other_seed", "split120"))
    assert random["val_masked_ce"] == pytest.approx(random["uniform_ce"], rel=0.01)
    assert base["val_masked_ce"] > 1.02 * base["uniform_ce"]  # the test's base is far from a guess
    assert other["val_masked_ce"] != random["val_masked_ce"]


def test_without_the_shift_it_trains(made):
    metrics = read_metrics(made["unshifted23"])
    assert metrics[-1]["val_nelbo"] < metrics[0]["val_nelbo"] - 0.2
    assert "causal_masked_ce" not in metrics[0]  # no reading in which the base would know anything
    assert_same_metrics(metrics, read_metrics(made["unshifted10"]), rel=1e-5)
    assert json.loads((made["unshifted23"] / "model/config.json").read_text())["diffusion"]["shift"] is False


def batch_of(corpus: Path, step: int = 0) -> Batch:
    """The global batch of a step of `tiny_run`."""
    settings = RunConfig()
    settings.train.global_batch_size = 8
    settings.annealing.steps = 4
    (batch,) = read_step(
        TrainData(str(corpus), 42), MaskedDiffusion(settings, 384), step, range(8 * step, 8 * step + 8)
    )
    return batch


def test_the_first_loss_is_the_objective_computed_anew(made, base_dir, corpus_dir):
    """From the manifest and the noise alone: the base with a mean mask row, eager attention with the drawn mask."""
    from transformers import AutoModelForCausalLM

    from pretrain.model.forms import hashed_uniform

    model = AutoModelForCausalLM.from_pretrained(base_dir("llama"), attn_implementation="eager")
    weight = model.get_input_embeddings().weight.data
    model.resize_token_embeddings(385, mean_resizing=False)
    model.get_input_embeddings().weight.data[384] = weight.mean(0)
    head = model.get_output_embeddings().weight.data
    head[384] = head[:384].mean(0)

    i, j = torch.arange(32)[:, None], torch.arange(32)[None]
    visible = (j <= i) | (hashed_uniform((42, 0), i, j) < 0.25)
    bias = torch.zeros(1, 1, 32, 32).masked_fill(~visible, torch.finfo(torch.float32).min)
    data, noised = TrainData(str(corpus_dir), 42), batch_of(corpus_dir).tensors
    loss, masked_tokens = 0.0, 0
    for n in range(8):
        source, _, row = data.locate(n)
        x0 = torch.from_numpy(data.train[source].row(row)[0].astype("int64"))
        xt, t = noised["input_ids"][n], noised["t"][n].item()
        logits = model(xt[None], attention_mask=bias).logits[0]
        logits, loss_mask = logits[:-1], (xt == 384)[1:]  # no mask id in this corpus
        nll = torch.nn.functional.cross_entropy(logits, x0[1:], reduction="none")
        loss, masked_tokens = loss + (nll * loss_mask).sum().item() / t, masked_tokens + int(loss_mask.sum())
    assert read_metrics(made["split120"])[1]["loss"] == pytest.approx(loss / masked_tokens, rel=1e-6)


def test_normalising_by_maskable_tokens_gives_the_nelbo(made, corpus_dir):
    a, b = (read_metrics(made[name])[1] for name in ("maskable", "split123"))
    assert a["masked_ce"] == b["masked_ce"] and a["loss"] != b["loss"]
    counts = batch_of(corpus_dir).counts
    assert counts["maskable"] == 8 * 31
    assert a["loss"] * counts["maskable"] == pytest.approx(b["loss"] * counts["labelled"], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_under_zero3_the_loss_in_chunks_is_the_plain_one(made, family):
    """Values, gradient norms and the parameters that they lead to; tied and untied heads."""
    assert_same_metrics(*(read_metrics(made[f"{loss}_{family}"]) for loss in ("plain", "chunked")), rel=1e-5)


def test_documents_isolated_trains_and_differs(made):
    a, b = (read_metrics(made[name]) for name in ("isolated", "not_isolated"))
    assert abs(a[1]["masked_ce"] - b[1]["masked_ce"]) > 1e-3


def test_old_checkpoints_go_and_the_newest_stays(made):
    checkpoints = made["keep"] / "checkpoints"
    assert sorted(f.name for f in checkpoints.glob("step_*")) == ["step_00000003", "step_00000004"]
    assert (checkpoints / "latest").read_text() == "step_00000004"


def test_deepspeed_zero3_on_two_ranks(tiny_run):
    """The launcher, the stage and the command of the README; the loss falls, and the metrics are all there."""
    arguments, folder = tiny_run(
        "deepspeed", **{"train.steps": 30, "optimizer.warmup_steps": 5, "wandb.mode": "offline"}
    )
    run(2, arguments, launcher="deepspeed")
    metrics = read_metrics(folder)
    assert [m["step"] for m in metrics] == list(range(31))
    for key in ("loss", "masked_ce", "grad_norm", "lr", "anneal_ratio", "tokens", "tokens_per_second"):
        assert all(key in m for m in metrics[1:])
    assert metrics[-1]["tokens"] == 30 * 8 * 32
    assert metrics[-1]["val_nelbo"] < metrics[0]["val_nelbo"] - 0.3
    assert [m["anneal_ratio"] for m in metrics[1:6]] == [0.25, 0.5, 0.75, 1.0, 1.0]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["train"]["steps"] == 30 and resolved["optimizer"]["betas"] == [0.9, 0.95]
    assert list(folder.glob("wandb/offline-run-*"))


@pytest.fixture(scope="module")
def stopped_at_every_step(tiny_run) -> dict[str, Path]:
    """The folders of RESUMED, with a new launch for every step."""
    folders = {}
    for ranks in (1, 2):
        stops = {"train.steps": RESUMED_STEPS, "train.exit_interval": 1}
        chosen = [r._replace(name=f"broken {r.name}", settings=r.settings | stops) for r in RESUMED if r.ranks == ranks]
        runs = [r.arguments(tiny_run) for r in chosen]
        for step in range(1, RESUMED_STEPS + 1):
            run_all(ranks, runs)
            assert [read_metrics(folder)[-1]["step"] for _, folder in runs] == [step] * len(runs)
        folders |= {r.name: folder for r, (_, folder) in zip(chosen, runs)}
    return folders


@pytest.mark.parametrize("name", [r.name for r in RESUMED])
def test_resumed_at_every_step_equals_never_stopped(made, stopped_at_every_step, name):
    whole = read_metrics(made[name])
    assert len(whole) == RESUMED_STEPS + 1
    assert_same_metrics(whole, read_metrics(stopped_at_every_step[f"broken {name}"]))


def test_starting_a_complete_run_changes_nothing(made, tiny_run):
    arguments, folder = next(r for r in RUNS if r.name == "keep").arguments(tiny_run)
    before = read_metrics(folder)
    assert "complete at step 4 of 4" in run(1, arguments)
    assert read_metrics(folder) == before


def test_sigterm_saves_and_the_same_command_goes_on(tiny_run, tmp_path):
    arguments, folder = tiny_run("sigterm", **{"train.steps": 100_000, "optimizer.schedule": "constant"})
    processes = start(1, arguments, tmp_path)
    try:
        wait_for(lambda: len(read_metrics(folder)) >= 4, START_SECONDS, "4 lines of metrics", processes)
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(60) == STOPPED
    finally:
        kill(processes)
    stopped = read_metrics(folder)[-1]["step"]
    assert f"SIGTERM asked to stop; saved step {stopped} of 100000" in (tmp_path / "out.0").read_text()
    run(1, [*arguments, f"train.steps={stopped + 2}"])
    assert [m["step"] for m in read_metrics(folder)] == list(range(stopped + 3))


def test_the_clock_ends_a_run_with_a_validation(tiny_run):
    limits = {"train.max_minutes": 0.001, "optimizer.schedule": "constant"}
    arguments, folder = tiny_run("clock", **{"train.steps": 100_000, **limits})
    assert "train.max_minutes asked to stop" in run(2, arguments, STOPPED)
    last = read_metrics(folder)[-1]
    assert last["step"] < 100 and last["val_nelbo"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=1", "holds a run with train.seed=42, but 1 was asked for"),
        ("optimizer.lr=0.5", "holds a run with optimizer.lr=0.001"),
        ("train.steps=9", "holds a run with train.steps=4"),
        ("model.mask_token_id=3", "holds a run with model.mask_token_id=None"),
        ("objective=autoregressive", "holds a run with objective=masked_diffusion"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(made, tiny_run, refusal, override, message):
    arguments, folder = next(r for r in RUNS if r.name == "keep").arguments(tiny_run)
    before = (folder / "metrics.jsonl").read_text()
    assert message in refusal([*arguments, override])
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.fixture
def refusal(capsys, monkeypatch):
    """`refusal(arguments)`: the one line with which pretrain/main.py refuses them."""
    from pretrain.main import main

    monkeypatch.chdir(ROOT)

    def refused(arguments: list[str]) -> str:
        assert main(arguments[1:]) == 2
        (line,) = error_lines(capsys.readouterr().err)
        return line

    return refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "bytes, the manifest says"),
        ("altered", "the file was altered"),
        ("another tokenizer", "has another tokenizer"),
    ],
)
def test_bad_corpora(tiny_run, corpus_dir, tmp_path, refusal, damage, message):
    shutil.copytree(corpus_dir, tmp_path / "corpus")
    shard = tmp_path / "corpus" / Manifest.load(tmp_path / "corpus").sources[0].train[0].file
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[:-1])
    elif damage == "altered":
        content[1000] ^= 1
        shard.write_bytes(content)
    elif damage == "another tokenizer":
        manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
        manifest["tokenizer"]["fingerprint"] = "0" * 64
        (tmp_path / "corpus/manifest.json").write_text(json.dumps(manifest))
    arguments, folder = tiny_run(f"bad {damage}", **{"data.path": tmp_path / "corpus"})
    line = refusal(arguments)
    assert message in line and str(tmp_path) in line
    assert not folder.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch_size=9", "is not a multiple of train.micro_batch_size"),
        ("data.path=/nowhere", "/nowhere/manifest.json not found"),
        ("model.base=/nowhere", "no tokenizer in model.base '/nowhere'"),
        ("model.mask_token_id=99999", "the vocabulary has 0 to 383"),
        ("train.seq_len=64", "rows of 32 tokens, but train.seq_len is 64"),
        ("train.stepz=3", "unknown key 'train.stepz'"),
    ],
)
def test_bad_settings_write_nothing(tiny_run, override, message, refusal):
    arguments, folder = tiny_run("bad setting")
    assert message in refusal([*arguments, override])
    assert not folder.exists()


def test_of_several_ranks_one_reports(tiny_run):
    arguments, folder = tiny_run("bad ranks", **{"train.micro_batch_size": 3})
    outcome = launch(2, arguments)
    assert outcome.returncode == 2 and outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: train.global_batch_size 8 is not a multiple of train.micro_batch_size 3 × 2 ranks")
    assert not folder.exists()
