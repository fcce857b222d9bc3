"""A run's folder, as the tools that look at runs read it. Not a verb."""

from dataclasses import dataclass
from pathlib import Path

from common.config import load_config
from common.errors import UserError
from pretrain.config import RunConfig
from pretrain.objectives import OBJECTIVES
from pretrain.runtime.metrics import read_metrics
from pretrain.step import Reported


@dataclass
class RunFolder:
    """What a run was asked to do, and what it has reported so far."""

    path: Path
    config: RunConfig
    metrics: list[dict]  # the lines of metrics.jsonl
    reported: Reported  # the names of its losses

    @property
    def finished_steps(self) -> list[dict]:
        """The lines of training steps: all but the validation at step 0."""
        return [m for m in self.metrics if m["step"]]


def read_run(path: str | Path) -> RunFolder:
    """Read RUN_DIR/config.yaml and RUN_DIR/metrics.jsonl. Raises UserError where there is no configuration."""
    path = Path(path)
    if not (path / "config.yaml").exists():
        raise UserError(f"{path} holds no run: config.yaml not found; expected a run_dir of pretrain/main.py")
    config = load_config(RunConfig, path / "config.yaml")
    return RunFolder(path, config, read_metrics(path), OBJECTIVES[config.objective].reported)
