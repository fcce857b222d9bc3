"""What an evaluation writes: OUT/results.json, OUT/results.md and OUT/samples/TASK.jsonl."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_atomically

from .likelihood import Score

# metrics that are shares, shown in percent, begin so
FRACTIONS = (
    "acc",
    "exact_match",
    "rouge1",
    "rouge2",
    "rougeL",
    "pass@",
    "f1",
    "em",
    "hit",
    "distinct",
    "self_consistency",
)


@dataclass(frozen=True)
class Example:
    """One example: what was asked, what the model said, and how that was judged."""

    doc_id: int
    doc: dict
    target: Any
    prompts: list  # lm-eval's arguments of each request
    answers: list  # log-likelihoods in nats, or texts
    errors: list[float]  # standard errors of the log-likelihoods
    metrics: dict[str, float]


@dataclass
class Result:
    """A task's examples; `metric` is the main one."""

    name: str
    metric: str
    examples: list[Example]
    note: str = ""
    left_out: int = 0
    source: str = ""
    given: dict[str, float] | None = None  # lm-eval's own numbers, by metric and metric_stderr, for its own tasks

    def scores(self) -> dict[str, Any]:
        """The task's entry in results.json: means over examples with their standard errors."""
        found: dict[str, Any] = dict(self.given or {})
        for name in [] if self.given else self.examples[0].metrics:
            values = [e.metrics[name] for e in self.examples]
            mean, error = mean_and_error(values)
            if name == "log_likelihood":
                name, mean = "perplexity", math.exp(min(-mean, 700.0))  # beyond, no float has it
                error *= mean
            found[name], found[f"{name}_stderr"] = mean, error
        found["stderr"] = found.pop(f"{self.metric}_stderr", math.nan)
        found |= {"n": len(self.examples), "metric": self.metric}
        errors = [e for example in self.examples for e in example.errors]
        if any(errors):
            found["likelihood_stderr"] = sum(errors) / len(errors)  # nats, of one likelihood, by its draws
        for name, value in (("left_out", self.left_out), ("data", self.source), ("note", self.note)):
            if value:
                found[name] = value
        return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error: sample standard deviation ÷ √n); the error of one value is NaN."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)


def per_token_choice(scores: Sequence[Score], target: Any) -> float:
    """Whether the choice with the highest score a token is the right one: the authors' normalisation, set right."""
    means = [s.value / max(1, s.tokens) for s in scores]
    return float(means.index(max(means)) == int(target))


def is_fraction(metric: str) -> bool:
    """Whether a metric is a share, shown in percent."""
    return metric.startswith(FRACTIONS)


def shown(value: float, error: float, metric: str) -> str:
    """A score for people: shares in percent."""
    scale = 100 if is_fraction(metric) else 1
    digits = 1 if scale == 100 else 3
    plus = "" if math.isnan(error) else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{plus}"


def table(report: dict[str, Any]) -> str:
    """Markdown of results.json."""
    likelihood = report.get("likelihood")
    how = f"likelihoods by {likelihood['name']}, {likelihood['draws']} draws" if likelihood else "exact likelihoods"
    lines = [
        f"# {report['model']}", "", f"{report['kind'].replace('_', ' ').capitalize()}; {how}.", "",
        "| task | metric | score | n |", "| --- | --- | ---: | ---: |",
    ]  # fmt: skip
    for name, scores in report["tasks"].items():
        for metric in [m for m in scores if f"{m}_stderr" in scores or m == scores["metric"]]:
            error = scores["stderr"] if metric == scores["metric"] else scores[f"{metric}_stderr"]
            shares = "%" if is_fraction(metric) else ""
            title = f"{metric}{', ' if shares else ''}{shares}"
            lines.append(f"| {name} | {title} | {shown(scores[metric], _number(error), metric)} | {scores['n']} |")
    how = report.get("settings", {}).get("decoding")
    notes = [f"- Texts are decoded with {', '.join(f'{k} {v}' for k, v in how.items())}."] if how else []
    notes += [f"- {name}: {s['note']}." for name, s in report["tasks"].items() if s.get("note")]
    notes += [
        f"- {name}: {s['left_out']} records cannot be asked."
        for name, s in report["tasks"].items()
        if s.get("left_out")
    ]
    notes += [f"- {name}: not for this kind of model." for name in report.get("not_for_this_model", [])]
    if report.get("truncated"):
        notes.append(f"- {report['truncated']} requests were longer than the model takes and lost their far ends.")
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def earlier(folder: Path) -> dict[str, dict[str, Any]]:
    """The tasks that results.json has; none where there is no such file. Raises UserError for a damaged one."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return {name: {"n": 0, **scores} for name, scores in tasks.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; remove it, and the same command makes it again") from None


def write_results(
    folder: Path, about: dict[str, Any], results: dict[str, Result], tasks: Sequence[Any]
) -> dict[str, Any]:
    """Write all three, and return results.json; tasks that it has from before stay in it. `tasks`: as prepared."""
    for p in tasks:
        if p.name in results:
            results[p.name].left_out, results[p.name].source = p.left_out, p.source
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    before = earlier(folder)
    for name, result in results.items():
        lines = [json.dumps(vars(e), ensure_ascii=False, default=str) for e in result.examples]
        write_atomically(samples / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
    path = folder / "results.json"
    report = _finite({**about, "tasks": {**before, **{name: r.scores() for name, r in results.items()}}})
    write_atomically(path, (json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n").encode())
    write_atomically(folder / "results.md", table(report).encode())
    return report


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
