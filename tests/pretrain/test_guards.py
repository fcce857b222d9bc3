"""Non-finite steps, spikes, hanging ranks, second signals: decided alike everywhere, reported, survived."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, start

from pretrain.config import GuardConfig
from pretrain.data import TrainData
from pretrain.guards import ENOUGH, STALLED, Guard
from pretrain.telemetry import MACHINE, read_metrics


def incidents(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def same(a: list[dict], b: list[dict]) -> None:
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for x, y in zip(a, b):
        assert {k: v for k, v in x.items() if k not in MACHINE} == {k: v for k, v in y.items() if k not in MACHINE}


@pytest.fixture(scope="module")
def poisonous(base_dir, corpus_dir, tmp_path_factory):
    """(folder of a base whose embedding of one token is not a number, an unused token's id, steps that meet it)."""
    from transformers import AutoModelForCausalLM

    def tokens(step: int, mask: int) -> set[int]:
        data = TrainData(str(corpus_dir), mask, seed=42)
        return {int(i) for n in range(8 * step, 8 * step + 8) for i in data.sample(n).xt}

    rows = TrainData(str(corpus_dir), 0, seed=42).train
    known = {int(i) for source in rows for r in range(len(source)) for i in source.row(r)[0]}
    unused = next(i for i in range(2, 384) if i not in known)
    met = [tokens(step, unused) for step in range(8)]
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
    return folder, unused, steps


def settings_of(poisonous) -> dict:
    base, unused, _ = poisonous
    return {"model.base": base, "model.mask_token_id": unused, "annealing.form": "none", "validation.rows": 0}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (2, 1), (2, 3)])
def test_steps_that_are_not_finite_are_skipped_on_all_ranks(tiny_run, poisonous, ranks, stage):
    settings = {**settings_of(poisonous), "train.steps": 8, "checkpoint.keep": 1}
    arguments, folder = tiny_run(f"skip{ranks}{stage}", stage=stage, **settings)
    outcome = launch(ranks, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    metrics, steps = read_metrics(folder)[1:], poisonous[2]
    assert [m["step"] - 1 for m in metrics if m["update_skipped"]] == steps
    assert all((m["loss"] is None) == (m["step"] - 1 in steps) for m in metrics)
    assert metrics[-1]["skipped_steps"] == 3 and f"step {steps[0] + 1} had a non-finite" in outcome.stdout
    written = incidents(folder)
    assert [i["batches"] for i in written] == [[s, s] for s in steps]
    assert [s["n"] for s in written[0]["samples"]] == list(range(8 * steps[0], 8 * steps[0] + 8))
    data = TrainData(next(a for a in arguments if a.startswith("data.path="))[10:], 0, seed=42)
    first = written[0]["samples"][0]
    assert (data.names.index(first["source"]), first["epoch"], first["row"]) == data.place(first["n"])


def test_too_many_of_them_end_the_run_and_leave_the_checkpoints(tiny_run, poisonous):
    """The same base, healed for three steps by another run folder's configuration, then poisonous for good."""
    settings = {**settings_of(poisonous), "train.steps": 8, "checkpoint.every": 1, "guards.max_skipped_in_a_row": 1}
    arguments, folder = tiny_run("give_up", **settings)
    outcome = launch(1, arguments)
    first = poisonous[2][0]
    assert outcome.returncode == 2 and f"the last was step {first + 1}" in outcome.stderr
    newest = max(f.name for f in (folder / "checkpoints").glob("step_*"))
    assert newest == f"step_{first:08d}"  # of the step before


def test_after_a_roll_back_the_run_is_one_that_never_saw_those_batches(tiny_run):
    settings = {
        "train.steps": 24, "checkpoint.every": 10, "checkpoint.keep": 9, "guards.spike_factor": 4, "optimizer.lr": 1e-2,
    }  # fmt: skip
    expected_arguments, expected = tiny_run("left_out", **settings)
    assert launch(1, ["tests/scripts/patched.py", "left_out", *expected_arguments]).returncode == 0
    arguments, folder = tiny_run("rolled_back", **settings, **{"guards.on_spike": "rollback"})
    outcome = launch(1, ["tests/scripts/patched.py", "poison", *arguments])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "back to step 10, passing over batches 18 to 20" in outcome.stdout
    same(read_metrics(expected), read_metrics(folder))
    (incident,) = incidents(folder)
    assert incident["kind"] == "loss spike" and len(incident["samples"]) == 24
    state = json.loads((folder / "checkpoints/step_00000024/checkpoint.json").read_text())
    assert state["guard"]["left_out"] == [[18, 20]] and sum(state["rows"].values()) == 27 * 8
    only_warned, warned = tiny_run("warned", **settings)
    outcome = launch(1, ["tests/scripts/patched.py", "poison", *only_warned])
    assert outcome.returncode == 0 and "steps 19 to 21 have losses more than 4 deviations above" in outcome.stdout
    assert incidents(warned)[0]["batches"] == [18, 20] and read_metrics(warned)[-1]["step"] == 24


def losses(rng: random.Random, above: float = 0.0) -> dict:
    return {"update_skipped": False, **{f"masked_ce_to_t{b}": b + above + rng.gauss(0, 0.1) for b in (0.25, 0.5, 0.75)}}


def test_noise_is_no_spike_and_a_jump_is_one():
    rng = random.Random(0)
    guard = Guard(GuardConfig(spike_factor=8, spike_steps=3))
    assert all(guard.judge(losses(rng)) == "ok" for _ in range(500))
    assert [guard.judge(losses(rng, 2.0)) for _ in range(3)] == ["ok", "ok", "spike"] and guard.calm
    guard = Guard(GuardConfig(spike_factor=8, spike_steps=3))
    assert all(guard.judge(losses(rng, 9.0 * (i % 9 == 8))) != "spike" for i in range(100))  # single steps are not
    guard = Guard(GuardConfig(spike_factor=0))
    assert all(guard.judge(losses(rng, i)) == "ok" for i in range(100))
    guard = Guard(GuardConfig())
    assert all(guard.judge(losses(rng, 5.0 * i)) == "ok" for i in range(ENOUGH - 1))  # too little to judge by


def test_restored_it_decides_alike():
    rng = random.Random(1)
    stream = [losses(rng, 3.0 * (40 <= i < 44)) for i in range(80)]
    guard, again = Guard(GuardConfig()), Guard(GuardConfig())
    for metrics in stream:
        again = Guard.restored(GuardConfig(), json.loads(json.dumps(again.state())))
        assert guard.judge(metrics) == again.judge(metrics)
    assert guard == again


def test_batches_left_out_are_passed_over_once():
    guard = Guard(GuardConfig())
    guard.leave_out(5, 7)
    guard.leave_out(10, 11)
    assert [guard.batch(step) for step in range(10)] == [0, 1, 2, 3, 4, 8, 9, 12, 13, 14]


def test_a_rank_that_hangs_is_named(tiny_run, tmp_path):
    arguments, folder = tiny_run("stalled", **{"train.steps": 100_000, "guards.stall_minutes": 0.08})
    waiting, stopped = start(2, arguments, tmp_path)
    try:
        while len(read_metrics(folder)) < 4:
            assert waiting.poll() is None, (tmp_path / "err.0").read_text()
            time.sleep(0.05)
        stopped.send_signal(signal.SIGSTOP)
        assert waiting.wait(60) == STALLED
    finally:
        for process in (waiting, stopped):
            process.kill()
            process.wait()
    output = (tmp_path / "out.0").read_text()
    report = output[output.index("error: rank 0 of 2 has waited") :].splitlines()
    assert sorted(line.split(":")[0].strip() for line in report[1:3]) == ["rank 0", "rank 1"]
    assert "step" in report[1] and "in train_step" in (folder / "ranks/00000.stacks").read_text()


def test_signals_of_one_preemption_are_one_and_a_later_one_stops_at_once():
    program = """
import os, signal, time
from pretrain.trainer import StopRequest
stop = StopRequest(0)
os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1)
assert int(stop) == StopRequest.SIGNAL and stop.reason in ("SIGTERM", "SIGUSR1")
time.sleep(StopRequest.SAME + 0.1)
os.kill(os.getpid(), signal.SIGTERM)
"""
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 128 + signal.SIGTERM, outcome.stderr
