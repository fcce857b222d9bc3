"""The paper's figures, of runs and of exported checkpoints.

    python -m tools.figures loss runs/demo       # Figure 2, and 6 of fine-tuning runs: runs/demo/loss.png
    python -m tools.figures loss runs/a runs/b --output both.png
    python -m tools.figures quality exports/a exports/b --judge gpt2-large --also gpt2    # Figures 3 and 5
    python -m tools.figures speed exports/a --base gpt2 --lengths 128 256 512   # Figure 4, and its table

`quality` and `speed` keep every measured point in --output, and the same command continues there after a stop.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from common.cli import command, make_parser, resumable_command
from common.errors import UserError

from .paper_figures.quality import quality
from .paper_figures.speed import speed
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


QUALITY = """Figures 3 and 5: generative perplexity under an autoregressive judge × distinct-2, over decoding steps.

Each CHECKPOINT writes --texts texts by each rule, at each temperature, in each number of steps: from the start token
alone as in the paper, or after --prompts. Low perplexity with low distinct-2 is repetition, so read both.
Perplexity is exp of the mean negative log-likelihood of a written token; the text is tokenised anew with the judge's
tokenizer, whose tokens are counted. distinct-2 is the share of different pairs of neighbouring tokens, over all texts
of a point, in the judge's tokens too. A text does not end at an end-of-text token.

FOLDER gets quality.json (points and texts), quality.png and quality.md. Points that are there are not written again.
Others are added beside them, and the figure shows all; another judge, length, number of texts, seed or prompts is
refused, since such points cannot be compared. The paper gives these figures without numbers, so none are drawn in.
"""

SPEED = """Figure 4 and the table "Decoding speed": seconds for one sequence over its length and the decoding steps T.

Each point is written --repeats times, one sequence at a time; the median is drawn, with the range. --base, an
autoregressive model, writes with its KV cache. The paper's times stand in a panel and a table of their own: they are
of another machine and of models of 7B.

FOLDER gets speed.json, speed.png and speed.md. Points that are there are not measured again, and others are added
beside them; another device, checkpoint or number of repeats is refused.
"""


def add_quality(verbs: Any) -> None:
    """The arguments of the verb `quality`."""
    parser = verbs.add_parser(
        "quality", help="Figures 3 and 5: perplexity under a judge × distinct-2, over decoding steps and settings",
        description=QUALITY, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a folder of tools.export, or a Hub name")
    parser.add_argument("--judge", required=True, metavar="AR", help="autoregressive; gpt2-large in the paper")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64], help="default: 8 16 32 64")
    parser.add_argument("--length", type=int, default=64, help="tokens of the writer in a text; default: %(default)s")
    parser.add_argument(
        "--rules", nargs="+", default=["random"], metavar="RULE",
        help="as of tools.generate --compare: entropy, top_p=0.9, threshold=0.9,block_length=8; default: random",
    )  # fmt: skip
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="default: 1")
    parser.add_argument("--texts", type=int, default=64, help="of each point; default: %(default)s")
    parser.add_argument("--prompts", metavar="FILE", help="a text to continue a line, used in turn; default: none")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=8, help="texts at a time; changes no text; default: 8")
    parser.add_argument("--also", nargs="+", default=[], metavar="AR_MODEL", help="these write too, token by token")
    parser.add_argument("--output", default="runs/quality", metavar="FOLDER", help="default: %(default)s")


def add_speed(verbs: Any) -> None:
    """The arguments of the verb `speed`."""
    parser = verbs.add_parser(
        "speed", help="Figure 4 and the table of decoding speed: seconds for one sequence, over length and steps",
        description=SPEED, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder of tools.export, or a name on the Hub")
    parser.add_argument("--base", metavar="AR", help="an autoregressive model to measure beside it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="default: 128 256 512 tokens")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 64, 128], help="default: 16 32 64 128")
    parser.add_argument(
        "--rules", nargs="+", default=["random"], metavar="RULE",
        help="as of tools.generate --compare: entropy, cache=window,block_length=16; default: random",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="of each point; default: %(default)s")
    parser.add_argument("--output", default="runs/speed", metavar="FOLDER", help="default: %(default)s")


@command
def main(argv: list[str] | None = None) -> int:
    """Draw a figure and print its path; returns the exit code."""
    parser = make_parser("python -m tools.figures", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    loss = verbs.add_parser(
        "loss", help="Figure 2, and 6 of fine-tuning runs: losses over tokens and the annealing schedule"
    )
    loss.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    loss.add_argument("--output", metavar="PNG", help="default: loss.png in the first RUN_DIR")
    add_quality(verbs)
    add_speed(verbs)
    args = parser.parse_args(argv)
    if args.verb == "loss":
        print(loss_figure(args.run_dirs, args.output or Path(args.run_dirs[0]) / "loss.png"))
        return 0
    measured = {"quality": quality, "speed": speed}[args.verb]
    return resumable_command(lambda _: measured(args))(argv)


if __name__ == "__main__":
    sys.exit(main())
