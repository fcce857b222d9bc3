"""Evaluation beside training: its scores reach the run's metrics whatever is killed, deleted or late."""

import contextlib
import fcntl
import json
import logging
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers import START_SECONDS, assert_same_metrics, kill, run, start, wait_for

from common.config import save_config
from common.errors import UserError
from pretrain.runtime.checkpoint import checkpoint_id
from pretrain.runtime.evaluation import checkpoint_folder, lock_metrics, read_scores
from pretrain.runtime.metrics import read_metrics
from pretrain.runtime.stop import STOPPED
from tools import evaluate, evaluate_run
from tools.evaluation import of_a_run
from tools.export import export
from tools.run_folder import read_run

pytestmark = pytest.mark.slow

STORIES = ("the cat saw the mat, and there the cat slept", "there was a king", "he gave the dog a bone and it was glad")
DEEDS = (("open a door", "turn the knob", "eat the knob", 0), ("boil water", "freeze it", "heat it", 1))


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory) -> Path:
    """Local files of two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    deeds = [dict(zip(("goal", "sol1", "sol2", "label"), deed)) for deed in DEEDS]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(deed) + "\n" for deed in deeds))
    return folder


@pytest.fixture(scope="session")
def evaluated(tiny_run, tasks_dir, tmp_path_factory):
    """(a run with evaluation, the same run without, what the first printed), of two ranks and 4 steps."""
    settings = {"train.steps": 4, "checkpoint.every": 1, "checkpoint.keep": 9}
    asked = {"tasks": "lambada,piqa", "every": 4, "data_dir": tasks_dir, "draws": 2}
    arguments, folder = tiny_run("evaluated", **settings, **{f"evaluation.{k}": v for k, v in asked.items()})
    printed = run(2, arguments)
    plain, other = tiny_run("not_evaluated", **settings)
    run(2, plain)
    return folder, other, printed


def test_scores_are_in_the_metrics_of_their_step(evaluated, tasks_dir, tmp_path):
    """The same that tools.evaluate gives of an export; and in evaluation.md."""
    folder, _, printed = evaluated
    exported = export(folder, tmp_path / "export", step=4)
    arguments = ["--tasks", "lambada,piqa", "--draws", "2", "--data_dir", str(tasks_dir)]
    assert evaluate.main([str(exported), *arguments, "--output", str(tmp_path / "output")]) == 0
    expected = json.loads((tmp_path / "output" / "results.json").read_text())["tasks"]
    found = {k: v for line in read_metrics(folder) for k, v in line.items() if k.startswith("eval_")}
    assert found == {f"eval_{task}": r["accuracy"] for task, r in expected.items()} and len(found) == 2
    assert "eval_piqa" in read_metrics(folder)[4] and "step 4 evaluated: eval_lambada" in printed
    title, row = (folder / "evaluation.md").read_text().splitlines()[2:5:2]
    assert title == "| step | tokens | lambada (accuracy, %) | piqa (accuracy, %) |"
    assert row.startswith("| 4 | 1,024 | ") and f"{100 * expected['piqa']['accuracy']:.1f} ±" in row
    assert not list((folder / "evaluation" / "exports").iterdir())


def test_training_is_the_same_with_and_without(evaluated):
    assert_same_metrics(read_metrics(evaluated[0]), read_metrics(evaluated[1]))


# In place of tools.evaluate, for what does not depend on scores. Its arguments go to calls.txt of the run.
FAKE = """
import json, os, sys, time
from pathlib import Path
export, output = Path(sys.argv[1]), Path(sys.argv[3])
folder = output.parent
with open(folder / "calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[4:]) + f" {output.name}\\n")
if (folder / "fails").exists():
    output.mkdir(exist_ok=True)
    (output / "begun").touch()
    print("error: " + (folder / "fails").read_text(), file=sys.stderr)
    sys.exit(int((folder / "code").read_text()))
if "--dry_run" in sys.argv:
    sys.exit(0)
step = json.loads((export / "config.json").read_text())["diffusion"]["step"]
output.mkdir(exist_ok=True)
scores = {"accuracy": step / 8, "stderr": None, "metric": "accuracy", "n": 1}
(output / "results.json").write_text(json.dumps({"tasks": {"piqa": scores}}))
"""


@pytest.fixture
def finished(evaluated, tmp_path, monkeypatch, caplog) -> Path:
    """A finished run with checkpoints of steps 1 to 4, of which 2 and 4 are due; nothing is evaluated yet."""
    caplog.set_level(logging.INFO)
    folder = Path(shutil.copytree(evaluated[1], tmp_path / "run"))
    asks(folder, tasks="piqa", every=2)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(of_a_run, "EVALUATE", (sys.executable, str(tmp_path / "fake.py")))
    return folder


def asks(folder: Path, **settings) -> None:
    """Give the run other settings of its evaluation."""
    config = read_run(folder).config
    for name, value in settings.items():
        setattr(config.evaluation, name, value)
    save_config(config, folder / "config.yaml")


def fails(folder: Path, code: int, message: str) -> None:
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "fails").write_text(message)
    (folder / "evaluation" / "code").write_text(str(code))


def works(folder: Path) -> None:
    (folder / "evaluation" / "fails").unlink()


def calls(folder: Path) -> list[str]:
    """What has been evaluated, in order."""
    path = folder / "evaluation" / "calls.txt"
    return [line.split()[-1] for line in path.read_text().splitlines()] if path.exists() else []


def scores(folder: Path) -> dict[int, float]:
    return {line["step"]: line["eval_piqa"] for line in read_metrics(folder) if "eval_piqa" in line}


def test_the_newest_checkpoint_goes_first_and_each_once(finished, caplog):
    """Without a trainer the process itself adds the scores to the metrics."""
    before = read_metrics(finished)
    for _ in range(2):
        assert not evaluate_run.evaluate_run(finished, poll=0.01).failed
    assert calls(finished) == ["step_4", "step_2"]
    assert scores(finished) == {2: 0.25, 4: 0.5}
    assert [{k: v for k, v in m.items() if k != "eval_piqa"} for m in read_metrics(finished)] == before
    assert "step 4 goes before 1 older: 2; they follow if training still has them then" in caplog.text
    assert "| 2 | 512 | 25.0 |" in (finished / "evaluation.md").read_text()
    assert list((finished / "evaluation" / "exports").iterdir()) == []


@pytest.mark.parametrize("moment", ["_write_table", "_remove_export"])
def test_killed_when_all_but_done(finished, monkeypatch, moment):
    """After the scores are written: the next start does the rest, and evaluates nothing twice."""

    def killed(*arguments) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate_run, moment, killed)
        evaluate_run.evaluate_run(finished, once=True)
    evaluate_run.evaluate_run(finished, once=True)
    assert calls(finished) == ["step_4", "step_2"] and scores(finished) == {2: 0.25, 4: 0.5}
    assert "| 4 | 1,024 | 50.0 |" in (finished / "evaluation.md").read_text()
    assert not list((finished / "evaluation" / "exports").iterdir())


def test_settings_reach_tools_evaluate_and_others_evaluate_again(finished):
    evaluate_run.evaluate_run(finished, once=True)
    asks(finished, limit=7, draws=3, likelihood="dream")
    evaluate_run.evaluate_run(finished, once=True)
    assert calls(finished) == ["step_4", "step_2"] * 2
    last = (finished / "evaluation" / "calls.txt").read_text().splitlines()[-1]
    assert "--tasks piqa --limit 7 --likelihood dream --draws 3" in last
    assert "on first 7 examples" in (finished / "evaluation.md").read_text()


def test_deleted_checkpoints_are_counted(finished, caplog, monkeypatch):
    """One that is gone before it looked, and one that training deletes under its hands."""
    asks(finished, every=1)
    shutil.rmtree(checkpoint_folder(finished, 1))

    def deleted_meanwhile(run_dir, out_dir, step):
        if step == 2:
            shutil.rmtree(checkpoint_folder(finished, 2))
            raise FileNotFoundError("gone")
        return export(run_dir, out_dir, step)

    monkeypatch.setattr(evaluate_run, "export", deleted_meanwhile)
    evaluate_run.evaluate_run(finished, poll=0.01)
    assert scores(finished) == {3: 0.375, 4: 0.5}
    lines = [r.getMessage().partition(";")[0] for r in caplog.records if "no checkpoint any more" in r.getMessage()]
    assert lines == [f"step {n} is not evaluated: no checkpoint any more ({n} in all)" for n in (1, 2)]
    assert "; 2 due before had been deleted" in caplog.text


def test_what_fails_is_tried_again_by_the_next_start(finished, caplog):
    """From the export that is there, with the answers so far, also when training has deleted the checkpoint."""
    fails(finished, 1, "out of memory")
    assert evaluate_run.evaluate_run(finished, poll=0.01).failed == {2, 4}
    assert "step 4 could not be evaluated (out of memory); the next start tries again" in caplog.text
    assert scores(finished) == {}
    shutil.rmtree(checkpoint_folder(finished, 2))
    works(finished)
    evaluate_run.evaluate_run(finished, poll=0.01)
    assert scores(finished) == {2: 0.25, 4: 0.5}
    assert (finished / "evaluation" / "step_2" / "begun").exists()


def test_another_checkpoint_of_a_step_is_evaluated_anew(finished):
    fails(finished, 1, "out of memory")
    evaluate_run.evaluate_run(finished, once=True)
    about = checkpoint_folder(finished, 4) / "checkpoint.json"
    about.write_text(about.read_text() + "\n")
    works(finished)
    evaluate_run.evaluate_run(finished, once=True)
    assert not (finished / "evaluation" / "step_4" / "begun").exists()
    about.write_text(about.read_text() + "\n")
    evaluate_run.evaluate_run(finished, once=True)
    assert calls(finished)[-3:] == ["step_4", "step_2", "step_4"]
    assert read_scores(finished)[4]["checkpoint"] == checkpoint_id(checkpoint_folder(finished, 4))


def test_settings_that_are_refused_end_it(finished, tmp_path):
    """At its start, also when there is no checkpoint yet."""
    fails(finished, 2, "--tasks: there is no 'piqqa'")
    with pytest.raises(UserError, match=r"step 4 cannot be evaluated: --tasks: there is no 'piqqa'"):
        evaluate_run.evaluate_run(finished, poll=0.01)
    shutil.rmtree(finished / "evaluation" / "exports")
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(UserError, match="settings do not work: --tasks: there is no 'piqqa'"):
        evaluate_run.evaluate_run(finished, poll=0.01)
    asks(finished, tasks="")
    with pytest.raises(UserError, match="asks for no evaluation"):
        evaluate_run.evaluate_run(finished, poll=0.01)
    with pytest.raises(UserError, match="holds no run"):
        evaluate_run.evaluate_run(tmp_path / "nothing", once=True)


def test_one_process_evaluates_a_run(finished, monkeypatch):
    monkeypatch.setattr(evaluate_run, "LOCK_SECONDS", 0.1)
    (finished / "evaluation").mkdir()
    with open(finished / "evaluation" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process evaluates"):
            evaluate_run.evaluate_run(finished, once=True)
    evaluate_run.evaluate_run(finished, once=True)
    assert calls(finished) == ["step_4", "step_2"]


def test_while_a_trainer_is_there_it_takes_the_scores_over(finished):
    (finished / "evaluation").mkdir()
    lock = lock_metrics(finished)
    assert lock is not None
    with lock:
        evaluate_run.evaluate_run(finished, poll=0.01)
    assert scores(finished) == {} and set(read_scores(finished)) == {2, 4}
    evaluate_run.evaluate_run(finished, poll=0.01)
    assert scores(finished) == {2: 0.25, 4: 0.5} and len(calls(finished)) == 2


def evaluating(folder: Path) -> list[int]:
    """The processes that evaluate the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if str(folder) in words and "tools.evaluate_run" in words:
                found.append(int(path.parent.name))
    return found


def test_it_ends_with_training(tiny_run, tasks_dir, tmp_path):
    """Asked to stop, the trainer ends it; killed, the kernel does."""
    settings = {"train.steps": 100_000, "optimizer.schedule": "constant", "checkpoint.every": 10_000}
    asked = {"tasks": "piqa", "every": 10_000, "data_dir": tasks_dir}
    settings |= {f"evaluation.{name}": value for name, value in asked.items()}
    runs = []
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            arguments, folder = tiny_run(f"ends_{number.value}", **settings)
            (tmp_path / folder.name).mkdir()
            runs.append((number, folder, start(1, arguments, tmp_path / folder.name)))
        for number, folder, processes in runs:
            lock = folder / "evaluation" / "lock"  # then it has imported all
            wait_for(lock.exists, START_SECONDS, "it has begun", processes, pause=0.05)
            assert len(evaluating(folder)) == 1
            processes[0].send_signal(number)
            assert processes[0].wait(60) == (STOPPED if number == signal.SIGTERM else -number)
            wait_for(lambda folder=folder: not evaluating(folder), 30, "it has ended", pause=0.05)
            assert "the evaluating process" not in (tmp_path / folder.name / "out.0").read_text()
            assert "Traceback" not in (folder / "evaluation" / "log.txt").read_text()
    finally:
        for _, _, processes in runs:
            kill(processes)
