"""Figures of runs.

python -m tools.figures loss runs/demo                       # runs/demo/loss.png
python -m tools.figures loss runs/a runs/b --output both.png
"""

import sys
from pathlib import Path
from typing import Any

from common.cli import command, make_parser
from common.errors import UserError

from .run_folder import RunFolder, read_run

WINDOW = 20  # steps of the running mean; fewer in short runs
STYLES = ("o-", "s--", "^--", "v--", "d--", "x--", "+--")  # of held-out losses


def loss_figure(run_dirs: list[str | Path], output: str | Path) -> Path:
    """Draw training and held-out losses over tokens and, where it was annealed, how much of the future is visible.

    Raises UserError for a run without a finished step and for runs of different objectives.
    """
    return draw_runs([read_run(run_dir) for run_dir in run_dirs], output)


def draw_runs(runs: list[RunFolder], output: str | Path) -> Path:
    """As `loss_figure`, of runs that have been read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    check_comparable(runs)
    annealed = any("anneal_ratio" in m for run in runs for m in run.metrics)
    figure, axes = plt.subplots(
        1 + annealed, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1][: 1 + annealed], layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for number, run in enumerate(runs):
        draw_losses(axes[0, 0], run, colour=f"C{number}")
        if annealed:
            draw_annealing(axes[1, 0], run, colour=f"C{number}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set_xlabel("tokens")
    figure.savefig(output, dpi=130)
    plt.close(figure)
    return Path(output)


def check_comparable(runs: list[RunFolder]) -> None:
    """Raise UserError for a run without a finished step and for runs whose losses mean different things."""
    for run in runs:
        if not _steps_with_loss(run):
            raise UserError(f"{run.path} has no finished step in metrics.jsonl")
        if run.config.objective != runs[0].config.objective:
            raise UserError(
                f"{runs[0].path} has objective {runs[0].config.objective}, {run.path} has {run.config.objective}; "
                "their losses cannot be compared: draw a figure for each"
            )


def draw_losses(axis: Any, run: RunFolder, colour: str) -> None:
    """The training loss and its running mean, and held-out losses, in nats."""
    steps = _steps_with_loss(run)
    tokens = [m["tokens"] for m in steps]
    values = [m[run.reported.training] for m in steps]
    window = max(1, min(WINDOW, len(values) // 8))
    mean = [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    axis.plot(tokens, values, color=colour, alpha=0.25, linewidth=1)
    axis.plot(tokens, mean, color=colour, label=f"{run.path.name}: training, mean of {window} steps")
    for name, style in zip(_held_out_names(run), STYLES):
        points = [(m["tokens"], m[name]) for m in run.metrics if m.get(name) is not None]
        time = name.removeprefix(run.reported.held_out).removeprefix("_t")
        label = f"{run.path.name}: held out" + (f", t = {time}" if time else "")
        axis.plot(*zip(*points), style, color=colour, markersize=5, linewidth=0.8, label=label)
    axis.set_ylabel("cross-entropy at masked tokens (nats)" if run.reported.base else "cross-entropy (nats)")


def draw_annealing(axis: Any, run: RunFolder, colour: str) -> None:
    """The share of the future that is visible, from 0 (causal) to 1 (bidirectional)."""
    points = [(m["tokens"], m["anneal_ratio"]) for m in run.metrics if m.get("anneal_ratio") is not None]
    if points:
        axis.plot(*zip(*points), color=colour)
    axis.set_ylabel("future visible")
    axis.set_ylim(-0.05, 1.05)


def _steps_with_loss(run: RunFolder) -> list[dict]:
    """Finished steps without those whose loss was not finite, which metrics.jsonl has as null."""
    return [m for m in run.finished_steps if m.get(run.reported.training) is not None]


def _held_out_names(run: RunFolder) -> list[str]:
    """The held-out loss and, of a diffusion run, those at fixed times; not those by bucket of t."""
    names = {name for m in run.metrics for name, value in m.items() if value is not None}
    return sorted(name for name in names if name.startswith(run.reported.held_out) and "_to_t" not in name)


@command
def main(argv: list[str] | None = None) -> int:
    """Draw a figure and print its path; returns the exit code."""
    parser = make_parser("python -m tools.figures", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    loss = verbs.add_parser("loss", help="losses over tokens and the annealing schedule, of one or several runs")
    loss.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    loss.add_argument("--output", metavar="PNG", help="default: loss.png in the first RUN_DIR")
    args = parser.parse_args(argv)
    print(loss_figure(args.run_dirs, args.output or Path(args.run_dirs[0]) / "loss.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
