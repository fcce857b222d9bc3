"""Is a run healthy? One line, and why not; the panel is drawn to RUN_DIR/health.png.

    python -m tools.health runs/diffugpt_s

Exit code 0: healthy, 1: not, 2: there is no such run.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from common.config import load_config
from common.errors import UserError
from pretrain import health
from pretrain.config import RunConfig, total_steps
from pretrain.telemetry import read_metrics

SILENT_STEPS = 20  # steps' time without one: it has ended, or hangs


def examine(run_dir: str | Path, output: str | Path | None = None) -> health.Health:
    """The verdict on a run folder, with its panel drawn. Raises UserError where there is no run."""
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    if not metrics or not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} holds no run: expected config.yaml and metrics.jsonl")
    config = load_config(RunConfig, run_dir / "config.yaml")
    done = [m for m in metrics if m["step"]]
    steps = config.train.steps
    if done:
        row = done[-1]["tokens"] // done[-1]["step"] // config.train.global_batch_size
        steps = total_steps(config, row)
    found = health.assess(metrics, steps, config.optimizer.warmup_steps)
    if done and done[-1]["step"] < steps and (run_dir / "heartbeat").exists():
        silent = time.time() - json.loads((run_dir / "heartbeat").read_text())["time"]
        usual = statistics.median(m["step_seconds"] for m in done if "step_seconds" in m)
        if silent > max(60.0, SILENT_STEPS * usual):
            found.facts.append(f"no step for {silent / 60:.0f} min: it has ended, or hangs")
    if done:
        health.panel(metrics, output or run_dir / "health.png", title=run_dir.name)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.health", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir")
    parser.add_argument("--output", help="PNG; default: RUN_DIR/health.png")
    args = parser.parse_args(argv)
    try:
        found = examine(args.run_dir, args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.run_dir}: {found}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
