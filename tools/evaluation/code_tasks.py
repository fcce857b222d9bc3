"""HumanEval infilling: a function with a gap, and the tests that say whether what was put there is right.

    problem = infilling_problem(record)             # a line of openai/human-eval-infilling
    passes(problem, generated_middle)               # True or False, run in a sandbox
    pass_at_k(samples, correct, 1)

The records are those of the single-line, multi-line and random-span sets, and HumanEval's own with a `suffix` of "".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

from .sandbox import run_program

FIELDS = ("task_id", "entry_point", "prompt", "suffix", "canonical_solution", "test")


@dataclass(frozen=True)
class Infilling:
    """One problem: `prefix`, a gap, `suffix`. `middle` is the author's solution of the gap."""

    task_id: str
    prefix: str
    suffix: str
    middle: str
    entry_point: str  # name of the function that `test` checks
    test: str  # source that defines check(candidate)


def infilling_problem(record: Mapping[str, Any]) -> Infilling:
    """The problem of a record. Raises UserError, which names the field, where one is missing or is not what it says."""
    name = record.get("task_id", "without a task_id")
    for field in FIELDS:
        if field not in record:
            raise UserError(f"record {name!r} has no field {field!r}; expected the fields {', '.join(FIELDS)}")
        if not isinstance(record[field], str):
            raise UserError(f"field {field!r} of record {name!r} is {record[field]!r}; expected a string")
    if not record["entry_point"].isidentifier():
        raise UserError(f"field 'entry_point' of record {name!r} is {record['entry_point']!r}; expected a Python name")
    if "def check(" not in record["test"]:
        raise UserError(f"field 'test' of record {name!r} does not define check(candidate)")
    return Infilling(
        task_id=record["task_id"],
        prefix=record["prompt"],
        suffix=record["suffix"],
        middle=record["canonical_solution"],
        entry_point=record["entry_point"],
        test=record["test"],
    )


def program(problem: Infilling, middle: str) -> str:
    """The source that runs the tests on `middle`, put together as in openai/human-eval-infilling."""
    function = problem.prefix + middle + problem.suffix
    return f"{function}\n{problem.test}\ncheck({problem.entry_point})\n"


def passes(problem: Infilling, middle: str, timeout: float = 10.0) -> bool:
    """Whether `middle` passes the tests in a sandbox. Raises UserError where there is no sandbox."""
    return run_program(program(problem, middle), timeout).passed


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k samples is right, from `samples` of which `correct` were: unbiased.

    1 − C(samples − correct, k) / C(samples, k), Eq. 1 of Chen et al. 2021, "Evaluating Large Language Models Trained
    on Code". Raises UserError where there are fewer than k samples.
    """
    assert 0 <= correct <= samples, f"{correct} of {samples} samples cannot be correct"
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} cannot be estimated from {samples} samples a problem; draw at least k, and k from 1")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
