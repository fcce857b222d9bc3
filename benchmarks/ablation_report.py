"""Table and figure of benchmarks/ablation.py, from what its runs wrote to metrics.jsonl.

In: the metrics of runs. Out: a Markdown file and a PNG of the same name beside it.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHOSEN_BY = 0.5  # the time whose masked CE decides between learning rates, and is drawn


@dataclass
class Adapted:
    """What one adaptation has come to."""

    name: str
    lr: float
    seed: int
    ce: dict[float, float]  # at the end, by time: nats a masked token on held-out text
    accuracy: float  # share of masked held-out tokens, over all times
    curve: list[tuple[int, float]]  # (tokens, masked CE at CHOSEN_BY)
    norms: tuple[float, float, float]  # gradient norm before clipping: first, largest, median of the second half

    @classmethod
    def of(cls, name: str, lr: float, seed: int, metrics: list[dict], times: list[float]) -> "Adapted":
        """From the lines of a finished run's metrics.jsonl."""
        drawn = f"val_masked_ce_t{CHOSEN_BY:g}"
        last = metrics[-1]
        norms = [m["grad_norm"] for m in metrics if m["step"] and m["grad_norm"] is not None]
        return cls(
            name,
            lr,
            seed,
            ce={t: last[f"val_masked_ce_t{t:g}"] for t in times},
            accuracy=last["val_accuracy"],
            curve=[(m["tokens"], m[drawn]) for m in metrics if drawn in m],
            norms=(norms[0], max(norms), statistics.median(norms[len(norms) // 2 :])),
        )


def best_of(runs: list[Adapted]) -> Adapted:
    """The run with the lowest masked CE at CHOSEN_BY."""
    return min(runs, key=lambda run: run.ce[CHOSEN_BY])


def write_report(found: dict[str, list[Adapted]], about: str, command: str, path: Path) -> str:
    """Write table and figure of each setting's runs, one a seed; returns the Markdown."""
    draw(found, path.with_suffix(".png"))
    text = "\n".join([f"`{command}` wrote this.", "", about, "", *table(found)]) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def spread(values: list[float]) -> str:
    """Mean and half the range."""
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def less_none(runs: list[Adapted], none: list[Adapted] | None, time: float) -> str:
    """The CE of each run less that of `none` of the same seed, so on the same rows and noise."""
    return ", ".join(f"{run.ce[time] - other.ce[time]:+.3f}" for run, other in zip(runs, none)) if none else "–"


def table(found: dict[str, list[Adapted]]) -> list[str]:
    """One row a setting."""
    times = list(next(iter(found.values()))[0].ce)
    gains = times[:2]
    head = ["annealing", "lr", f"CE, t = {times[0]:g}", *(f"t = {t:g}" for t in times[1:])]
    head += [f"CE less that of none, by seed: t = {gains[0]:g}", *(f"t = {t:g}" for t in gains[1:])]
    head += ["accuracy", "gradient norm: first, largest, second half"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, runs in found.items():
        cells = [name, f"{runs[0].lr:g}", *(spread([run.ce[t] for run in runs]) for t in times)]
        cells += [less_none(runs, found.get("none"), t) for t in gains]
        cells.append(spread([run.accuracy for run in runs]))
        cells.append(", ".join(f"{statistics.mean(run.norms[i] for run in runs):.1f}" for i in range(3)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(found: dict[str, list[Adapted]], path: Path) -> None:
    """Left: held-out loss over tokens, mean and range of the seeds. Right: what each gains over none, by seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (curves, gains) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1, 1.2], constrained_layout=True)
    draw_curves(curves, {name: runs for name, runs in found.items() if "," not in name or "shift" in name})
    shown = {name: runs for name, runs in found.items() if name != "none" and "shift" not in name}
    if "none" in found and shown:
        draw_gains(gains, shown, found["none"])
    for axis in (curves, gains):
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_curves(axis, found: dict[str, list[Adapted]]) -> None:
    """Held-out loss over tokens, mean and range of the seeds."""
    for i, (name, runs) in enumerate(found.items()):
        tokens = [t / 1000 for t, _ in runs[0].curve]
        values = list(zip(*[[value for _, value in run.curve] for run in runs]))

        def over(reduce: Callable, values: list = values) -> list[float]:
            return [reduce(v) for v in values]

        axis.plot(tokens, over(statistics.mean), color=f"C{i}", label=name)
        axis.fill_between(tokens, over(min), over(max), color=f"C{i}", alpha=0.15)
    axis.set(xlabel="thousand tokens of adaptation", title=f"held-out CE at masked tokens, t = {CHOSEN_BY:g} (nats)")
    axis.legend(fontsize=8)


def draw_gains(axis, found: dict[str, list[Adapted]], none: list[Adapted]) -> None:
    """A dot a seed and time: CE less that of none."""
    for i, time in enumerate(none[0].ce):
        offset = 0.2 * (i - (len(none[0].ce) - 1) / 2)
        points = [
            (run.ce[time] - other.ce[time], row + offset)
            for row, runs in enumerate(found.values())
            for run, other in zip(runs, none)
        ]
        axis.plot(*zip(*points), "o", color=f"C{i}", markersize=4, label=f"t = {time:g}")
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(found)), list(found), fontsize=8)
    axis.invert_yaxis()
    axis.set(title="CE less that of none, same seed (nats): left is better")
    axis.legend(fontsize=8)
