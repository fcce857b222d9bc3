"""The checkpoints of a run, as the tools that follow a run look at them: which are there, due, gone. Not a verb."""

import math
import time
from pathlib import Path

from common.log import log

from .health import planned_steps, silent_seconds
from .run_folder import RunFolder, read_run

DELETION_SECONDS = 30.0  # in which training is done with deleting a checkpoint


def begun_run(run_dir: Path) -> RunFolder | None:
    """The run as it stands; None before its configuration is written."""
    return read_run(run_dir) if (run_dir / "config.yaml").exists() else None


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints on disk, rising."""
    names = [folder.name for folder in (run_dir / "checkpoints").glob("step_*")]
    return sorted(int(name.removeprefix("step_")) for name in names if "." not in name)


def is_finished(run: RunFolder, steps: list[int]) -> bool:
    """Whether the run has come to its end. `steps` are those of its checkpoints.

    A run whose last checkpoint did not fit on the disk has finished when it is silent after the last step.
    """
    done = run.finished_steps[-1]["step"] if run.finished_steps else 0
    if not done or done < planned_steps(run):
        return False
    saving = any((run.path / "checkpoints").glob("step_*.tmp"))
    return done in steps or (not saving and silent_seconds(run) > 0)


def due_steps(steps: list[int], every: int, finished: bool) -> list[int]:
    """Of rising `steps` the multiples of `every`; the last too, where the run has finished."""
    return [step for step in steps if step % every == 0 or (finished and step == steps[-1])]


def missing_steps(steps: list[int], every: int, saved_every: int) -> list[int]:
    """Due steps before the newest checkpoint which training should have saved (0: at the end alone), and are not there.

    Training has deleted them, or left them out in a spike or for lack of room.
    """
    if not steps or not saved_every:
        return []
    interval = math.lcm(every, saved_every)
    return [step for step in range(interval, steps[-1], interval) if step not in steps]


def disappears(checkpoint: Path) -> bool:
    """Whether training is deleting it: waits until the folder is gone, or for so long that it will stay."""
    deadline = time.monotonic() + DELETION_SECONDS
    while checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not checkpoint.exists()


def report_gone(known: set[int], done: str, every: int, steps: list[int]) -> None:
    """One line for those `steps` without a checkpoint that are not `known`, and add them.

    `done` is what would have been done with each; every so many steps one is due.
    """
    new = [step for step in steps if step not in known]
    if not new:
        return
    known.update(new)
    which = f"step {new[0]} is" if len(new) == 1 else f"{len(new)} steps, {new[0]} to {new[-1]}, are"
    log.warning(
        "%s not %s: no checkpoint any more (%d in all); raise checkpoint.keep, or set checkpoint.keep_every=%d",
        which, done, len(known), every,
    )  # fmt: skip
