"""Decides after each step whether its numbers are sound.

In: the metrics of a step. Out: a decision that is the same on all ranks, since the metrics are; lines in
RUN_DIR/incidents.jsonl that say which rows were in the batch.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..config import GuardConfig

HISTORY = 64  # steps that a spike is measured against
MIN_HISTORY = 16  # with fewer steps there is no spike


@dataclass
class Guard:
    """`state()` goes into checkpoints, so that a resumed run decides alike.

    `compared` names the losses in which spikes are looked for, each against its own history.
    """

    config: GuardConfig
    compared: tuple[str, ...]
    skipped: int = 0  # steps, of the whole run
    in_a_row: int = 0
    rollbacks: int = 0
    left_out: list[list[int]] = field(default_factory=list)  # [first, last] batches that a rollback passes over
    history: list[dict[str, float]] = field(default_factory=list)  # the compared losses of recent stable steps
    above: int = 0  # steps in a row that were too high

    @classmethod
    def restored(cls, config: GuardConfig, compared: tuple[str, ...], state: dict | None) -> "Guard":
        """A guard as `state()` described it; a new one for None."""
        return cls(config, compared, **(state or {}))

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {key: value for key, value in vars(self).items() if key not in ("config", "compared")}

    @property
    def stable(self) -> bool:
        """True when no recent step was skipped or spiking."""
        return self.in_a_row == 0 and self.above == 0

    def batch(self, step: int) -> int:
        """The batch of optimizer step `step`: the step itself, past those left out."""
        for first, last in self.left_out:  # sorted, disjoint
            if step >= first:
                step += last - first + 1
        return step

    def skip_batches(self, first: int, last: int) -> None:
        """Pass over batches `first` to `last` from now on."""
        merged: list[list[int]] = []
        for begin, end in sorted([*self.left_out, [first, last]]):
            if merged and begin <= merged[-1][1] + 1:  # a later spike may span what was left out before
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([begin, end])
        self.left_out = merged
        self.rollbacks += 1
        self.history = []
        self.above = 0

    def check(self, metrics: dict) -> str:
        """ "ok", "skipped" (no update was made), "stop" (too many of those in a row) or "spike"."""
        if metrics["update_skipped"]:
            self.skipped += 1
            self.in_a_row += 1
            return "stop" if self.in_a_row >= self.config.max_skipped_in_a_row else "skipped"
        self.in_a_row = 0
        losses = {key: metrics[key] for key in self.compared if key in metrics}
        if self.config.spike_factor and self.excess(losses) > self.config.spike_factor:
            self.above += 1
            if self.above < self.config.spike_steps:
                return "ok"
            self.above = 0
            self.history = []
            return "spike"
        self.above = 0
        self.history = [*self.history[1 - HISTORY :], losses]
        return "ok"

    def excess(self, losses: dict[str, float]) -> float:
        """How far a step's losses lie above the medians of the history, in robust standard deviations.

        Each loss is compared with its own history, because some of them are naturally larger. 0 without enough
        history.
        """
        if len(self.history) < MIN_HISTORY:
            return 0.0
        known = {key: [h[key] for h in self.history if key in h] for key in self.compared}
        medians = {key: statistics.median(values) for key, values in known.items() if values}

        def above(step: dict[str, float]) -> float:
            return statistics.fmean([step[key] - medians[key] for key in medians if key in step] or [0.0])

        spread = 1.4826 * statistics.median(abs(above(step)) for step in self.history)
        return above(losses) / max(spread, 1e-9)


def write_incident(run_dir: str | Path, kind: str, step: int, batches: list[int], samples: list[dict]) -> None:
    """One line of RUN_DIR/incidents.jsonl: what was seen after `step` steps, and every row of `batches`."""
    line = {"kind": kind, "step": step, "batches": batches, "time": time.time(), "samples": samples}
    with open(Path(run_dir) / "incidents.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
