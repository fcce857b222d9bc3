"""What a run does when its numbers go wrong, and when it hangs.

In: the metrics of each step. Out: a decision that is the same on all ranks, since the metrics are; lines in
RUN_DIR/incidents.jsonl that say which samples were in the batch; stacks of a run that hangs.
"""

import faulthandler
import json
import os
import statistics
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .config import GuardConfig
from .diffusion import BUCKETS

STALLED = 70  # exit code of a rank that waited longer than guards.stall_minutes
HISTORY = 64  # steps that a spike is measured against
ENOUGH = 16  # steps of history without which there is no spike


@dataclass
class Guard:
    """Decides after each step; `state` goes into checkpoints, so that a resumed run decides alike."""

    config: GuardConfig
    skipped: int = 0  # steps, of the whole run
    in_a_row: int = 0
    rollbacks: int = 0
    left_out: list[list[int]] = field(default_factory=list)  # [first, last] batches that a roll-back passes over
    history: list[dict[str, float]] = field(default_factory=list)  # masked CE by bucket of t, of calm steps
    above: int = 0  # steps in a row that were too high

    @classmethod
    def restored(cls, config: GuardConfig, state: dict | None) -> "Guard":
        return cls(config, **(state or {}))

    def state(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "config"}

    @property
    def calm(self) -> bool:
        """Whether the last steps give no reason against a checkpoint."""
        return self.in_a_row == 0 and self.above == 0

    def batch(self, step: int) -> int:
        """The batch of optimizer step `step`: the step itself, past those left out."""
        for first, last in self.left_out:  # sorted, disjoint
            if step >= first:
                step += last - first + 1
        return step

    def leave_out(self, first: int, last: int) -> None:
        """Pass over batches `first` to `last` from now on."""
        self.left_out = sorted([*self.left_out, [first, last]])
        self.rollbacks += 1
        self.history, self.above = [], 0

    def judge(self, metrics: dict) -> str:
        """ "ok", "skipped" (no update was made), "stop" (too many of those in a row) or "spike"."""
        if metrics["update_skipped"]:
            self.skipped += 1
            self.in_a_row += 1
            return "stop" if self.in_a_row >= self.config.max_skipped_in_a_row else "skipped"
        self.in_a_row = 0
        losses = {key: value for key, value in metrics.items() if key.startswith("masked_ce_to_t")}
        if self.config.spike_factor and excess(losses, self.history) > self.config.spike_factor:
            self.above += 1
            if self.above < self.config.spike_steps:
                return "ok"
            self.above, self.history = 0, []
            return "spike"
        self.above = 0
        self.history = [*self.history[1 - HISTORY :], losses]
        return "ok"


def excess(losses: dict[str, float], history: list[dict[str, float]]) -> float:
    """How far a step's losses by bucket of t lie above the medians of `history`, in robust standard deviations.

    By bucket, because the loss over all t rises and falls with the t that were drawn. 0 without enough history.
    """
    if len(history) < ENOUGH:
        return 0.0
    keys = [f"masked_ce_to_t{edge:g}" for edge in BUCKETS]
    medians = {key: statistics.median(known) for key in keys if (known := [h[key] for h in history if key in h])}

    def above(step: dict[str, float]) -> float:
        return statistics.fmean([step[key] - medians[key] for key in medians if key in step] or [0.0])

    spread = 1.4826 * statistics.median(abs(above(step)) for step in history)
    return above(losses) / max(spread, 1e-9)


def write_incident(run_dir: str | Path, kind: str, step: int, batches: list[int], samples: list[dict]) -> None:
    """One line of RUN_DIR/incidents.jsonl: what was seen after `step` steps, and every sample of `batches`."""
    line = {"kind": kind, "step": step, "batches": batches, "time": time.time(), "samples": samples}
    with open(Path(run_dir) / "incidents.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@dataclass
class Place:
    """Where a rank stands."""

    step: int
    phase: str  # "data", "forward 2 of 4", "update", "validation", "checkpoint", …
    since: float  # unix time


class Watchdog(threading.Thread):
    """Ends a run that hangs, and says where each rank stood.

    A collective that one rank does not enter stops all others without a word. Each rank's thread keeps
    RUN_DIR/ranks/00000.json up to date. After `minutes` in one phase it writes the Python stacks beside it,
    prints who is behind, and leaves with STALLED, so that the launcher ends the job. 0 minutes: off.
    """

    def __init__(self, run_dir: str | Path, rank: int, world: int, minutes: float):
        super().__init__(daemon=True, name="watchdog")
        self.folder, self.rank, self.world, self.limit = Path(run_dir) / "ranks", rank, world, minutes * 60
        self.place = Place(0, "start", time.time())
        self._ended = threading.Event()
        if self.limit:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.start()

    def at(self, step: int, phase: str) -> None:
        self.place = Place(step, phase, time.time())

    def close(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(min(10.0, self.limit / 4)):
            mine = self.folder / f"{self.rank:05d}.json"
            temporary = mine.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(self.place)))
            os.replace(temporary, mine)
            if time.time() - self.place.since > self.limit:
                with open(mine.with_suffix(".stacks"), "w") as file:
                    faulthandler.dump_traceback(file)
                print(self.report(), flush=True)
                os._exit(STALLED)

    def report(self) -> str:
        """One line a rank, the ones that are furthest behind first."""
        places = []
        for rank in range(self.world):
            try:
                place = Place(**json.loads((self.folder / f"{rank:05d}.json").read_text()))
            except (OSError, ValueError, TypeError):
                place = Place(-1, "unknown", 0.0)
            places.append((place.step, place.since, rank, place))
        lines = [
            f"  rank {rank}: "
            + ("not heard of" if step < 0 else f"step {step}, {place.phase}, for {time.time() - since:.0f} s")
            for step, since, rank, place in sorted(places, key=lambda p: p[:3])
        ]
        return "\n".join([
            f"error: rank {self.rank} of {self.world} has waited {time.time() - self.place.since:.0f} s in step "
            f"{self.place.step}, {self.place.phase}, and leaves; the Python stacks are in {self.folder}/*.stacks",
            *lines,
        ])  # fmt: skip
