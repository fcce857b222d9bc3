"""Figures of runs.

python -m tools.figures loss runs/demo                       # runs/demo/loss.png
python -m tools.figures loss runs/a runs/b --output both.png
"""

import argparse
import sys
from pathlib import Path

from common.errors import UserError
from pretrain.telemetry import read_metrics

WINDOW = 20  # steps that the running mean spans; fewer in short runs


def loss_figure(run_dirs: list[str | Path], output: str | Path) -> Path:
    """Masked cross-entropy over tokens, held-out points, and the annealing schedule. Raises UserError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )  # fmt: skip
    for number, run_dir in enumerate(run_dirs):
        metrics = read_metrics(run_dir)
        steps = [m for m in metrics if m.get("loss") is not None]  # null where it was not finite
        if not steps:
            raise UserError(f"{run_dir} has no finished step in metrics.jsonl")
        colour, name = f"C{number}", Path(run_dir).name
        tokens, values = [m["tokens"] for m in steps], [m["masked_ce"] for m in steps]
        window = max(1, min(WINDOW, len(values) // 8))
        mean = [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        top.plot(tokens, values, color=colour, alpha=0.25, linewidth=1)
        top.plot(tokens, mean, color=colour, label=f"{name}: training, mean of {window} steps")
        for key, style in _held_out(metrics):
            points = [(m["tokens"], m[key]) for m in metrics if key in m]
            label = "held out" if key == "val_masked_ce" else f"held out, t = {key.removeprefix('val_masked_ce_t')}"
            top.plot(*zip(*points), style, color=colour, markersize=5, linewidth=0.8, label=f"{name}: {label}")
        bottom.plot(tokens, [m["anneal_ratio"] for m in steps], color=colour)
    top.set_ylabel("cross-entropy at masked tokens (nats)")
    top.legend(fontsize=8)
    bottom.set_ylabel("future visible")
    bottom.set_ylim(-0.05, 1.05)
    bottom.set_xlabel("tokens")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(output, dpi=130)
    plt.close(figure)
    return Path(output)


def _held_out(metrics: list[dict]) -> list[tuple[str, str]]:
    keys = sorted({key for m in metrics for key in m if key.startswith("val_masked_ce") and "_to_t" not in key})
    return list(zip(keys, ("o-", "s--", "^--", "v--", "d--", "x--", "+--")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    loss = verbs.add_parser("loss", help="loss over tokens and the annealing schedule, of one or several runs")
    loss.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    loss.add_argument("--output", help="PNG; default: RUN_DIR/loss.png of the first run")
    args = parser.parse_args(argv)
    try:
        print(loss_figure(args.run_dirs, args.output or Path(args.run_dirs[0]) / "loss.png"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
