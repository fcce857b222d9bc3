"""quality.png and quality.md: the points of `python -m tools.figures quality`, drawn and as a table."""

import math
from pathlib import Path
from typing import Any

from ..generate import rule_of
from .grid import labels

MARKERS = "osD^vPX*<>"  # of the settings
LINES = ("-", "--", ":", "-.")

READ_BOTH = (
    "Low perplexity with low distinct-2 is repetition, not quality: read both. Lower temperature and top-p lower both."
)


def page(points: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The Markdown of quality.md."""
    names = labels([p["point"]["checkpoint"] for p in points])
    written = "continuations of prompts" if settings["prompts"] else "texts from the start token alone"
    lines = [
        "# Generative perplexity and distinct-2",
        "",
        f"{settings['texts']} {written} a point, {settings['length']} tokens of the writer each, seed "
        f"{settings['seed']}, judged by {labels([settings['judge']])[settings['judge']]}.",
        "",
        READ_BOTH,
        "",
        "| writer | rule | temperature | steps | NFE | perplexity | distinct-2 | judged tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in points:
        point = p["point"]
        perplexity = "–" if p["perplexity"] is None else f"{p['perplexity']:.1f}"
        if p["perplexity_error"] is not None:
            perplexity += f" ± {p['perplexity_error']:.1f}"
        pairs = "–" if p["distinct_2"] is None else f"{p['distinct_2']:.3f}"
        lines.append(
            f"| {names[point['checkpoint']]} | {rule_in_force(p)} | {point['temperature']:g} | "
            f"{point.get('steps', '–')} | {p['nfe']:.1f} | {perplexity} | {pairs} | {p['judged_tokens']} |"
        )
    lines += [
        "",
        "- Perplexity: exp of the mean negative log-likelihood, under the judge, of every token that was written. The "
        "decoded text, without special tokens, is tokenised anew with the judge's tokenizer, and its tokens are "
        "counted; the prompt's are not. ± is a standard error over texts (delta method).",
        "- distinct-2: different pairs of neighbouring tokens ÷ all pairs, over all texts of a point, in the judge's "
        "tokens. It falls with the amount of text, so it compares points of this file alone.",
        "- An end-of-text token does not end a text, and is not judged, nor is any special token: where judged tokens "
        "are far fewer than elsewhere, the writer wrote many, and distinct-2 is of less text.",
        "- An autoregressive model writes token by token at the same temperature; rules do not apply to it.",
        "- The paper gives its figures 3 and 5 without numbers, so none of its points is drawn.",
    ]
    return "\n".join(lines) + "\n"


def rule_in_force(p: dict[str, Any]) -> str:
    """The rule asked for, and settings that the checkpoint's own defaults add to it."""
    rule = p["point"].get("rule")
    if rule is None:
        return "autoregressive"
    asked = ("steps", "temperature", *rule_of(rule, "--rules"))
    added = [f"{k}={v}" for k, v in p["settings"].items() if v and k not in asked]
    return rule + (f" (checkpoint: {', '.join(added)})" if added else "")


def figure(points: list[dict[str, Any]], settings: dict[str, Any], output: Path) -> None:
    """Two panels: perplexity over steps; perplexity × distinct-2, joined in the order of steps.

    A marker and line is a rule at a temperature. A colour is a checkpoint, or of one checkpoint alone a rule at a
    temperature; autoregressive models are black and grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [p for p in points if p["perplexity"] is not None and p["distinct_2"] is not None]
    names = labels([p["point"]["checkpoint"] for p in points])
    series = by_series(points)
    kinds = list(dict.fromkeys(how for _, how in series))
    colours = colours_of(series)
    handles = []
    drawn, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    for (checkpoint, how), group in series.items():
        style = {"color": colours[checkpoint, how], "marker": MARKERS[kinds.index(how) % len(MARKERS)], "markersize": 6}
        style["linestyle"] = LINES[kinds.index(how) % len(LINES)]
        values, errors = [p["perplexity"] for p in group], error_bars(group)
        label = f"{names[checkpoint]}: {how}"
        if group[0]["point"]["kind"] == "diffusion":
            steps = [p["point"]["steps"] for p in group]
            handles.append(axes[0].errorbar(steps, values, errors, capsize=2, **style, label=label))
        else:
            style |= {"marker": "*", "markersize": 12}
            axes[0].axhline(values[0], color=style["color"], linestyle="--", linewidth=1)
            handles += axes[0].plot(
                [], [], color=style["color"], linestyle="--", marker="*", markersize=12, label=label
            )
        pairs = [p["distinct_2"] for p in group]
        axes[1].errorbar(pairs, values, errors, capsize=2, **style)
        for p in group:
            if "steps" in p["point"]:
                axes[1].annotate(
                    p["point"]["steps"], (p["distinct_2"], p["perplexity"]), xytext=(5, 4),
                    textcoords="offset points", fontsize=7, color=style["color"],
                )  # fmt: skip
    finish(axes, settings, [p["point"]["steps"] for p in points if "steps" in p["point"]])
    if handles:
        drawn.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    drawn.savefig(output, dpi=130)
    plt.close(drawn)


def error_bars(group: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """(below, above) each perplexity: a standard error of its logarithm, so that no bar reaches 0."""
    logs = [(p["perplexity"], (p["perplexity_error"] or 0) / p["perplexity"]) for p in group]
    return [v * (1 - math.exp(-e)) for v, e in logs], [v * (math.exp(e) - 1) for v, e in logs]


def colours_of(series: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[tuple[str, str], str]:
    """The colour of each (checkpoint, how it writes)."""
    diffusion = [key for key, group in series.items() if group[0]["point"]["kind"] == "diffusion"]
    others = [key for key in series if key not in diffusion]
    told_by = 0 if len({checkpoint for checkpoint, _ in diffusion}) > 1 else 1
    kinds = list(dict.fromkeys(key[told_by] for key in diffusion))
    found = {key: f"C{kinds.index(key[told_by]) % 10}" for key in diffusion}
    return found | {key: ("black", "grey", "silver")[number % 3] for number, key in enumerate(others)}


def by_series(points: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Points by (checkpoint, how it writes), each in the order of steps."""
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for p in points:
        point = p["point"]
        how = f"{point.get('rule', 'autoregressive')}, temperature {point['temperature']:g}"
        series.setdefault((point["checkpoint"], how), []).append(p)
    return {key: sorted(group, key=lambda p: p["point"].get("steps", 0)) for key, group in series.items()}


def finish(axes: Any, settings: dict[str, Any], steps: list[int]) -> None:
    """Scales, labels and titles of both panels."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    judge = labels([settings["judge"]])[settings["judge"]]
    for axis in axes:
        axis.set_yscale("log")
        axis.set_ylabel("generative perplexity, lower is likelier")
        axis.grid(alpha=0.3, which="both")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    if steps:
        axes[0].set_xscale("log", base=2)
        axes[0].set_xticks(sorted(set(steps)), [str(count) for count in sorted(set(steps))])
        axes[0].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_xlabel("decoding steps T")
    axes[0].set_title(f"{settings['texts']} texts of {settings['length']} tokens, judge {judge}", fontsize=10)
    axes[1].set_xlabel("distinct-2, higher is more varied (numbers: steps)")
    axes[1].set_title("Best is low and to the right; low and to the left is repetition", fontsize=10)
