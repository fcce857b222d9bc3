"""Evaluated models beside each other: reads results.json and samples/, and compares example by example. Not a verb.

In: folders written by `tools.evaluate` or `tools.nelbo`. Out: `Comparison`, the scores of all, and of each later model
its paired differences from the first, with bootstrap intervals.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from common.errors import UserError

LEVEL = 0.95  # of the intervals
NUMBERS_AT_ONCE = 4_000_000  # drawn while resampling: bounds its memory
# metrics by the beginning of their names; a loss is better when it is lower
LOWER_IS_BETTER = ("nelbo", "nll", "loss", "perplexity", "generative_perplexity", "bits_per_", "ce_to_t")
NO_DIFFERENCE = ("batch_size", "output", "device")  # settings that decide nothing about the scores


@dataclass(frozen=True)
class Example:
    """One line of samples/TASK.jsonl. `weight` is 1, or of a row of a corpus its tokens."""

    doc: Any
    metrics: dict[str, float]
    weight: float = 1.0


@dataclass
class Evaluation:
    """One folder of results."""

    path: Path
    label: str  # tells it from the other folders
    content: dict[str, Any]  # of results.json

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        return self.content["tasks"]

    def score(self, task: str, metric: str) -> tuple[float, float | None, int | None] | None:
        """(score, standard error, examples), the last two None where they are not given; None without the metric."""
        found = self.tasks.get(task, {})
        if not is_number(found.get(metric)):
            return None
        stderr = found.get(f"{metric}_stderr", found.get("stderr") if found["metric"] == metric else None)
        n = found.get("n")
        return found[metric], stderr if is_number(stderr) else None, n if isinstance(n, int) else None


@dataclass(frozen=True)
class Difference:
    """A later model's score less the first's, on the examples of both."""

    task: str
    metric: str
    first: str  # labels
    later: str
    value: float
    low: float  # of the interval
    high: float
    n: int  # examples of both
    only_first: int  # examples left out, since the other model has none
    only_later: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "" where the interval holds 0."""
        if not self.clear:
            return ""
        return "better" if (self.value > 0) != lower_is_better(self.metric) else "worse"


@dataclass
class Comparison:
    """All that is shown."""

    evaluations: list[Evaluation]
    columns: list[tuple[str, str]]  # (task, metric) in the order in which they were found
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be compared, and what to know of a score


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def lower_is_better(metric: str) -> bool:
    return metric.startswith(LOWER_IS_BETTER)


def read_evaluations(folders: Sequence[str | Path]) -> list[Evaluation]:
    """The folders in their order. Raises UserError for one without results, or with damaged ones."""
    paths = [Path(folder) for folder in folders]
    return [Evaluation(path, label, _read_results(path)) for path, label in zip(paths, labels(paths))]


def labels(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell the folders apart; the same folder twice is numbered."""
    parts = [path.resolve().parts for path in paths]
    found: list[str] = []
    for own in parts:
        others = {other for other in parts if other != own}
        length = next(n for n in range(1, len(own) + 1) if n == len(own) or own[-n:] not in {o[-n:] for o in others})
        name = "/".join(own[-length:])
        twice = parts[: len(found)].count(own)
        found.append(f"{name} ({twice + 1})" if twice else name)
    return found


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a finished --output of `python -m tools.evaluate` or "
            "`python -m tools.nelbo`"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; evaluate the model again") from None
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        raise UserError(f"{path} names no task; expected an object with `tasks`, as `python -m tools.evaluate` writes")
    for task, scores in tasks.items():
        metric = scores.get("metric") if isinstance(scores, dict) else None
        if not isinstance(metric, str):
            raise UserError(f"{path}: task {task} does not say which `metric` is the main one")
        value = scores.get(metric)
        if not is_number(value):
            raise UserError(f"{path}: task {task}: its {metric} is {value!r}, expected a number")
    return content


def read_examples(folder: Path, task: str) -> dict[Any, Example] | None:
    """The examples of a task by doc_id; None without a file. Raises UserError that names the line of a damaged one."""
    root = folder / "samples"
    path = root / f"{task}.jsonl"
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder / 'results.json'}: a task is called {task!r}, which is no name of a file in {root}")
    if not path.is_file():
        return None
    found: dict[Any, Example] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; evaluate the model again") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key = record["doc_id"]
            example = Example(record["doc"], dict(record["metrics"]), float(record.get("weight", 1.0)))
            known = key in found
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: expected JSON with doc_id, doc and metrics, found {error!r}; evaluate again"
            ) from None
        if known:
            raise UserError(f"{path}:{number}: doc_id {key!r} stands there twice; evaluate the model again")
        found[key] = example
    return found


def paired_interval(
    first: np.ndarray,
    later: np.ndarray,
    first_weights: np.ndarray,
    later_weights: np.ndarray,
    resamples: int,
    generator: np.random.Generator,
) -> tuple[float, float, float]:
    """(difference of the weighted means, and the ends of its percentile bootstrap interval); all arrays are (n,).

    Examples are resampled, each with what both models have on it, so what makes an example hard for both cancels.
    """

    def difference(a: np.ndarray, b: np.ndarray, wa: np.ndarray, wb: np.ndarray, axis: int = -1) -> np.ndarray:
        return (b * wb).sum(axis) / wb.sum(axis) - (a * wa).sum(axis) / wa.sum(axis)

    arrays = (first, later, first_weights, later_weights)
    value = float(difference(*arrays))
    if all(np.ptp(weights) == 0 for weights in arrays[2:]):
        data: tuple[np.ndarray, ...] = (later - first,)
        statistic: Any = np.mean
    else:
        data, statistic = arrays, difference
    found = bootstrap(
        data, statistic, paired=True, vectorized=True, n_resamples=resamples, confidence_level=LEVEL,
        method="percentile", rng=generator, batch=max(1, NUMBERS_AT_ONCE // len(first)),
    )  # fmt: skip
    return value, float(found.confidence_interval.low), float(found.confidence_interval.high)


def compare(evaluations: list[Evaluation], resamples: int, seed: int) -> Comparison:
    """Scores, and the differences of the later models from the first.

    Raises UserError where examples of the same id differ, or where no later model has a task in common with the first.
    """
    columns = list(dict.fromkeys((task, scores["metric"]) for one in evaluations for task, scores in one.tasks.items()))
    comparison = Comparison(evaluations, columns)
    first, *rest = evaluations
    strangers = [later for later in rest if not first.tasks.keys() & later.tasks.keys()]
    if rest and strangers == rest:
        raise UserError(
            f"no model has a task in common with the first: {first.path} has {', '.join(sorted(first.tasks))}, "
            f"{rest[0].path} has {', '.join(sorted(rest[0].tasks))}"
        )
    comparison.notes += [f"{later.label} has no task in common with {first.label}" for later in strangers]
    comparison.notes += _notes_of_scores(evaluations)
    for task, metric in columns:
        have = [later for later in rest if task in later.tasks]
        if task not in first.tasks or not have:
            continue
        reference = read_examples(first.path, task)
        for later in have:
            note = _obstacle(first, later, task, metric)
            found = None if note else _difference(first, later, task, metric, reference, resamples, seed)
            if isinstance(found, Difference):
                comparison.differences.append(found)
            else:
                comparison.notes.append(note or str(found))
    return comparison


def _obstacle(first: Evaluation, later: Evaluation, task: str, metric: str) -> str | None:
    """Why a metric of a task, which both have, cannot be compared; None where it can."""
    for one in (first, later):
        if one.score(task, metric) is None:
            return f"{task}: {one.label} has no {metric}, so it is not compared with that of the other"
    return None


def _difference(
    first: Evaluation,
    later: Evaluation,
    task: str,
    metric: str,
    reference: dict[Any, Example] | None,
    resamples: int,
    seed: int,
) -> Difference | str:
    """The paired difference, or the reason that there is none."""
    others = read_examples(later.path, task)
    for one, examples in ((first, reference), (later, others)):
        if examples is None:
            return f"{task}: {one.path / 'samples' / f'{task}.jsonl'} is missing, so {later.label} is not compared"
    assert reference is not None and others is not None, "missing samples were reported above"
    common = [key for key in reference if key in others]
    for key in common:
        if reference[key].doc != others[key].doc:
            raise UserError(
                f"{later.path / 'samples' / f'{task}.jsonl'}: doc_id {key!r} is another example than in "
                f"{first.path / 'samples' / f'{task}.jsonl'}: these are not the same data; evaluate both on one file"
            )
    for one, examples in ((first, reference), (later, others)):
        if any(not isinstance(examples[key].metrics.get(metric), int | float) for key in common):
            return f"{task}: the examples of {one.label} have no {metric}, so it is not compared"
    if len(common) < 2:
        return f"{task}: {first.label} and {later.label} have {len(common)} examples in common, too few to compare"
    pair = [[examples[key] for key in common] for examples in (reference, others)]
    values = [np.array([example.metrics[metric] for example in side], dtype=float) for side in pair]
    weights = [np.array([example.weight for example in side], dtype=float) for side in pair]
    if not all(np.isfinite(array).all() for array in values + weights) or min(w.min() for w in weights) < 0:
        return f"{task}: some examples have a {metric} or a weight that is no number, so {later.label} is not compared"
    key = int.from_bytes(hashlib.sha256(f"{task}\n{metric}".encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, key])
    value, low, high = paired_interval(values[0], values[1], weights[0], weights[1], resamples, generator)
    return Difference(
        task, metric, first.label, later.label, value, low, high,
        len(common), len(reference) - len(common), len(others) - len(common),
    )  # fmt: skip


def _notes_of_scores(evaluations: list[Evaluation]) -> list[str]:
    """What the results say of their own scores, and where settings differ from the first model's."""
    notes = []
    for one in evaluations:
        notes += [f"{task} of {one.label}: {found['note']}" for task, found in one.tasks.items() if found.get("note")]
    for task in dict.fromkeys(task for one in evaluations for task, found in one.tasks.items() if "nelbo" in found):
        exact = [one.label for one in evaluations if one.tasks.get(task, {}).get("exact")]
        bounds = [one.label for one in evaluations if task in one.tasks and one.label not in exact]
        if exact and bounds:
            notes.append(
                f"{task}: exact for {', '.join(exact)}, an upper bound for {', '.join(bounds)}, whose loss may be less"
            )
    first = evaluations[0]
    for later in evaluations[1:]:
        same_kind = first.content.get("kind") == later.content.get("kind")  # else likelihoods differ anyway
        here, there = _settings(first, same_kind), _settings(later, same_kind)
        differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if differing:
            listed = "; ".join(f"{name}: {here.get(name)} and {there.get(name)}" for name in differing)
            notes.append(f"{first.label} and {later.label} were evaluated with other settings: {listed}")
    return notes


def _settings(one: Evaluation, likelihood: bool) -> dict[str, Any]:
    """All that was said of how a model was evaluated, by name; of its `likelihood` only if that is wanted."""
    found = {"seed": one.content.get("seed")} if likelihood else {}
    for group in ("likelihood", "settings") if likelihood else ("settings",):
        values = one.content.get(group)
        if isinstance(values, dict):
            found |= {f"{group}.{name}": value for name, value in values.items() if name not in NO_DIFFERENCE}
    return found


def left_out(differences: Iterable[Difference]) -> list[str]:
    """A line for each comparison that leaves out examples."""
    return [
        f"{d.task}: {d.later} is compared with {d.first} on {d.n} examples; {d.only_first} of {d.first} and "
        f"{d.only_later} of {d.later} are left out, since the other has none of that id"
        for d in differences
        if d.only_first or d.only_later
    ]
