"""Is it learning? Judged from what a run has written, against what its base could do at step 0.

In: the lines of metrics.jsonl. Out: a verdict in one line, and a panel to look at. The training loss
cannot answer the question: it is weighted by 1/t and t is random, so it looks flat whatever happens. Held-out
masked cross-entropy on fixed noise, by bucket of t, can.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from .diffusion import BUCKETS

FEW = 4  # points of a trend at least
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
    if n < FEW or tokens[-1] == tokens[0]:
        return None
    slope, intercept = statistics.linear_regression(tokens, losses)
    residuals = [y - (intercept + slope * x) for x, y in zip(tokens, losses)]
    mean = statistics.fmean(tokens)
    error = math.sqrt(sum(r * r for r in residuals) / (n - 2) / sum((x - mean) ** 2 for x in tokens))
    span = tokens[-1] - tokens[0]
    return Trend(slope * span, student(n - 2) * error * span, n)


def student(freedom: int) -> float:
    """97.5% quantile of Student's t: Cornish-Fisher's expansion about the normal's, 3% low at 2 degrees of freedom."""
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def recent_trend(metrics: list[dict]) -> tuple[str, Trend] | None:
    """("held out" or "training", trend) over the second half of the tokens.

    Training losses are compared within their buckets of t, so that the t that were drawn make no trend.
    """
    half = metrics[-1]["tokens"] / 2
    late = [m for m in metrics if m["tokens"] >= half and m["step"]]
    held_out = [m for m in late if m.get("val_masked_ce") is not None]
    found = trend([m["tokens"] for m in held_out], [m["val_masked_ce"] for m in held_out])
    if found:
        return "held out", found
    points = centred(late)
    found = trend([x for x, _ in points], [y for _, y in points])
    return ("training", found) if found else None


def centred(metrics: list[dict]) -> list[tuple[float, float]]:
    """(tokens, training masked CE less its bucket's mean, averaged over buckets) of each step."""
    keys = [f"masked_ce_to_t{edge:g}" for edge in BUCKETS]
    means = {k: statistics.fmean(v) for k in keys if (v := [m[k] for m in metrics if m.get(k) is not None])}
    points = []
    for m in metrics:
        known = [m[k] - means[k] for k in keys if m.get(k) is not None]
        if known:
            points.append((m["tokens"], statistics.fmean(known)))
    return points


def assess(metrics: list[dict], steps: int, warmup: int = 0) -> Health:
    """`metrics` as `telemetry.read_metrics` gives them, `steps` and `warmup` as configured.

    A run without a finished step has no health: a single problem says so.
    """
    done = [m for m in metrics if m["step"]]
    if not done:
        return Health(["no step has finished"])
    health, last = Health(), done[-1]
    health.facts.append(f"step {last['step']} of {steps}, {last['tokens']:,} tokens")

    skipped = last.get("skipped_steps", 0)
    if last.get("update_skipped"):
        health.problems.append("the last step had a non-finite loss or gradient: see incidents.jsonl")
    elif skipped > max(1, SKIPPED_SHARE * last["step"]):
        health.problems.append(f"{skipped} steps had non-finite losses or gradients: lower optimizer.lr")
    _judge_gradients(health, [m["grad_norm"] for m in done if m.get("grad_norm") is not None])
    _judge_held_out(health, metrics, warmup)
    found = recent_trend(metrics)
    if found:
        where, change = found
        health.facts.append(f"{change} over the second half of the tokens ({where})")
        if change.change - change.interval > 0:
            health.problems.append(f"the {where} loss rises, {change}: lower optimizer.lr, or look at the data")
    return health


def _judge_gradients(health: Health, norms: list[float]) -> None:
    if len(norms) < 3 * RECENT:
        return
    usual, now = statistics.median(norms[RECENT:]), statistics.median(norms[-RECENT:])
    health.facts.append(f"gradient norm {now:.2g}")
    if now > NORM_RISE * usual:
        health.problems.append(f"the gradient norm has grown to {now:.2g} from {usual:.2g}: lower optimizer.lr")


def _judge_held_out(health: Health, metrics: list[dict], warmup: int) -> None:
    """Against the three lines of step 0."""
    start = metrics[0] if metrics[0]["step"] == 0 else {}
    validated = [m for m in metrics if m["step"] and m.get("val_masked_ce") is not None]
    if not validated or "val_masked_ce" not in start:
        health.facts.append("not validated yet")
        return
    now = validated[-1]
    loss, bidirectional = now["val_masked_ce"], start["val_masked_ce"]
    causal = start.get("causal_masked_ce", math.inf)
    lines = f"AR base {bidirectional:.2f} read bidirectionally"
    if "causal_masked_ce" in start:
        lines += f", {causal:.2f} causally"
    if "uniform_ce" in start:
        lines += f"; uniform {start['uniform_ce']:.2f}"
    health.facts.append(f"held-out masked CE {loss:.2f} ({lines})")
    if "val_accuracy" in now:
        health.facts.append(f"accuracy {start['val_accuracy']:.1%} → {now['val_accuracy']:.1%}")
    if now["step"] > warmup and loss >= bidirectional:
        health.problems.append("no better than the base before training: check optimizer.lr and that data fit the base")
    elif now["step"] > warmup and now["anneal_ratio"] >= 1 and loss >= causal:
        health.problems.append(
            "bidirectional, yet no better than the base read causally: train longer, or raise the lr"
        )
    if now.get("val_mask_share", 0) > MASK_SHARE:
        health.problems.append(
            f"{now['val_mask_share']:.1%} of its predictions are the mask token itself: is the mask id in the corpus?"
        )


def panel(metrics: list[dict], output: str | Path, title: str = "") -> Path:
    """Draw what `assess` looks at. `metrics` need a finished step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((losses, drift), (norms, hits)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    start, done = metrics[0], [m for m in metrics if m["step"]]
    validated = [m for m in metrics if m.get("val_masked_ce") is not None]
    tokens = [m["tokens"] for m in validated]
    lower = 0.0
    for number, edge in enumerate(BUCKETS):
        key, colour = f"val_masked_ce_to_t{edge:g}", f"C{number}"
        if not all(key in m for m in validated):
            continue
        losses.plot(tokens, [m[key] for m in validated], "o-", color=colour, markersize=3,
                    label=f"{lower:g} < t ≤ {edge:g}")  # fmt: skip
        if f"causal_masked_ce_to_t{edge:g}" in start:
            losses.axhline(start[f"causal_masked_ce_to_t{edge:g}"], color=colour, linestyle="--", linewidth=0.8)
        if key in start:
            losses.axhline(start[key], color=colour, linestyle=":", linewidth=0.8)
        lower = edge
    if "uniform_ce" in start:
        losses.axhline(start["uniform_ce"], color="0.5", linewidth=0.8, label="uniform")
    losses.set_title("held-out masked CE (nats); base read causally - -, bidirectionally ···", fontsize=9)
    if losses.get_legend_handles_labels()[0]:
        losses.legend(fontsize=8)

    points = centred(done)
    drift.plot(*zip(*points), ".", markersize=2, color="0.6")
    late = [(x, y) for x, y in points if x >= points[-1][0] / 2] if points else []
    found = trend([x for x, _ in late], [y for _, y in late])
    if found:
        slope, intercept = statistics.linear_regression([x for x, _ in late], [y for _, y in late])
        ends = [late[0][0], late[-1][0]]
        drift.plot(ends, [intercept + slope * x for x in ends], color="C3", label=f"second half: {found}")
        drift.legend(fontsize=8)
    drift.set_title("training masked CE less the mean of its bucket of t", fontsize=9)

    finite = [(m["tokens"], m["grad_norm"]) for m in done if m.get("grad_norm")]
    if finite:
        norms.semilogy(*zip(*finite), linewidth=0.8)
    for m in done:
        if m.get("update_skipped"):
            norms.axvline(m["tokens"], color="C3", linewidth=0.8)
    norms.set_title("gradient norm; steps without an update in red", fontsize=9)

    for key, label in (("val_accuracy", "accuracy"), ("val_mask_share", "predicts the mask")):
        known = [(m["tokens"], m[key]) for m in validated if key in m]
        if known:
            hits.plot(*zip(*known), "o-", markersize=3, label=label)
            hits.legend(fontsize=8)
    hits.set_title("share of held-out masked tokens", fontsize=9)
    for axis in (losses, drift, norms, hits):
        axis.grid(alpha=0.3)
        axis.set_xlabel("tokens", fontsize=8)
    figure.suptitle(title)
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return Path(output)
