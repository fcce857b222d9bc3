"""speed.png and speed.md: the times of `python -m tools.figures speed`, drawn and as tables, beside the paper's."""

from pathlib import Path
from typing import Any

from .grid import labels
from .published import DECODING_SPEED

LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"
LONG_DASHES = (0, (6, 3))
ATTENTIONS = {"flash 2": "o", "SDPA": "s", "vanilla": "D"}  # markers of the paper's points


def machine(settings: dict[str, Any]) -> str:
    """The device, and on a CPU how many threads."""
    threads = settings["threads"]
    return settings["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def page(points: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The Markdown of speed.md."""
    names = labels([p["point"]["checkpoint"] for p in points])
    lines = [
        "# Decoding speed",
        "",
        f"Seconds for one sequence on {machine(settings)}: the median of {settings['repeats']}, with their range.",
        "",
        "| length | model | rule | T | NFE | seconds | range | tokens/s | dtype |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in sorted(points, key=lambda p: (p["point"]["length"], p["point"]["kind"] == "autoregressive")):
        point = p["point"]
        lines.append(
            f"| {point['length']} | {names[point['checkpoint']]} | {point.get('rule', 'autoregressive, KV cache')} | "
            f"{point.get('steps', '–')} | {p['nfe']:.0f} | {p['median']:.3g} | {min(p['seconds']):.3g} to "
            f"{max(p['seconds']):.3g} | {point['length'] / p['median']:.1f} | {p['dtype']} |"
        )
    lines += [
        "",
        "One sequence at a time, from the start token, full length whatever comes. A short text is written first and "
        "not timed. T above the number of masks changes nothing without remasking. "
        "NFE: model calls; with a window cache most of them are of one block alone.",
        "",
        "## What the paper states",
        "",
        "Seconds for one sequence of models of 7B, on the authors' machine. T is not stated with this table. Another "
        "machine, other models: compare how the times grow with length, not the times.",
        "",
        "| length | attention | DiffuLLaMA | LLaMA2 with KV cache |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {t.length} | {t.attention} | {t.diffusion} | {t.autoregressive} |" for t in DECODING_SPEED]
    return "\n".join(lines) + "\n"


def figure(points: list[dict[str, Any]], settings: dict[str, Any], output: Path) -> None:
    """Three panels: seconds over T, seconds over length, and the paper's table by itself.

    In the first a colour is a length, in the second a number of steps. A marker and line is a rule; the AR model has
    long dashes. Bars are the range of the repeats.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 3, figsize=(14, 5.8), layout="constrained")
    autoregressive = [p for p in points if p["point"]["kind"] == "autoregressive"]
    lengths = sorted({p["point"]["length"] for p in points})
    counts = sorted({p["point"]["steps"] for p in points if "steps" in p["point"]})
    rules = list(dict.fromkeys(p["point"]["rule"] for p in points if "rule" in p["point"]))
    styles = {
        rule: {"marker": MARKERS[n % len(MARKERS)], "linestyle": LINES[n % len(LINES)]} for n, rule in enumerate(rules)
    }
    for rule, style in styles.items():
        own = [p for p in points if p["point"].get("rule") == rule]
        for i, length in enumerate(lengths):
            group = [p for p in own if p["point"]["length"] == length]
            with_range(axes[0], group, "steps", color=f"C{i % 10}", **style)
        for i, count in enumerate(counts):
            group = [p for p in own if p["point"]["steps"] == count]
            with_range(axes[1], group, "length", color=f"C{i % 10}", **style)
    names = labels([p["point"]["checkpoint"] for p in autoregressive])
    others = {}  # by the AR model's name
    for number, name in enumerate(names):
        group = [p for p in autoregressive if p["point"]["checkpoint"] == name]
        others[f"{names[name]}, KV cache"] = style = {"linestyle": LONG_DASHES, "marker": "*", "markersize": 9}
        with_range(axes[1], group, "length", color=("black", "grey", "silver")[number % 3], **style)
        for p in group:  # which has no T
            axes[0].axhline(p["median"], color=f"C{lengths.index(p['point']['length']) % 10}", linestyle=LONG_DASHES)
    draw_paper(axes[2])
    level = {name: {"linestyle": LONG_DASHES} for name in others}
    legend(axes[0], [f"{length} tokens" for length in lengths], {**styles, **level})
    legend(axes[1], [f"T = {count}" for count in counts], {**styles, **others})
    attentions = {name: {"marker": marker, "linestyle": ""} for name, marker in ATTENTIONS.items()}
    legend(axes[2], ["DiffuLLaMA", "LLaMA2 with KV cache"], attentions)
    paper = sorted({t.length for t in DECODING_SPEED})
    for axis, ticks, over in zip(axes, (counts, lengths, paper), ("decoding steps T", *["length (tokens)"] * 2)):
        powers_of_two(axis, ticks)
        axis.set(xlabel=over, ylabel="seconds for one sequence")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    checkpoint = labels([settings["checkpoint"]])[settings["checkpoint"]]
    axes[0].set_title(f"{checkpoint} over T", fontsize=10)
    axes[1].set_title(f"{checkpoint} over length", fontsize=10)
    axes[2].set_title("The paper: 7B, the authors' machine, T not stated", fontsize=10)
    drawn.suptitle(f"Left and middle: measured on {machine(settings)}. Right: stated in the paper", fontsize=10)
    drawn.savefig(output, dpi=130)
    plt.close(drawn)


def with_range(axis: Any, group: list[dict[str, Any]], over: str, **style: Any) -> None:
    """Medians in the order of `over`, with bars from the fastest to the slowest repeat."""
    if not group:
        return
    group = sorted(group, key=lambda p: p["point"][over])
    medians = [p["median"] for p in group]
    below = [p["median"] - min(p["seconds"]) for p in group]
    above = [max(p["seconds"]) - p["median"] for p in group]
    axis.errorbar([p["point"][over] for p in group], medians, (below, above), capsize=2, **style)


def draw_paper(axis: Any) -> None:
    """The paper's table, in a panel of its own: another machine, and models of 7B."""
    for attention, marker in ATTENTIONS.items():
        rows = [t for t in DECODING_SPEED if t.attention == attention]
        over = [t.length for t in rows]
        axis.plot(over, [t.diffusion for t in rows], marker + "-", color="C0")
        axis.plot(over, [t.autoregressive for t in rows], marker + "-", color="C1")


def legend(axis: Any, colours: list[str], ways: dict[str, dict[str, Any]]) -> None:
    """Below a panel: what a colour is, from C0 on, and what a line or a marker is."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=f"C{i % 10}", linewidth=4, label=label) for i, label in enumerate(colours)]
    handles += [Line2D([], [], color="dimgrey", label=label, **style) for label, style in ways.items()]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, ncols=2, frameon=False)


def powers_of_two(axis: Any, ticks: list[int]) -> None:
    """A logarithmic axis with a tick at each measured value."""
    from matplotlib.ticker import NullFormatter, NullLocator

    if ticks:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
