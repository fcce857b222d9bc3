"""What a run tells: metrics.jsonl, wandb, a progress bar. Only rank 0 writes.

In: one dict of numbers a step. Out: RUN_DIR/metrics.jsonl, one JSON object a line.
"""

import json
import time
import uuid
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from .config import RunConfig

# What depends on the machine; everything else in metrics.jsonl is a function of configuration and data.
MACHINE = ("tokens_per_second", "tokens_per_second_per_gpu", "data_wait", "peak_memory_gib", "mfu")


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


class Telemetry:
    """Writes metrics; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, config: RunConfig, start: int, steps: int, enabled: bool):
        self.enabled, self._wandb = enabled, None
        if not enabled:
            return
        run_dir = Path(config.run_dir)
        path = run_dir / "metrics.jsonl"
        self._heartbeat = run_dir / "heartbeat"  # for watchdogs: the last step, and when it ended
        kept = [record for record in read_metrics(run_dir) if record["step"] <= start]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._bar = tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True)
        if config.wandb.mode != "disabled":
            import wandb

            marker = run_dir / "wandb_id"
            if not marker.exists():
                marker.write_text(uuid.uuid4().hex[:8])
            self._wandb = wandb.init(
                project=config.wandb.project,
                name=config.wandb.name or run_dir.name,
                id=marker.read_text(),
                resume="allow",
                mode=config.wandb.mode,
                dir=str(run_dir),
                config=asdict(config),
                settings=wandb.Settings(silent=True),
            )

    def log(self, record: dict) -> None:
        """One step. `record["step"]` counts finished steps."""
        if not self.enabled:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._heartbeat.write_text(json.dumps({"step": record["step"], "time": time.time()}))
        if self._wandb is not None:
            self._wandb.log(record, step=record["step"])
        if "loss" in record:
            self._bar.update(record["step"] - self._bar.n)
            self._bar.set_postfix_str(
                f"loss {record['loss']:.3f}, masked CE {record['masked_ce']:.3f}, lr {record['lr']:.1e}, "
                f"{record['tokens_per_second']:.0f} tokens/s"
            )

    def say(self, text: str) -> None:
        """A line for the person at the terminal, above the bar."""
        if self.enabled:
            tqdm.write(text)

    def close(self) -> None:
        if self.enabled:
            self._bar.close()
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish()
