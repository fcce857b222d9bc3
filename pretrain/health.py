"""Is it learning? Judged from what a run has written, against what its base could do at step 0.

In: the lines of metrics.jsonl, and under which names the objective reports. Out: a verdict in one line. A diffusion
model's training loss cannot answer the question: it is weighted by 1/t and t is random, so it looks flat whatever
happens. Held-out masked cross-entropy on fixed noise, by bucket of t, can.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from .step import Reported

MIN_POINTS = 4  # of a trend
NORM_RISE = 10.0  # times the run's median gradient norm
MASK_SHARE = 0.01  # of predictions
SKIPPED_SHARE = 0.01  # of steps
RECENT = 20  # steps


@dataclass
class Trend:
    """Change of a loss over a stretch of tokens, nats, with half the width of its 95% interval."""

    change: float
    interval: float
    points: int

    def __str__(self) -> str:
        return f"{self.change:+.3f} ± {self.interval:.3f} nats"


@dataclass
class Health:
    problems: list[str] = field(default_factory=list)  # each says why, and what to do
    facts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.problems:
            return f"NOT healthy: {'; '.join(self.problems)} ({'; '.join(self.facts)})"
        return f"healthy: {'; '.join(self.facts)}"


def trend(tokens: list[float], losses: list[float]) -> Trend | None:
    """The least-squares line's change from first to last; None for fewer than 4 points."""
    n = len(tokens)
    if n < MIN_POINTS or tokens[-1] == tokens[0]:
        return None
    line: Any = stats.linregress(tokens, losses)
    span = tokens[-1] - tokens[0]
    return Trend(line.slope * span, stats.t.ppf(0.975, n - 2) * line.stderr * span, n)


def recent_trend(metrics: list[dict], reported: Reported) -> tuple[str, Trend] | None:
    """("held out" or "training", trend) over the second half of the tokens.

    Training losses are compared within their buckets, so that the t that were drawn make no trend.
    """
    half = metrics[-1]["tokens"] / 2
    late = [m for m in metrics if m["tokens"] >= half and m["step"]]
    held_out = [m for m in late if m.get(reported.held_out) is not None]
    found = trend([m["tokens"] for m in held_out], [m[reported.held_out] for m in held_out])
    if found:
        return "held out", found
    points = centred(late, reported)
    found = trend([x for x, _ in points], [y for _, y in points])
    return ("training", found) if found else None


def centred(metrics: list[dict], reported: Reported) -> list[tuple[float, float]]:
    """(tokens, each compared training loss less its own mean, averaged) of each step."""
    known = {k: [m[k] for m in metrics if m.get(k) is not None] for k in reported.compared}
    means = {k: statistics.fmean(values) for k, values in known.items() if values}
    points = []
    for m in metrics:
        off = [m[k] - mean for k, mean in means.items() if m.get(k) is not None]
        if off:
            points.append((m["tokens"], statistics.fmean(off)))
    return points


def assess(metrics: list[dict], steps: int, warmup: int, reported: Reported) -> Health:
    """The verdict. `metrics` as `runtime.metrics.read_metrics` gives them, `steps` and `warmup` as configured.

    A run without a finished step has no health: a single problem says so.
    """
    done = [m for m in metrics if m["step"]]
    if not done:
        return Health(["no step has finished"])
    health = Health()
    last = done[-1]
    health.facts.append(f"step {last['step']} of {steps}, {last['tokens']:,} tokens")

    skipped = last.get("skipped_steps", 0)
    if last.get("update_skipped"):
        health.problems.append("the last step had a non-finite loss or gradient: see incidents.jsonl")
    elif skipped > max(1, SKIPPED_SHARE * last["step"]):
        health.problems.append(f"{skipped} steps had non-finite losses or gradients: lower optimizer.lr")
    _judge_gradients(health, [m["grad_norm"] for m in done if m.get("grad_norm") is not None])
    _judge_held_out(health, metrics, warmup, reported)
    found = recent_trend(metrics, reported)
    if found:
        where, change = found
        health.facts.append(f"{change} over the second half of the tokens ({where})")
        if change.change - change.interval > 0:
            health.problems.append(f"the {where} loss rises, {change}: lower optimizer.lr, or look at the data")
    return health


def _judge_gradients(health: Health, norms: list[float]) -> None:
    if len(norms) < 3 * RECENT:
        return
    usual = statistics.median(norms[RECENT:])
    now = statistics.median(norms[-RECENT:])
    health.facts.append(f"gradient norm {now:.2g}")
    if now > NORM_RISE * usual:
        health.problems.append(f"the gradient norm has grown to {now:.2g} from {usual:.2g}: lower optimizer.lr")


def _judge_held_out(health: Health, metrics: list[dict], warmup: int, reported: Reported) -> None:
    """Against what was measured at step 0: the base as the new model reads it, as it was trained, and a guess."""
    key = reported.held_out
    start = metrics[0] if metrics[0]["step"] == 0 else {}
    validated = [m for m in metrics if m["step"] and m.get(key) is not None]
    if not validated or start.get(key) is None:
        health.facts.append("nothing was validated at step 0 to compare with" if validated else "not validated yet")
        return
    now = validated[-1]
    loss, before = now[key], start[key]
    base = start.get(reported.base, math.inf) if reported.base else math.inf
    name = key.removeprefix("val_").replace("masked_ce", "masked CE")
    lines = f"at step 0 {before:.2f}"
    if math.isfinite(base):
        lines = f"AR base {before:.2f} read bidirectionally, {base:.2f} causally"
    if "uniform_ce" in start:
        lines += f"; uniform {start['uniform_ce']:.2f}"
    health.facts.append(f"held-out {name} {loss:.2f} ({lines})")
    if "val_accuracy" in now:
        health.facts.append(f"accuracy {start['val_accuracy']:.1%} → {now['val_accuracy']:.1%}")
    if now["step"] > warmup and loss >= before:
        health.problems.append("no better than before training: check optimizer.lr and that the data fit the base")
    elif now["step"] > warmup and now.get("anneal_ratio", 0) >= 1 and loss >= base:
        health.problems.append(
            "bidirectional, yet no better than the base read causally: train longer, or raise the lr"
        )
    if now.get("val_mask_share", 0) > MASK_SHARE:
        health.problems.append(
            f"{now['val_mask_share']:.1%} of its predictions are the mask token itself: is the mask id in the corpus?"
        )
