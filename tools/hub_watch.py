"""Push a run's checkpoints to the Hub while it trains. Not a verb; `python -m tools.hub watch` runs it.

In: RUN_DIR, of which it only reads. Out: the revisions step_<n> and main of a repository; RUN_DIR/hub/ holds the export
in hand. What has been pushed is read from the Hub each time, so that it may be killed and started at any moment.
"""

import fcntl
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.log import log
from pretrain.runtime.checkpoint import checkpoint_id

from . import repository
from .export import export
from .repository import HubUnreachable
from .run_checkpoints import begun_run, checkpoint_steps, disappears, due_steps, is_finished, missing_steps, report_gone
from .run_folder import RunFolder, read_run

POLL_SECONDS = 60.0


@dataclass
class Watch:
    """What to push where, and what has been said already."""

    run_dir: Path
    repo_id: str
    every: int
    private: bool = False
    dtype: str = "auto"
    gone: set[int] = field(default_factory=set)  # due steps without a checkpoint, reported


def watch(
    run_dir: str | Path,
    repo_id: str,
    every: int,
    private: bool = False,
    dtype: str = "auto",
    poll: float = POLL_SECONDS,
    once: bool = False,
) -> None:
    """Push each checkpoint of a multiple of `every` steps, and the last; return when the run has finished.

    Looks every `poll` seconds; with `once`, a single time. The run may begin later. Raises UserError for what the
    user can fix, such as a token that may not write, and, only with `once`, HubUnreachable.
    """
    repository.check_repo_id(repo_id)
    if every < 1:
        raise UserError(f"--every is {every}, expected at least 1 step")
    if once:
        read_run(run_dir)
    if poll <= 0:
        raise UserError(f"--poll is {poll:g}, expected seconds above 0")
    job = Watch(Path(run_dir), repo_id, every, private, dtype)
    log.info("%s: checkpoints of every %d steps go to %s", run_dir, every, repo_id)
    prepared = begun = False
    with ExitStack() as held:
        while True:
            try:
                if not prepared:
                    repository.prepare(repo_id, private)
                    prepared = True
                run = begun_run(job.run_dir)
                if run and not begun:
                    held.enter_context(_alone(job.run_dir))
                    _warn_of_intervals(run, every)
                    begun = True
                if run and push_due(job, run):
                    log.info("%s has finished, and its last checkpoint is on the Hub%s", run_dir, _count_gone(job))
                    return
            except HubUnreachable as error:
                if once:
                    raise
                log.warning("%s; tried again in %g s", error, poll)
            if once:
                return
            time.sleep(poll)


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """RUN_DIR/hub/ for this process, empty. Raises UserError where another process has it."""
    exports = run_dir / "hub"
    exports.mkdir(exist_ok=True)
    with open(exports / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process pushes {run_dir} already; end it, or leave it to that one") from None
        for folder in exports.glob("step_*"):  # of a process that was killed
            shutil.rmtree(folder, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(exports, ignore_errors=True)


def _warn_of_intervals(run: RunFolder, every: int) -> None:
    saved = run.config.checkpoint.every
    if not saved:
        log.warning("checkpoint.every=0: the run is saved, and pushed, only at its end")
    elif every % saved:
        log.warning(
            "--every %d is no multiple of checkpoint.every=%d: there are pushes every %d steps",
            every, saved, math.lcm(every, saved),
        )  # fmt: skip


def _count_gone(job: Watch) -> str:
    return f"; {len(job.gone)} due before had been deleted" if job.gone else ""


def push_due(job: Watch, run: RunFolder) -> bool:
    """Push what is due and not on the Hub, oldest first; returns whether the run has finished, so that this was all.

    Raises HubUnreachable and UserError.
    """
    steps = checkpoint_steps(run.path)
    finished = is_finished(run, steps)
    due = due_steps(steps, job.every, finished)
    if not due:
        return finished
    branches = repository.revisions(job.repo_id)
    gone = missing_steps(steps, job.every, run.config.checkpoint.every)
    report_gone(job.gone, "pushed", job.every, [step for step in gone if f"step_{step}" not in branches])
    on_main = pushed(job.repo_id, branches.get("main"))
    for step in due:
        revision = f"step_{step}"
        try:
            own = (step, checkpoint_id(run.path / "checkpoints" / f"step_{step:08d}"))
        except FileNotFoundError:
            report_gone(job.gone, "pushed", job.every, [step])
            continue
        # the name is not enough: a branch begins as a copy of main, and its push may have been killed
        targets = [] if pushed(job.repo_id, branches.get(revision)) == own else [revision]
        if step == due[-1] and (on_main is None or step > on_main[0] or (step == on_main[0] and on_main != own)):
            targets.append("main")
        if targets and step not in job.gone:
            _export_and_push(job, step, targets)
    return finished


def pushed(repo_id: str, commit: str | None) -> tuple[int, str] | None:
    """(step, checkpoint) of the model in a commit; None where its config.json does not say, and for no commit."""
    config = repository.read_json(repo_id, "config.json", commit) if commit else {}
    said = config.get("diffusion", config.get("training")) if isinstance(config, dict) else None
    step = said.get("step") if isinstance(said, dict) else None
    return (step, str(said.get("checkpoint"))) if isinstance(step, int) and isinstance(said, dict) else None


def _export_and_push(job: Watch, step: int, targets: list[str]) -> None:
    """`targets` are revisions. A checkpoint that is deleted meanwhile is reported, and counts as gone."""
    folder = job.run_dir / "hub" / f"step_{step}"
    if not folder.exists():  # it does where the export was made and the Hub then did not answer
        try:
            export(job.run_dir, folder, step, job.dtype)
        except (UserError, OSError):
            if not disappears(job.run_dir / "checkpoints" / f"step_{step:08d}"):
                raise
            report_gone(job.gone, "pushed", job.every, [step])
            return
    for revision in targets:
        url = repository.push(folder, job.repo_id, revision, job.private, message=f"Step {step}")
        log.info("step %d is on the Hub as %s: %s", step, revision, url)
    shutil.rmtree(folder)
