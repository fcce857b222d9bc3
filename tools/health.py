"""Is a run healthy? Prints one line that says so, or why not, and draws RUN_DIR/health.png.

    python -m tools.health runs/diffugpt_s

It may be asked while the run trains. Exit code 0: healthy, 1: not, 2: there is no such run.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common.cli import command, make_parser
from common.errors import UserError
from pretrain import health
from pretrain.config import total_steps

from .run_folder import RunFolder, read_run

SILENT_STEPS = 20  # a run that takes longer than so many steps for one has ended, or hangs
SILENT_SECONDS = 60.0  # but it is given at least this long


def examine(run_dir: str | Path, output: str | Path | None = None) -> health.Health:
    """The verdict on a run, with its panel drawn. Raises UserError where there is no run."""
    run = read_run(run_dir)
    if not run.metrics:
        raise UserError(f"{run.path} holds no run that has begun: metrics.jsonl is missing or empty")
    steps = planned_steps(run)
    found = health.assess(run.metrics, steps, run.config.optimizer.warmup_steps, run.reported)
    if run.finished_steps:
        silent = silent_seconds(run)
        if silent and run.finished_steps[-1]["step"] < steps:
            found.facts.append(f"no step for {silent / 60:.0f} min: it has ended, or hangs")
        draw_panel(run, output or run.path / "health.png")
    return found


def planned_steps(run: RunFolder) -> int:
    """How many steps the run will have; a row's length is taken from what was trained on."""
    if not run.finished_steps:
        return run.config.train.steps
    last = run.finished_steps[-1]
    return total_steps(run.config, last["tokens"] // last["step"] // run.config.train.global_batch_size)


def silent_seconds(run: RunFolder) -> float:
    """Seconds since the last step, if they are unusually many, else 0."""
    heartbeat = run.path / "heartbeat"
    if not heartbeat.exists():
        return 0.0
    silent = time.time() - json.loads(heartbeat.read_text())["time"]
    usual = statistics.median(m.get("step_seconds", 0.0) for m in run.finished_steps)
    return silent if silent > max(SILENT_SECONDS, SILENT_STEPS * usual) else 0.0


def draw_panel(run: RunFolder, output: str | Path) -> Path:
    """Draw what the verdict looks at. The run needs a finished step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, draw in zip(axes.flat, (draw_held_out, draw_trend, draw_gradients, draw_shares)):
        draw(axis, run)
        axis.grid(alpha=0.3)
        axis.set_xlabel("tokens", fontsize=8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(run.path.name)
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return Path(output)


def draw_held_out(axis: Any, run: RunFolder) -> None:
    """Held-out losses over tokens, with level lines for what the model lost at step 0 and for a guess."""
    start = run.metrics[0]  # step 0
    for number, (name, label) in enumerate(zip(run.reported.compared, _labels(run.reported.compared))):
        held_out = f"val_{name}"
        points = _points(run.metrics, held_out)
        if not points:
            continue
        colour = f"C{number}"
        axis.plot(*zip(*points), "o-", color=colour, markersize=3, label=label)
        for level, style in ((held_out, ":"), (f"causal_{name}", "--")):
            if start.get(level) is not None:
                axis.axhline(start[level], color=colour, linestyle=style, linewidth=0.8)
    if "uniform_ce" in start:
        axis.axhline(start["uniform_ce"], color="0.5", linewidth=0.8, label="uniform")
    if run.reported.base:
        title = "held-out masked CE (nats); base read causally - -, bidirectionally ···"
    else:
        title = "held-out loss (nats); at step 0 ···"
    axis.set_title(title, fontsize=9)


def _labels(compared: tuple[str, ...]) -> list[str]:
    """What the legend calls each loss: the times of its bucket, such as 0.25 < t ≤ 0.5, or its name."""
    labels = []
    lower = "0"
    for name in compared:
        plain, _, upper = name.partition("_to_t")
        labels.append(f"{lower} < t ≤ {upper}" if upper else plain)
        lower = upper
    return labels


def draw_trend(axis: Any, run: RunFolder) -> None:
    """Training losses less their means, and the line through the second half of the tokens."""
    points = health.centred(run.finished_steps, run.reported)
    axis.set_title(
        "training loss less its mean" + (", by bucket of t" if len(run.reported.compared) > 1 else ""), fontsize=9
    )
    if not points:
        return
    axis.plot(*zip(*points), ".", markersize=2, color="0.6")
    late = [(x, y) for x, y in points if x >= points[-1][0] / 2]
    tokens = [x for x, _ in late]
    losses = [y for _, y in late]
    found = health.trend(tokens, losses)
    if found:
        slope, intercept = statistics.linear_regression(tokens, losses)
        ends = [tokens[0], tokens[-1]]
        axis.plot(ends, [intercept + slope * x for x in ends], color="C3", label=f"second half: {found}")


def draw_gradients(axis: Any, run: RunFolder) -> None:
    """The gradient norm on a logarithmic scale; a red line at each step that made no update."""
    points = [(x, norm) for x, norm in _points(run.finished_steps, "grad_norm") if norm > 0]
    if points:
        axis.semilogy(*zip(*points), linewidth=0.8)
    for m in run.finished_steps:
        if m.get("update_skipped"):
            axis.axvline(m["tokens"], color="C3", linewidth=0.8)
    axis.set_title("gradient norm; steps without an update in red", fontsize=9)


def draw_shares(axis: Any, run: RunFolder) -> None:
    """Which share of held-out tokens is predicted rightly, and which as the mask token."""
    for name, label in (("val_accuracy", "accuracy"), ("val_mask_share", "predicts the mask")):
        points = _points(run.metrics, name)
        if points:
            axis.plot(*zip(*points), "o-", markersize=3, label=label)
    axis.set_title("share of held-out " + ("masked tokens" if run.reported.base else "tokens"), fontsize=9)


def _points(metrics: list[dict], name: str) -> list[tuple[float, float]]:
    """(tokens, value) wherever a value was written that is finite."""
    return [(m["tokens"], m[name]) for m in metrics if m.get(name) is not None]


@command
def main(argv: list[str] | None = None) -> int:
    """Examine a run; returns the exit code."""
    parser = make_parser("python -m tools.health", __doc__)
    parser.add_argument("run_dir", help="what `run_dir` was when training")
    parser.add_argument("--output", metavar="PNG", help="default: RUN_DIR/health.png")
    args = parser.parse_args(argv)
    found = examine(args.run_dir, args.output)
    print(f"{args.run_dir}: {found}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
