"""Non-finite steps, spikes, hanging ranks, second signals: decided alike everywhere, reported, survived."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, START_SECONDS, assert_same_metrics, kill, run_all, start, wait_for

from pretrain.config import GuardConfig, RunConfig
from pretrain.data import TrainData
from pretrain.objectives import MaskedDiffusion
from pretrain.runtime.guards import MIN_HISTORY, Guard
from pretrain.runtime.metrics import read_metrics
from pretrain.runtime.watchdog import STALLED
from pretrain.step import read_step

COMPARED = MaskedDiffusion.reported.compared


def incidents(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def tokens_of(corpus: Path, step: int, mask: int) -> set[int]:
    """What the model is given in a step of 8 rows."""
    config = RunConfig()
    config.train.global_batch_size = 8
    (batch,) = read_step(
        TrainData(str(corpus), 42), MaskedDiffusion(config, mask), step, range(8 * step, 8 * step + 8)
    )  # fmt: skip
    return set(batch.tensors["input_ids"].flatten().tolist())


@pytest.fixture(scope="module")
def poisonous(base_dir, corpus_dir, tmp_path_factory) -> tuple[dict, list[int]]:
    """Settings with a base whose embedding of one token is not a number, and the 3 steps of 8 that meet the token."""
    from transformers import AutoModelForCausalLM

    known = {
        int(i) for source in TrainData(str(corpus_dir), 42).train for r in range(len(source)) for i in source.row(r)[0]
    }
    unused = next(i for i in range(2, 384) if i not in known)
    met = [tokens_of(corpus_dir, step, unused) for step in range(8)]
    token, steps = next(
        (i, steps)
        for i in sorted(known)
        if len(steps := [s for s in range(8) if i in met[s]]) == 3 and steps[0] > 0 and 7 not in steps
    )
    folder = tmp_path_factory.mktemp("poisonous") / "base"
    shutil.copytree(base_dir("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    return {
        "model.base": folder, "model.mask_token_id": unused, "annealing.form": "none", "validation.rows": 0,
        "train.steps": 8,
    }, steps  # fmt: skip


SKIPPING = [(1, 0, "fp32"), (1, 2, "fp32"), (2, 1, "fp32"), (2, 3, "fp32"), (2, 1, "bf16"), (2, 3, "bf16")]


@pytest.fixture(scope="module")
def skipping(tiny_run, poisonous) -> dict[tuple, tuple[Path, str]]:
    """Run folders of SKIPPING, and what was printed."""
    found = {}
    for ranks in (1, 2):
        chosen = [s for s in SKIPPING if s[0] == ranks]
        runs = [
            tiny_run(f"skip{ranks}{stage}{dtype}", stage=stage,
                     **poisonous[0], **{"checkpoint.keep": 1, "model.dtype": dtype})
            for _, stage, dtype in chosen
        ]  # fmt: skip
        printed = run_all(ranks, runs)
        found |= {s: (folder, printed) for s, (_, folder) in zip(chosen, runs)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("split", SKIPPING, ids=str)
def test_steps_that_are_not_finite_are_skipped_on_all_ranks(skipping, poisonous, corpus_dir, split):
    """And leave the steps after them finite."""
    folder, printed = skipping[split]
    metrics, steps = read_metrics(folder)[1:], poisonous[1]
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert [m["step"] - 1 for m in metrics if m["update_skipped"]] == steps
    assert all((m["loss"] is None) == (m["step"] - 1 in steps) for m in metrics)
    assert all(math.isfinite(m["grad_norm"]) for m in metrics if m["step"] - 1 not in steps)
    assert metrics[-1]["skipped_steps"] == 3
    warnings = [line for line in printed.splitlines() if f"{folder}/incidents.jsonl" in line]
    assert [line.split(" had a non-finite")[0] for line in warnings] == [f"warning: step {s + 1}" for s in steps]
    written = incidents(folder)
    assert [i["batches"] for i in written] == [[s, s] for s in steps]
    assert [s["n"] for s in written[0]["samples"]] == list(range(8 * steps[0], 8 * steps[0] + 8))
    data, first = TrainData(str(corpus_dir), 42), written[0]["samples"][0]
    assert (data.names.index(first["source"]), first["epoch"], first["row"]) == data.locate(first["n"])


@pytest.mark.slow
def test_too_many_of_them_end_the_run_and_leave_the_checkpoints(tiny_run, poisonous):
    """The newest checkpoint is that of the step before the first that was not finite."""
    settings, steps = poisonous
    arguments, folder = tiny_run("give_up", **settings, **{"checkpoint.every": 1, "guards.max_skipped_in_a_row": 1})
    printed = run_all(1, [(arguments, folder)], expected=2)
    assert f"the last was step {steps[0] + 1}; the checkpoints in {folder}/checkpoints are from before" in printed
    assert max(f.name for f in (folder / "checkpoints").glob("step_*")) == f"step_{steps[0]:08d}"


@pytest.mark.slow
def test_after_a_rollback_the_run_is_one_that_never_saw_those_batches(tiny_run):
    settings = {
        "train.steps": 24, "checkpoint.every": 10, "checkpoint.keep": 9, "guards.spike_factor": 4, "optimizer.lr": 1e-2,
    }  # fmt: skip
    expected = tiny_run("without", **settings)
    run_all(2, [expected], patched="without")
    rolled_back = tiny_run("rolled_back", **settings, **{"guards.on_spike": "rollback"})
    warned = tiny_run("warned", **settings)
    printed = run_all(2, [rolled_back, warned], patched="poison")
    assert "back to step 10, passing over batches 18 to 20" in printed
    assert_same_metrics(read_metrics(expected[1]), read_metrics(rolled_back[1]))
    (incident,) = incidents(rolled_back[1])
    assert incident["kind"] == "loss spike" and len(incident["samples"]) == 24
    state = json.loads((rolled_back[1] / "checkpoints/step_00000024/checkpoint.json").read_text())
    assert state["guard"]["left_out"] == [[18, 20]] and sum(state["rows"].values()) == 27 * 8
    assert f"steps 19 to 21 have losses more than 4 deviations above before; their rows are in {warned[1]}/" in printed
    assert incidents(warned[1])[0]["batches"] == [18, 20] and read_metrics(warned[1])[-1]["step"] == 24


def losses(rng: random.Random, above: float = 0.0) -> dict:
    return {"update_skipped": False, **{f"masked_ce_to_t{b}": b + above + rng.gauss(0, 0.1) for b in (0.25, 0.5, 0.75)}}


def test_noise_is_no_spike_and_a_jump_is_one():
    rng = random.Random(0)
    guard = Guard(GuardConfig(spike_factor=8, spike_steps=3), COMPARED)
    assert all(guard.check(losses(rng)) == "ok" for _ in range(500))
    assert [guard.check(losses(rng, 2.0)) for _ in range(3)] == ["ok", "ok", "spike"] and guard.stable
    guard = Guard(GuardConfig(spike_factor=8, spike_steps=3), COMPARED)
    assert all(guard.check(losses(rng, 9.0 * (i % 9 == 8))) != "spike" for i in range(100))  # single steps are not
    guard = Guard(GuardConfig(spike_factor=0), COMPARED)
    assert all(guard.check(losses(rng, i)) == "ok" for i in range(100))
    guard = Guard(GuardConfig(), COMPARED)
    assert all(guard.check(losses(rng, 5.0 * i)) == "ok" for i in range(MIN_HISTORY - 1))  # too little to judge by


def test_restored_it_decides_alike():
    rng = random.Random(1)
    stream = [losses(rng, 3.0 * (40 <= i < 44)) for i in range(80)]
    guard, again = Guard(GuardConfig(), COMPARED), Guard(GuardConfig(), COMPARED)
    for metrics in stream:
        again = Guard.restored(GuardConfig(), COMPARED, json.loads(json.dumps(again.state())))
        assert guard.check(metrics) == again.check(metrics)
    assert guard == again


def test_batches_left_out_are_passed_over_once():
    guard = Guard(GuardConfig(), COMPARED)
    guard.skip_batches(5, 7)
    guard.skip_batches(10, 11)
    assert [guard.batch(step) for step in range(10)] == [0, 1, 2, 3, 4, 8, 9, 12, 13, 14]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tiny_run, tmp_path):
    arguments, folder = tiny_run("stalled", **{"train.steps": 100_000, "guards.stall_minutes": 0.08})
    processes = start(2, arguments, tmp_path)
    waiting, stopped = processes
    try:
        wait_for(lambda: len(read_metrics(folder)) >= 4, START_SECONDS, "4 lines of metrics", processes)
        stopped.send_signal(signal.SIGSTOP)
        assert waiting.wait(60) == STALLED
    finally:
        kill(processes)
    output = (tmp_path / "out.0").read_text()
    report = output[output.index("error: rank 0 of 2 has waited") :].splitlines()
    assert sorted(line.split(":")[0].strip() for line in report[1:3]) == ["rank 0", "rank 1"]
    assert all(": step " in line for line in report[1:3])  # both were heard of
    assert "in train_step" in (folder / "ranks/00000.stacks").read_text()


@pytest.mark.slow
def test_signals_of_one_preemption_are_one_and_a_later_one_stops_at_once():
    program = """
import os, signal, time
from pretrain.runtime.stop import StopRequest
stop = StopRequest(0)
assert stop.requested() == 0
os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1)
assert stop.requested() == StopRequest.SIGNAL and stop.reason in ("SIGTERM", "SIGUSR1")
time.sleep(StopRequest.SAME_SIGNAL_SECONDS + 0.1)
os.kill(os.getpid(), signal.SIGTERM)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert outcome.returncode == 128 + signal.SIGTERM, outcome.stderr
