"""Evaluation beside training: the process that does it, and its scores on their way into the run's metrics.

    RUN_DIR/evaluation/scores.json     the scores so far, by step; `python -m tools.evaluate_run` writes it
    RUN_DIR/evaluation/log.txt         what that process printed, where the trainer started it
    RUN_DIR/evaluation/metrics.lock    locked by whoever adds scores to metrics.jsonl: the trainer, while there is one

A score goes into the line of the step whose checkpoint it is of, whenever it comes. The trainer looks for new scores
with one `stat` a second; whatever goes wrong with the evaluation, training goes on.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.log import log

from ..config import RunConfig
from .checkpoint import checkpoint_id
from .metrics import EVALUATED, MetricLogger

MODULE = "tools.evaluate_run"  # by name: this package knows no tools
LOOK_SECONDS = 1.0  # between two looks at scores.json
END_SECONDS = 10.0  # that the process gets to end when it is asked to
LOCK_SECONDS = 10.0  # in which another process is done with metrics.jsonl
FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError)  # of a disk, or of a scores.json that is not ours
# What a launcher tells a rank; the evaluating process is none.
LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def checkpoint_folder(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or was."""
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def read_scores(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """scores.json: by step {"checkpoint": its id, "tokens": …, "tasks": {name: {"score", "stderr", "metric"}}, …}."""
    try:
        content = json.loads((Path(run_dir) / "evaluation" / "scores.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {int(step): found for step, found in content.items()}


def as_metrics(found: dict[str, Any]) -> dict[str, Any]:
    """What goes into the line of a step: the main metric of each task."""
    return {f"{EVALUATED}{task}": result["score"] for task, result in found["tasks"].items()}


def lock_metrics(run_dir: str | Path) -> Any:
    """The right to add scores to metrics.jsonl, as an open file to be closed; None while another process has it."""
    file = open(Path(run_dir) / "evaluation" / "metrics.lock", "w")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class Evaluation:
    """The evaluating process of a run, and what it has found. Does nothing unless it is `enabled` and asked for."""

    def __init__(self, config: RunConfig, metrics: MetricLogger, done: int, enabled: bool):
        self.config = config.evaluation
        self.enabled = enabled and bool(config.evaluation.tasks)
        self.folder = Path(config.run_dir) / "evaluation"
        self.log_path = self.folder / "log.txt"
        self._run_dir = config.run_dir
        self._metrics = metrics
        self._process: subprocess.Popen | None = None
        self._log_begins = 0  # byte of log.txt where this process' part begins
        self._lock: Any = None
        self._looked = -float("inf")
        self._seen: Any = None  # what scores.json was at the last look
        self._done = done
        self._taken: dict[int, dict] = {}  # scores that are in metrics.jsonl
        self._doubtful: set[tuple[int, str]] = set()  # (step, checkpoint) of scores from before the run went back
        if self.enabled:
            self.folder.mkdir(exist_ok=True)
            self.rewind(done)

    def rewind(self, done: int) -> None:
        """The run goes on from step `done`. Scores of later steps count only if the same checkpoint is made again."""
        if not self.enabled:
            return
        self._done = done
        self._seen = None
        self._taken = {step: found for step, found in self._taken.items() if step <= done}
        with suppress(*FAULTS):
            scores = read_scores(self._run_dir)
            self._doubtful |= {(step, found["checkpoint"]) for step, found in scores.items() if step > done}

    def start(self) -> None:
        """Take over the scores that came while no trainer ran; start the process unless another job is it."""
        if not self.enabled:
            return
        deadline = time.monotonic() + LOCK_SECONDS
        while self._lock is None and time.monotonic() < deadline:
            self._lock = lock_metrics(self._run_dir)
            if self._lock is None:
                time.sleep(0.1)
        self._take_over()
        if not self.config.launch:
            return
        root = str(Path(__file__).resolve().parents[2])
        command = [sys.executable, "-m", MODULE, self._run_dir, "--parent", str(os.getpid())]
        try:
            with open(self.log_path, "ab") as output:
                self._log_begins = output.tell()
                self._process = subprocess.Popen(
                    command, env=environment(root, self.config.device), stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            log.warning("the evaluating process cannot be started (%s); training goes on", error)
            return
        log.info("%s is evaluated every %d steps: %s", self._run_dir, self.config.every, self.log_path)

    def look(self, done: int, stopping: bool = False) -> None:
        """Take over what is new, at most once a second; say so where the process has failed, unless `stopping`.

        `done` steps have their lines.
        """
        self._done = done
        if not self.enabled or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self._take_over()
        code = self._process.poll() if self._process else None
        if code is not None:
            self._process = None
            if code and not stopping:
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                log.warning(
                    "the evaluating process %s; training goes on without it, see %s%s", how, self.log_path, self._why()
                )

    def _why(self) -> str:
        """The last error in its log, to be put in brackets behind a sentence."""
        with suppress(OSError):
            lines = self.log_path.read_bytes()[self._log_begins :].decode(errors="replace").splitlines()
            found = [line for line in lines if line.startswith("error:")]
            return f" ({found[-1]})" if found else ""
        return ""

    def _take_over(self) -> None:
        """New scores into the lines of their steps."""
        with suppress(*FAULTS):  # the next look may do better
            status = os.stat(self.folder / "scores.json")
            seen = (status.st_mtime_ns, status.st_ino)
            if seen == self._seen and not self._doubtful:
                return
            scores = read_scores(self._run_dir)
            new = {n: found for n, found in scores.items() if self._taken.get(n) != found and self._counts(n, found)}
            if new:
                added = self._metrics.add({step: as_metrics(found) for step, found in new.items()})
                for step, values in sorted(added.items()):
                    log.info("step %d evaluated: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
            self._taken |= new
            self._seen = seen

    def _counts(self, step: int, found: dict[str, Any]) -> bool:
        """False for a score of a checkpoint from before this run went back, unless the same one is there again."""
        which = (step, found["checkpoint"])
        if step > self._done:
            return False
        folder = checkpoint_folder(self._run_dir, step)
        if which in self._doubtful and folder.exists() and checkpoint_id(folder) == which[1]:
            self._doubtful.discard(which)
        return which not in self._doubtful

    def wait(self, stop: Callable[[], int]) -> None:
        """At the end of a finished run, until all is evaluated; at most wait_minutes, and not beyond a `stop`."""
        if self._process is None:
            return
        minutes = self.config.wait_minutes
        if minutes and self._process.poll() is None:
            log.info("training is done; waiting up to %g minutes for the evaluation of the last checkpoints", minutes)
        deadline = time.monotonic() + minutes * 60
        while self._process is not None and self._process.poll() is None:
            if stop() or time.monotonic() > deadline:
                log.warning(
                    "checkpoints are left to evaluate; this does the rest: python -m %s %s", MODULE, self._run_dir
                )
                return
            time.sleep(0.1)
            self.look(self._done)
        self._looked = -float("inf")
        self.look(self._done)

    @property
    def running(self) -> bool:
        """Whether there is a process to wait for."""
        return self._process is not None

    def close(self) -> None:
        """End the process, and leave metrics.jsonl to others."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            if process.poll() is None:
                process.kill()
                process.wait()
        if self.enabled:
            self._take_over()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def environment(root: str, device: str) -> dict[str, str]:
    """For a process that is no rank of this run, and that finds the project at `root`."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith("TORCHELASTIC_")}
    kept["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])])
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
