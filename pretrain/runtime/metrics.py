"""What a run tells while it trains: metrics.jsonl, wandb, a progress bar. Only rank 0 writes.

In: one dict of numbers a step. Out: RUN_DIR/metrics.jsonl, one JSON object a line.
"""

import json
import math
import os
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.files import write_atomically

from ..config import RunConfig

# What depends on the machine; everything else in metrics.jsonl is a function of configuration and data.
MACHINE = (
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "step_seconds",
    "data_wait",
    "peak_memory_gib",
    "mfu",
    "time",
    "goodput",
)

EVALUATED = "eval_"  # keys of evaluations begin so; they are added to a step's line when they are known

SHOWN = (  # beside the bar
    ("loss", "loss", ".3f"),
    ("masked CE", "masked_ce", ".3f"),
    ("lr", "lr", ".1e"),
    ("tokens/s", "tokens_per_second", ".0f"),
)
LAUNCHED = time.time()  # of this process


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line that was cut off by a kill is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise
    return records


def reproducible(record: dict) -> dict:
    """A line of metrics.jsonl without what depends on the machine, or on how soon a checkpoint was evaluated."""
    return {k: v for k, v in record.items() if k not in MACHINE and not k.startswith(EVALUATED)}


def amend(run_dir: str | Path, values: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Add `values`, by step, to the lines of metrics.jsonl; returns what was not there before.

    A step without a line is left out. The file is replaced: who has it open must open it again.
    """
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    begins = {f'{{"step": {step},'.encode(): step for step in values}
    new = {}
    for number, line in enumerate(lines):
        step = begins.get(line[: line.find(b",") + 1])
        if step is None:
            continue
        record = json.loads(line)
        changed = {k: v for k, v in values[step].items() if k not in record or record[k] != v}
        if changed:
            lines[number] = (json.dumps(record | changed) + "\n").encode()
            new[step] = changed
    if new:
        write_atomically(path, b"".join(lines))
    return new


def start_wandb(config: RunConfig) -> Any:
    """The run in wandb, begun or gone on with; its id is in RUN_DIR/wandb_id."""
    import wandb

    run_dir = Path(config.run_dir)
    marker = run_dir / "wandb_id"
    if not marker.exists():
        marker.write_text(uuid.uuid4().hex[:8])
    run = wandb.init(
        project=config.wandb.project,
        name=config.wandb.name or run_dir.name,
        id=marker.read_text(),
        resume="allow",
        mode=config.wandb.mode,
        dir=str(run_dir),
        config=asdict(config),
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("*", step_metric="step")  # wandb's own step cannot go back
    return run


class MetricLogger:
    """Writes metrics; a resumed run first drops the lines after its checkpoint. Does nothing when not `enabled`."""

    def __init__(self, config: RunConfig, start: int, steps: int, enabled: bool):
        self.enabled = enabled
        self._wandb: Any = None
        self._file: Any = None
        if not enabled:
            return
        self._run_dir = Path(config.run_dir)
        self._heartbeat = self._run_dir / "heartbeat"  # for other programs: the last step, and when it ended
        before = read_metrics(self._run_dir)
        self._launched = before[0].get("time", LAUNCHED) if before else LAUNCHED  # the run's first launch
        self._bar = tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True)
        self._keep(start or -1)  # a run that begins anew also writes step 0 anew
        if config.wandb.mode != "disabled":
            self._wandb = start_wandb(config)

    def _keep(self, step: int) -> None:
        """Leave out the lines after `step`."""
        if self._file:
            self._file.close()
        kept = [record for record in read_metrics(self._run_dir) if record["step"] <= step]
        path = self._run_dir / "metrics.jsonl"
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._useful = sum(record.get("step_seconds", 0.0) for record in kept)

    def rewind(self, step: int) -> None:
        """The run goes on from `step` again."""
        if self.enabled:
            self._keep(step)
            self._bar.n = step
            self._bar.refresh()

    def log(self, record: dict) -> None:
        """One step. `record["step"]` counts finished steps. A value that is not finite is written as null."""
        if not self.enabled:
            return
        now = time.time()
        if record["step"] == 0:
            record = {**record, "time": self._launched}  # goodput counts from here
        else:
            self._useful += record["step_seconds"]
            record = {**record, "time": now, "goodput": self._useful / (now - self._launched)}
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        beat = self._heartbeat.with_suffix(".tmp")
        beat.write_text(json.dumps({"step": record["step"], "time": now}))
        os.replace(beat, self._heartbeat)  # whoever reads it finds a complete one
        if self._wandb is not None:
            self._wandb.log(record)
        if record["step"]:
            self._bar.update(record["step"] - self._bar.n)
            shown = [f"{label} {record[key]:{form}}" for label, key, form in SHOWN if record.get(key) is not None]
            self._bar.set_postfix_str(", ".join(shown))

    def add(self, values: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """As `amend`, also to wandb."""
        self._file.close()
        try:
            new = amend(self._run_dir, values)
        finally:
            self._file = open(self._run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        if self._wandb is not None:
            for step, found in new.items():
                self._wandb.log({"step": step, **found})
        return new

    def close(self) -> None:
        """The end of all files."""
        if self.enabled:
            self._bar.close()
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish()
