"""Tables and the figure of benchmarks/decoding.py."""

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """What a way of writing gave: of each text its new tokens, seconds and model calls."""

    name: str
    tokens: list[list[int]]
    seconds: list[float]
    calls: list[float]

    @property
    def speed(self) -> float:
        return statistics.median(len(t) / s for t, s in zip(self.tokens, self.seconds))

    @property
    def distinct_2(self) -> float:
        pairs = [pair for text in self.tokens for pair in itertools.pairwise(text)]
        return len(set(pairs)) / len(pairs)


@torch.no_grad()
def judged(base: Any, prompts: list[list[int]], row: Row) -> tuple[float, float]:
    """(nats a token of the texts under the base, its standard error over texts)."""
    found = []
    for prompt, tokens in zip(prompts, row.tokens):
        ids = torch.tensor([prompt + tokens]).clamp(max=base.config.vocab_size - 1)
        log_p = base(ids).logits[0, :-1].float().log_softmax(-1)
        nll = -log_p.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        found.append(float(nll.mean()))
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return statistics.mean(found), error


def table(rows: list[Row], base: Any, prompts: list[list[int]], samples: list[dict]) -> list[str]:
    """Markdown lines; also fills `samples` with what the figure needs."""
    first = rows[0].speed
    lines = [
        "| | tokens/s | × authors' | NFE | tokens a call | nats a token under the base | distinct-2 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        nats, error = judged(base, prompts, row)
        calls = statistics.mean(row.calls)
        per_call = sum(map(len, row.tokens)) / sum(row.calls)
        lines.append(
            f"| {row.name} | {row.speed:.1f} | {row.speed / first:.1f} | {calls:.0f} | {per_call:.2f} | "
            f"{nats:.2f} ± {error:.2f} | {row.distinct_2:.2f} |"
        )
        samples.append({"name": row.name, "speed": row.speed, "nats": nats, "error": error})
    return lines


def figure(points: list[dict], length: int, path: Path) -> None:
    """Nats a token under the base over tokens a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(9, 5.5))
    said: list[dict] = []  # points with a label, so that those on top of each other share one
    for point in points:
        other = point["name"] in ("authors' loop", "AR base with KV cache", "dLLM's sampler")
        colour = "tab:red" if other else "tab:blue"
        axes.errorbar(point["speed"], point["nats"], point["error"], fmt="s" if other else "o", capsize=2, color=colour)
        near = [p for p in said if abs(math.log(p["speed"] / point["speed"])) < 0.08]
        near = [p for p in near if abs(p["nats"] - point["nats"]) < 0.04]
        if near:
            near[0]["label"] += f"\n{point['name']}"
        else:
            said.append({**point, "label": point["name"]})
    for point in said:
        below = point["label"].count("\n") > 0
        axes.annotate(
            point["label"],
            (point["speed"], point["nats"]),
            fontsize=7,
            xytext=(4, -4 if below else 4),
            textcoords="offset points",
            va="top" if below else "bottom",
        )
    axes.set_xscale("log")
    axes.set(xlabel="tokens a second, one text at a time", ylabel="nats a token under the base",
             title=f"{length} new tokens, {torch.get_num_threads()} CPU cores")  # fmt: skip
    axes.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
