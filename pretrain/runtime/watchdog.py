"""Ends a run that hangs, and says where each rank stood."""

import contextlib
import faulthandler
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

STALLED = 70  # exit code of a rank that waited longer than guards.stall_minutes


@dataclass
class Place:
    """Where a rank stands."""

    step: int
    phase: str  # "data", "forward 2 of 4", "update", "validation", "checkpoint", …
    since: float  # unix time


class Watchdog(threading.Thread):
    """If one rank misses a collective, the others block silently. This thread ends them, with a report.

    Each rank's thread keeps RUN_DIR/ranks/00000.json up to date. After `minutes` in one phase it writes the Python
    stacks beside it, prints where every rank stands, and exits with STALLED, so that the launcher ends the job.
    0 minutes: off.
    """

    def __init__(self, run_dir: str | Path, rank: int, world_size: int, minutes: float):
        super().__init__(daemon=True, name="watchdog")
        self.folder = Path(run_dir) / "ranks"
        self.rank = rank
        self.world_size = world_size
        self.limit = minutes * 60  # seconds
        self.place = Place(0, "start", time.time())
        self._ended = threading.Event()
        if self.limit:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.start()

    def at(self, step: int, phase: str) -> None:
        """The rank has come to a phase of a step."""
        self.place = Place(step, phase, time.time())

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def run(self) -> None:
        """The thread: write the rank's place, wait, and look at how old it is."""
        mine = self.folder / f"{self.rank:05d}.json"
        while True:
            with contextlib.suppress(OSError):  # a full disk must not end the watching
                temporary = mine.with_suffix(".tmp")
                temporary.write_text(json.dumps(asdict(self.place)))
                os.replace(temporary, mine)
            if time.time() - self.place.since > self.limit:
                with contextlib.suppress(OSError), open(mine.with_suffix(".stacks"), "w") as file:
                    faulthandler.dump_traceback(file)
                print(self.report(), flush=True)  # every rank's, so not through the log of rank 0
                os._exit(STALLED)
            if self._ended.wait(min(10.0, self.limit / 4)):
                return

    def report(self) -> str:
        """One line a rank, the ones that are furthest behind first."""
        places = []
        for rank in range(self.world_size):
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
        waited = time.time() - self.place.since
        return "\n".join([
            f"error: rank {self.rank} of {self.world_size} has waited {waited:.0f} s in step {self.place.step}, "
            f"{self.place.phase}, and exits; the Python stacks are in {self.folder}/*.stacks",
            *lines,
        ])  # fmt: skip
