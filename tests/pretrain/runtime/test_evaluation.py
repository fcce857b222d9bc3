"""The trainer's side of evaluation: scores go into the lines of their steps once, and nothing that fails ends a run."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import wait_for

from common.config import load_config
from pretrain.config import RunConfig
from pretrain.runtime import evaluation
from pretrain.runtime.evaluation import Evaluation, environment, lock_metrics
from pretrain.runtime.metrics import MetricLogger, amend, read_metrics, reproducible

FAKE = "evaluator_of_a_test"  # a module


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """`run(done, code)`: (the trainer's side of a run with `done` steps, its metrics); `code` is that of the module."""
    monkeypatch.setattr(evaluation, "MODULE", FAKE)
    monkeypatch.setattr(evaluation, "LOOK_SECONDS", 0.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    caplog.set_level(logging.INFO)
    opened = []

    def made(done: int, code: str = "", **settings) -> tuple[Evaluation, MetricLogger]:
        (tmp_path / f"{FAKE}.py").write_text(f"import sys, time\n{code}\n")
        asked = {"tasks": "piqa", "every": 1, **settings}
        overrides = [f"run_dir={tmp_path}", "wandb.mode=disabled", "checkpoint.every=1"]
        config = load_config(RunConfig, None, [*overrides, *(f"evaluation.{k}={v}" for k, v in asked.items())])
        metrics = MetricLogger(config, done, 10, enabled=True)
        found = Evaluation(config, metrics, done, enabled=True)
        opened.append(found)
        return found, metrics

    yield made
    for found in opened:
        found.close()


def log_steps(metrics: MetricLogger, *steps: int) -> None:
    for step in steps:
        metrics.log({"step": step, "loss": 0.1 * step, "step_seconds": 0.5})


def write_scores(folder: Path, **scores: float) -> None:
    """As tools.evaluate_run does: step_4=0.5 is a score of step 4, whose checkpoint is a; step_4b of another one."""
    content = {
        name.strip("stepb_"): {"checkpoint": name[-1] if name[-1] == "b" else "a", "tasks": {"piqa": {"score": score}}}
        for name, score in scores.items()
    }
    (folder / "evaluation" / "scores.tmp").write_text(json.dumps(content))
    os.replace(folder / "evaluation" / "scores.tmp", folder / "evaluation" / "scores.json")


def scores(folder: Path) -> dict[int, float]:
    return {line["step"]: line["eval_piqa"] for line in read_metrics(folder) if "eval_piqa" in line}


def reported(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "evaluated:" in r.getMessage()]


def test_a_score_goes_into_the_line_of_its_step_once(run, tmp_path, caplog):
    found, metrics = run(0, launch=False)
    found.start()
    log_steps(metrics, 1, 2, 3)
    before = [reproducible(line) for line in read_metrics(tmp_path)]
    for done in (3, 4):
        write_scores(tmp_path, step_2=0.5, step_4=0.75)  # the line of step 4 is not there at first
        if done == 4:
            log_steps(metrics, 4)
        found.look(done)
    log_steps(metrics, 5)
    found.look(5)
    assert scores(tmp_path) == {2: 0.5, 4: 0.75}
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert [reproducible(line) for line in read_metrics(tmp_path)][:3] == before
    assert reported(caplog) == ["step 2 evaluated: eval_piqa 0.5", "step 4 evaluated: eval_piqa 0.75"]


def test_what_came_while_no_trainer_ran_is_taken_over_once(run, tmp_path, caplog):
    found, metrics = run(0, launch=False)
    found.start()
    log_steps(metrics, 1, 2)
    write_scores(tmp_path, step_1=0.25)
    found.look(2)
    found.close()
    write_scores(tmp_path, step_1=0.25, step_2=0.5)
    for _ in range(2):
        again, metrics = run(2, launch=False)
        again.start()
        again.close()
    assert scores(tmp_path) == {1: 0.25, 2: 0.5}
    assert len(reported(caplog)) == 2


def test_scores_of_steps_that_are_done_again_wait_for_the_same_checkpoint(run, tmp_path, monkeypatch):
    """A run that goes back: the score of a checkpoint counts again when the same one is there, or a new score."""
    found, metrics = run(0, launch=False)
    found.start()
    log_steps(metrics, 1, 2, 3, 4)
    write_scores(tmp_path, step_2=0.5, step_3=0.6, step_4=0.7)
    found.look(4)
    metrics.rewind(2)
    found.rewind(2)
    assert scores(tmp_path) == {2: 0.5}
    log_steps(metrics, 3, 4)
    found.look(4)
    assert scores(tmp_path) == {2: 0.5}
    monkeypatch.setattr(evaluation, "checkpoint_id", lambda folder: "a" if folder.name.endswith("3") else "b")
    for step in (3, 4):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    found.look(4)
    assert scores(tmp_path) == {2: 0.5, 3: 0.6}
    write_scores(tmp_path, step_2=0.5, step_3=0.6, step_4b=0.9)
    found.look(4)
    assert scores(tmp_path) == {2: 0.5, 3: 0.6, 4: 0.9}


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', '{"2": {}}'])
def test_scores_that_cannot_be_read_do_no_harm(run, tmp_path, content):
    found, metrics = run(0, launch=False)
    found.start()
    log_steps(metrics, 1, 2)
    (tmp_path / "evaluation" / "scores.json").write_text(content)
    found.look(2)
    found.rewind(1)
    assert scores(tmp_path) == {}


def test_a_full_disk_does_not_end_training(run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    found, metrics = run(0, launch=False)
    found.start()
    log_steps(metrics, 1)
    write_scores(tmp_path, step_1=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.runtime.metrics.write_atomically", full)
        found.look(1)
    log_steps(metrics, 2)
    found.look(2)
    assert scores(tmp_path) == {1: 0.5} and len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("print('error: there is no piqqa', flush=True)\nsys.exit(2)", "ended with exit code 2"),
        ("import os\nprint('error: there is no piqqa', flush=True)\nos.kill(os.getpid(), 9)", "was ended by signal 9"),
    ],
)
def test_a_process_that_fails_is_reported_once(run, tmp_path, caplog, code, how):
    found, metrics = run(0, code)
    found.start()
    assert found._process is not None
    found._process.wait(60)
    for step in (1, 2, 3):
        log_steps(metrics, step)
        found.look(step)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    log = tmp_path / "evaluation" / "log.txt"
    assert lines == [f"the evaluating process {how}; training goes on without it, see {log} (error: there is no piqqa)"]
    found.wait(lambda: 0)


def test_an_evaluation_that_cannot_be_started_is_reported(run, caplog, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nothing/python")
    found, _ = run(0)
    found.start()
    assert "cannot be started" in caplog.text and not found.running


def test_the_end_waits_for_the_last_scores(run, tmp_path, caplog):
    found, metrics = run(0, "time.sleep(0.5)")
    found.start()
    log_steps(metrics, 1)
    found.look(1)
    write_scores(tmp_path, step_1=0.5)
    found.wait(lambda: 0)
    assert "waiting up to 30 minutes" in caplog.text and "python -m" not in caplog.text
    assert scores(tmp_path) == {1: 0.5} and not found.running


@pytest.mark.parametrize(("minutes", "stop"), [(0, 0), (0.001, 0), (30, 1)])
def test_the_end_does_not_wait_too_long(run, tmp_path, caplog, minutes, stop):
    """Whether the time is over or a signal came: the process is ended, and the log says how to go on."""
    found, _ = run(0, "print('begun', flush=True)\ntime.sleep(600)", wait_minutes=minutes)
    found.start()
    process = found._process
    assert process is not None
    wait_for(lambda: "begun" in found.log_path.read_text(), 60, "it runs")
    found.wait(lambda: stop)
    assert f"this does the rest: python -m {FAKE} {tmp_path}" in caplog.text
    found.close()
    assert process.poll() == -signal.SIGTERM


def test_one_process_at_a_time_adds_scores(run, tmp_path):
    found, _ = run(0, launch=False)
    found.start()
    assert lock_metrics(tmp_path) is None
    found.close()
    lock = lock_metrics(tmp_path)
    assert lock is not None
    lock.close()


def test_lines_are_amended_and_nothing_else_is_touched(tmp_path):
    lines = [b'{"step": 1, "a": 0.1}\n', b'{"step": 11, "a": 1e-07}\n', b'{"step": 2, "eval_x": 1.0}\n', b'{"step": 3']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert amend(tmp_path, {1: {"eval_x": 0.5}, 2: {"eval_x": 1.0}, 9: {"eval_x": 3.0}}) == {1: {"eval_x": 0.5}}
    lines[0] = b'{"step": 1, "a": 0.1, "eval_x": 0.5}\n'
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)
    assert amend(tmp_path / "nothing", {1: {"eval_x": 0.5}}) == {}


def test_the_process_is_no_rank_of_the_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES", "OTHER"):
        monkeypatch.setenv(name, "7")
    found = environment("/project", "cpu")
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & found.keys()
    assert found["CUDA_VISIBLE_DEVICES"] == "" and found["OTHER"] == "7"
    assert found["PYTHONPATH"].split(os.pathsep)[0] == "/project"
    assert environment("/project", "cuda")["CUDA_VISIBLE_DEVICES"] == "7"
