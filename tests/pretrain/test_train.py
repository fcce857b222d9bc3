"""Real runs under real launchers, of seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, config, launch, write_jsonl

from data_prep.prepare import prepare
from data_prep.shards import Manifest
from pretrain.telemetry import MACHINE, read_metrics

COMPARED = ("loss", "masked_ce", "grad_norm", "lr", "anneal_ratio", "tokens")


def run(ranks: int, arguments: list[str], launcher: str = "processes"):
    outcome = launch(ranks, arguments, launcher=launcher)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return outcome


def assert_same(a: list[dict], b: list[dict], rel: float) -> None:
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for x, y in zip(a, b):
        for key in (set(x) & set(y)) - {*MACHINE, "step"}:
            assert x[key] == pytest.approx(y[key], rel=rel), (x["step"], key)


def test_deepspeed_zero3_on_two_ranks(tiny_run):
    """The launcher, the stage and the command of the README; the loss falls, and the metrics are all there."""
    arguments, folder = tiny_run(
        "deepspeed", **{"train.steps": 30, "optimizer.warmup_steps": 5, "wandb.mode": "offline"}
    )
    run(2, arguments, launcher="deepspeed")
    metrics = read_metrics(folder)
    assert [m["step"] for m in metrics] == list(range(31))
    for key in (*COMPARED, "tokens_per_second"):
        assert all(key in m for m in metrics[1:])
    assert metrics[-1]["tokens"] == 30 * 8 * 32
    assert metrics[-1]["val_nelbo"] < metrics[0]["val_nelbo"] - 0.3
    assert [m["anneal_ratio"] for m in metrics[1:6]] == [0.25, 0.5, 0.75, 1.0, 1.0]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["train"]["steps"] == 30 and resolved["optimizer"]["betas"] == [0.9, 0.95]
    assert list(folder.glob("wandb/offline-run-*"))


@pytest.fixture(scope="module")
def by_stage(tiny_run, tmp_path_factory) -> dict[tuple[int, str], list[dict]]:
    """Metrics of 5 steps by (ranks, stage), and with other splits of the batch."""
    folder, found = tmp_path_factory.mktemp("stages"), {}
    for ranks, micro, stages in ((1, 2, "0,1,2,3"), (2, 2, "0,1,2,3"), (2, 4, "3")):
        arguments, _ = tiny_run("unused", **{"train.micro_batch_size": micro})
        output = folder / f"{ranks}_{micro}.json"
        outcome = launch(ranks, ["tests/scripts/stages.py", stages, str(output), *arguments])
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        found |= {(ranks, micro, stage): metrics for stage, metrics in json.loads(output.read_text()).items()}
    return found


def test_stages_ranks_and_accumulation_give_the_same_losses_and_gradients(by_stage):
    """ZeRO 0 to 3, 1 rank × 4 passes, 2 × 2 and 2 × 1: one run, to 1e-5 over 5 steps."""
    assert len(by_stage) == 9
    reference = by_stage[1, 2, "0"]
    assert len(reference) == 6 and reference[-1]["loss"] != reference[1]["loss"]
    for metrics in by_stage.values():
        assert_same(metrics, reference, rel=1e-5)


def test_the_first_loss_is_the_objective_computed_anew(by_stage, tiny_run, base_dir, corpus_dir):
    """From the manifest and the noise alone: the base with a mean mask row, eager attention with the drawn mask."""
    from transformers import AutoModelForCausalLM

    from pretrain.data import TrainData
    from pretrain.model.visibility import hashed_uniform

    model = AutoModelForCausalLM.from_pretrained(base_dir("llama"), attn_implementation="eager")
    weight = model.get_input_embeddings().weight.data
    model.resize_token_embeddings(385, mean_resizing=False)
    model.get_input_embeddings().weight.data[384] = weight.mean(0)
    head = model.get_output_embeddings().weight.data
    head[384] = head[:384].mean(0)

    samples = [TrainData(str(corpus_dir), 384, seed=42).sample(n) for n in range(8)]
    i, j = torch.arange(32)[:, None], torch.arange(32)[None]
    visible = (j <= i) | (hashed_uniform((42, 0), i, j) < 0.25)
    bias = torch.zeros(1, 1, 32, 32).masked_fill(~visible, torch.finfo(torch.float32).min)
    loss, masked_tokens = 0.0, 0
    for s in samples:
        logits = model(torch.from_numpy(s.xt)[None], attention_mask=bias).logits[0]
        logits, loss_mask = logits[:-1], torch.from_numpy(s.xt == 384)[1:]  # no mask id in this corpus
        nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(s.x0)[1:], reduction="none")
        loss, masked_tokens = loss + (nll * loss_mask).sum().item() / s.t, masked_tokens + int(loss_mask.sum())
    assert by_stage[1, 2, "0"][1]["loss"] == pytest.approx(loss / masked_tokens, rel=1e-6)


def test_normalising_by_maskable_tokens_gives_the_nelbo(tiny_run):
    arguments, folder = tiny_run("maskable", **{"train.steps": 1, "diffusion.normalize_by": "maskable"})
    run(1, arguments)
    other, masked = tiny_run("masked", **{"train.steps": 1})
    run(1, other)
    a, b = read_metrics(folder)[1], read_metrics(masked)[1]
    assert a["masked_ce"] == b["masked_ce"] and a["loss"] != b["loss"]
    from pretrain.data import TrainData, step_data

    path = yaml.safe_load((folder / "config.yaml").read_text())["data"]["path"]
    part = step_data(TrainData(path, 384, seed=42), 0, 8, 8, 0, 1)
    assert part.maskable == 8 * 31
    assert a["loss"] * part.maskable == pytest.approx(b["loss"] * part.masked, rel=1e-6)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (3, 2)])
def test_resumed_at_every_step_equals_never_stopped(tiny_run, stage, ranks):
    whole_args, whole = tiny_run(f"whole{stage}", stage=stage, **{"train.steps": 3})
    run(ranks, whole_args, "torchrun")
    broken_args, broken = tiny_run(f"broken{stage}", stage=stage, **{"train.steps": 3, "train.exit_interval": 1})
    for _ in range(3):
        run(ranks, broken_args)
    a, b = read_metrics(whole), read_metrics(broken)
    assert len(a) == len(b) == 4
    for x, y in zip(a, b):
        assert {k: v for k, v in x.items() if k not in MACHINE} == {k: v for k, v in y.items() if k not in MACHINE}
    again = run(ranks, broken_args)
    assert "complete at step 3 of 3" in again.stdout + again.stderr
    assert len(read_metrics(broken)) == 4


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_under_zero3_the_loss_in_chunks_is_the_plain_one(tiny_run, family):
    """Values, gradient norms and the parameters that they lead to; tied and untied heads."""
    found = []
    for how in ("plain", "chunked"):
        arguments, folder = tiny_run(f"loss_{family}_{how}", family, 3, **{"train.steps": 3, "model.loss": how})
        run(2, arguments)
        found.append(read_metrics(folder))
    assert_same(*found, rel=1e-5)


def test_documents_isolated_trains_and_differs(tiny_run, tokenizer_dir, tales, tmp_path):
    """Sentences as documents: every row holds several."""
    sentences = [sentence for tale in tales[:40] for sentence in tale.split(". ")]
    corpus = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", sentences)], seq_len=32)
    prepare(corpus, progress=False)
    settings = {"data.path": corpus.output_dir, "train.steps": 2, "annealing.form": "window"}
    arguments, folder = tiny_run("isolated", "gpt2", **settings, **{"data.isolate_documents": True})
    run(2, arguments)
    other_args, other = tiny_run("shared", "gpt2", **settings)
    run(2, other_args)
    assert abs(read_metrics(folder)[1]["masked_ce"] - read_metrics(other)[1]["masked_ce"]) > 1e-3


def test_sigterm_saves_and_the_same_command_goes_on(tiny_run):
    arguments, folder = tiny_run("sigterm", **{"train.steps": 100_000, "optimizer.schedule": "constant"})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None and len(read_metrics(folder)) < 4:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 75, output
    stopped = read_metrics(folder)[-1]["step"]
    assert f"SIGTERM asked to stop; saved step {stopped} of 100000" in output
    run(1, [*arguments, f"train.steps={stopped + 2}"])
    assert [m["step"] for m in read_metrics(folder)] == list(range(stopped + 3))


def test_the_clock_ends_a_run_with_a_validation(tiny_run):
    limits = {"train.max_minutes": 0.001, "optimizer.schedule": "constant"}
    arguments, folder = tiny_run("clock", **{"train.steps": 100_000, **limits})
    assert "train.max_minutes asked to stop" in launch(2, arguments).stdout
    last = read_metrics(folder)[-1]
    assert last["step"] < 100 and last["val_nelbo"] > 0


def test_old_checkpoints_go_and_the_newest_stays(tiny_run):
    arguments, folder = tiny_run("keep", **{"checkpoint.every": 1, "checkpoint.keep": 2, "train.steps": 4})
    run(1, arguments)
    checkpoints = folder / "checkpoints"
    assert sorted(f.name for f in checkpoints.glob("step_*")) == ["step_00000003", "step_00000004"]
    assert (checkpoints / "latest").read_text() == "step_00000004"


@pytest.fixture(scope="module")
def finished(tiny_run):
    arguments, folder = tiny_run("finished", **{"train.steps": 2})
    run(1, arguments)
    return arguments, folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=1", "holds a run with train.seed=42, but 1 was asked for"),
        ("optimizer.lr=0.5", "holds a run with optimizer.lr=0.001"),
        ("train.steps=9", "holds a run with train.steps=2"),
        ("model.mask_token_id=3", "holds a run with model.mask_token_id=None"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(finished, override, message):
    arguments, folder = finished
    before = (folder / "metrics.jsonl").read_text()
    outcome = launch(1, [*arguments, override])
    assert outcome.returncode == 2 and message in outcome.stderr
    assert (folder / "metrics.jsonl").read_text() == before


def corpus_with(corpus_dir, target, damage: str):
    shutil.copytree(corpus_dir, target)
    shard = target / Manifest.load(target).sources[0].train[0].file
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "altered":
        content = bytearray(shard.read_bytes())
        content[1000] ^= 1
        shard.write_bytes(content)
    elif damage == "another tokenizer":
        manifest = json.loads((target / "manifest.json").read_text())
        manifest["tokenizer"]["fingerprint"] = "0" * 64
        (target / "manifest.json").write_text(json.dumps(manifest))
    return shard


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "bytes, the manifest says"),
        ("altered", "the file was altered"),
        ("another tokenizer", "has another tokenizer"),
    ],
)
def test_bad_corpora(tiny_run, corpus_dir, tmp_path, damage, message):
    corpus_with(corpus_dir, tmp_path / "corpus", damage)
    arguments, folder = tiny_run(f"bad {damage}", **{"data.path": tmp_path / "corpus"})
    outcome = launch(1, arguments)
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    assert outcome.returncode == 2 and len(errors) == 1 and message in errors[0] and str(tmp_path) in errors[0]
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
def test_bad_settings_write_nothing(tiny_run, override, message, capsys, monkeypatch):
    from pretrain.main import main

    monkeypatch.chdir(ROOT)
    arguments, folder = tiny_run("bad setting")
    assert main([*arguments[1:], override]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and message in error
    assert not folder.exists()
