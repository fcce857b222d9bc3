"""Evaluate a run's checkpoints while it trains.

    python -m tools.evaluate_run runs/diffugpt_s              # as the run's `evaluation` settings say, until its end
    python -m tools.evaluate_run runs/diffugpt_s --once       # what is due now
    sbatch slurm/evaluate_run.sh runs/diffugpt_s              # the same as a job, for evaluation.launch=false

In: RUN_DIR, of which it reads configuration and checkpoints. Out, for each checkpoint of a multiple of
evaluation.every steps and the last:

    RUN_DIR/evaluation/step_N/         what tools.evaluate writes: results.md, and every example
    RUN_DIR/evaluation/scores.json     the scores; the trainer takes them over into metrics.jsonl and wandb
    RUN_DIR/evaluation.md              a table, for people and for the model card of an export

With evaluation.launch=true, which is the default, the trainer starts it. The newest checkpoint comes first: it says
most about a run that goes on. Older ones follow when there is time, as long as training keeps them. Killed at any
moment? The same command goes on.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import make_parser, resumable_command
from common.errors import UserError
from common.files import write_atomically
from common.log import log
from pretrain.config import EvaluationConfig
from pretrain.runtime.checkpoint import checkpoint_id
from pretrain.runtime.evaluation import checkpoint_folder, read_scores

from .evaluation.of_a_run import check_tasks, end_with_parent, evaluate_export, hand_over, table
from .export import export
from .run_checkpoints import begun_run, checkpoint_steps, disappears, due_steps, is_finished, missing_steps, report_gone
from .run_folder import RunFolder, read_run

POLL_SECONDS = 60.0
PAUSE_SECONDS = 0.5  # between two looks at whether there is a new checkpoint
LOCK_SECONDS = 30.0  # in which a process that was told to end has ended
NICE = 10  # below training, which has the same processors


@dataclass
class Job:
    """A run whose checkpoints are evaluated, and what has been said of them already."""

    run_dir: Path
    gone: set[int] = field(default_factory=set)  # due steps without a checkpoint
    failed: set[int] = field(default_factory=set)  # steps that could not be evaluated; another start tries again
    delayed: set[int] = field(default_factory=set)  # steps that a newer one went before

    @property
    def folder(self) -> Path:
        return self.run_dir / "evaluation"

    def exported(self, step: int) -> Path:
        return self.folder / "exports" / f"step_{step}"

    def asked(self, step: int) -> Path:
        """Beside an export: the settings of the answers so far."""
        return self.folder / "exports" / f"asked_{step}.json"


def evaluate_run(run_dir: str | Path, poll: float = POLL_SECONDS, once: bool = False) -> Job:
    """Evaluate each checkpoint that is due; return when the run has finished and all are evaluated.

    Looks at a new checkpoint, and every `poll` seconds; with `once`, evaluates what is due now. The run may begin
    later. Raises UserError for what the user can fix, such as an unknown task.
    """
    if poll <= 0:
        raise UserError(f"--poll is {poll:g}, expected seconds above 0")
    job = Job(Path(run_dir))
    if once:
        read_run(run_dir)
    while begun_run(job.run_dir) is None:
        time.sleep(min(poll, PAUSE_SECONDS))
    with _alone(job):
        _tidy(job)
        checked = False
        while True:
            changed = _changes(job)
            run = read_run(run_dir)
            asked = asked_of(run.config.evaluation, run_dir)
            finished = is_finished(run, checkpoint_steps(run.path))
            step = next_step(job, run, finished, asked)
            if step is not None:
                evaluate_step(job, run, step, asked)
                checked = True
                continue
            if finished:
                hand_over(run)
                log.info("%s has finished, and its checkpoints are evaluated%s", run_dir, _count(job))
            if finished or once:
                return job
            if not checked:
                check_tasks(run)  # now, and not when the first checkpoint is there
                checked = True
            _pause(job, changed, poll)


def asked_of(config: EvaluationConfig, run_dir: str | Path) -> dict[str, Any]:
    """What the scores depend on beside the checkpoint. Raises UserError where the run asks for no evaluation."""
    if not config.tasks or not config.every:
        raise UserError(
            f"{run_dir} asks for no evaluation: set evaluation.tasks and evaluation.every in its config.yaml"
        )
    return {name: getattr(config, name) for name in ("tasks", "limit", "data_dir", "likelihood", "draws")}


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """RUN_DIR/evaluation/ for this process. Raises UserError where another process has it, and keeps it."""
    (job.folder / "exports").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with open(job.folder / "lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process evaluates {job.run_dir} already; leave it to that one") from None
                time.sleep(0.1)
        yield


def _tidy(job: Job) -> None:
    """Do what a process that was killed has left to do."""
    for cut_off in (job.folder / "exports").glob("*.tmp"):
        shutil.rmtree(cut_off, ignore_errors=True)
    run = read_run(job.run_dir)
    asked = asked_of(run.config.evaluation, job.run_dir)
    scores = read_scores(job.run_dir)
    for step in exported_steps(job):
        if is_scored(scores.get(step), exported_id(job.exported(step)), asked):
            _remove_export(job, step)
    if scores:
        _write_table(run, scores, asked)


def _remove_export(job: Job, step: int) -> None:
    shutil.rmtree(job.exported(step))
    job.asked(step).unlink(missing_ok=True)


def _write_table(run: RunFolder, scores: dict[int, dict[str, Any]], asked: dict[str, Any]) -> None:
    """evaluation.md, without steps of before the run went back or began anew."""
    done = run.finished_steps[-1]["step"] if run.finished_steps else 0
    now = {step: found for step, found in scores.items() if step <= done}
    write_atomically(run.path / "evaluation.md", table(now, asked).encode())


def _changes(job: Job) -> int:
    """Another number when a checkpoint has come or gone."""
    folder = job.run_dir / "checkpoints"
    return folder.stat().st_mtime_ns if folder.exists() else 0


def _pause(job: Job, changed: int, poll: float) -> None:
    """For `poll` seconds, or until there is a change since `changed`."""
    deadline = time.monotonic() + poll
    while _changes(job) == changed and time.monotonic() < deadline:
        time.sleep(min(poll, PAUSE_SECONDS))


def _count(job: Job) -> str:
    found = [f"; {len(job.gone)} due before had been deleted"] if job.gone else []
    found += [f"; {len(job.failed)} could not be evaluated"] if job.failed else []
    return "".join(found)


def next_step(job: Job, run: RunFolder, finished: bool, asked: dict[str, Any]) -> int | None:
    """The newest step that is due and not evaluated. An export counts too, whose checkpoint may be deleted by now."""
    every = run.config.evaluation.every
    scores = read_scores(run.path)
    steps = checkpoint_steps(run.path)
    there = {step: exported_id(job.exported(step)) for step in exported_steps(job)}
    for step in due_steps(steps, every, finished):
        with suppress(FileNotFoundError):  # deleted since; the next look finds it missing
            there[step] = checkpoint_id(checkpoint_folder(run.path, step))
    missing = missing_steps(steps, every, run.config.checkpoint.every)
    report_gone(job.gone, "evaluated", every, [step for step in missing if step not in scores and step not in there])
    left = [step for step, own in there.items() if not is_scored(scores.get(step), own, asked)]
    left = sorted(step for step in left if step not in job.failed)
    if not left:
        return None
    older = [step for step in left[:-1] if step not in job.delayed]
    if older:
        job.delayed.update(older)
        log.info(
            "step %d goes before %d older: %s; they follow if training still has them then",
            left[-1], len(older), ", ".join(map(str, older)),
        )  # fmt: skip
    return left[-1]


def is_scored(found: dict[str, Any] | None, checkpoint: str, asked: dict[str, Any]) -> bool:
    """Whether an entry of scores.json is of this checkpoint and these settings."""
    return found is not None and found["checkpoint"] == checkpoint and found["asked"] == asked


def exported_steps(job: Job) -> list[int]:
    """The steps whose exports a process before has left."""
    return [int(folder.name.removeprefix("step_")) for folder in (job.folder / "exports").glob("step_*")]


def exported_id(folder: Path) -> str:
    """Of which checkpoint an export is; empty where it does not say."""
    return str(_trained(folder).get("checkpoint", ""))


def _trained(folder: Path) -> dict[str, Any]:
    """What config.json of an export says of its training: step, tokens, checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("diffusion", config.get("training", {}))


def evaluate_step(job: Job, run: RunFolder, step: int, asked: dict[str, Any]) -> None:
    """Export the checkpoint and evaluate it. What goes wrong is reported, and `job` has it.

    Raises UserError where tools.evaluate refuses the settings.
    """
    folder, output = job.exported(step), job.folder / f"step_{step}"
    try:
        if not _export(job, run, step, asked):
            return
        code, reason = evaluate_export(run, folder, output)
    except (UserError, OSError) as error:
        code, reason = 1, str(error)
    if code == 2:
        raise UserError(f"step {step} cannot be evaluated: {reason}")
    if code:
        job.failed.add(step)
        log.error("step %d could not be evaluated (%s); the next start tries again", step, reason or f"code {code}")
        return
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))["tasks"]
    trained = _trained(folder)
    found = {
        "checkpoint": trained["checkpoint"], "tokens": trained["tokens"], "asked": asked,
        "tasks": {
            name: {"score": r[r["metric"]], "stderr": r["stderr"], "metric": r["metric"], "n": r["n"]}
            for name, r in results.items()
        },
    }  # fmt: skip
    scores = read_scores(run.path) | {step: found}
    content = json.dumps({str(n): scores[n] for n in sorted(scores)}, indent=1) + "\n"
    write_atomically(job.folder / "scores.json", content.encode())
    _write_table(run, scores, asked)
    _remove_export(job, step)
    log.info("step %d is evaluated", step)


def _export(job: Job, run: RunFolder, step: int, asked: dict[str, Any]) -> bool:
    """Make the export, or keep the one of a process before; False where training deletes the checkpoint meanwhile."""
    folder, answers = job.exported(step), job.folder / f"step_{step}"
    stamp = job.asked(step)
    checkpoint = checkpoint_folder(job.run_dir, step)
    own = None
    with suppress(FileNotFoundError):
        own = checkpoint_id(checkpoint)
    kept = folder.exists() and own in (None, exported_id(folder))
    if not kept or not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != asked:
        shutil.rmtree(answers, ignore_errors=True)  # of another checkpoint, or of other settings
        write_atomically(stamp, json.dumps(asked).encode())
    if kept:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    try:
        export(job.run_dir, folder, step)
    except (UserError, OSError):
        if not disappears(checkpoint):
            raise
        report_gone(job.gone, "evaluated", run.config.evaluation.every, [step])
        return False
    return True


@resumable_command
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code, 1 where a step could not be evaluated."""
    parser = make_parser("python -m tools.evaluate_run", __doc__)
    parser.add_argument("run_dir", help="what `run_dir` is when training")
    parser.add_argument("--poll", type=float, default=POLL_SECONDS, metavar="S", help="seconds; default: %(default)g")
    parser.add_argument("--once", action="store_true", help="evaluate what is due now, and end")
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the trainer, which it does not outlive
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it at once: whatever it leaves, the next start goes on from
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # is for the trainer, which will end this process
    if args.parent:
        end_with_parent(signal.SIGTERM)
        if os.getppid() != args.parent:
            return 0
    os.nice(NICE)
    return 1 if evaluate_run(args.run_dir, args.poll, args.once).failed else 0


if __name__ == "__main__":
    sys.exit(main())
