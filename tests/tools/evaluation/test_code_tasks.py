"""Infilling problems: records become problems, programs are put together as their authors do, pass@k is unbiased."""

import itertools
import math
import random

import pytest
from bubblewrap import needs_bubblewrap
from published_sets import records

from common.errors import UserError
from tools.evaluation.code_tasks import Infilling, infilling_problem, pass_at_k, passes, program
from tools.evaluation.sandbox import run_all

RECORD = {
    "task_id": "SingleLineInfilling/HumanEval/7/L1",
    "entry_point": "double",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "suffix": "    return y\n",
    "canonical_solution": "    y = 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}


def test_a_record_becomes_a_problem():
    problem = infilling_problem({**RECORD, "further": 1})
    assert problem == Infilling(
        task_id=RECORD["task_id"],
        prefix=RECORD["prompt"],
        suffix=RECORD["suffix"],
        middle=RECORD["canonical_solution"],
        entry_point="double",
        test=RECORD["test"],
    )


@pytest.mark.parametrize("field", sorted(RECORD))
def test_a_bad_record_names_its_field(field):
    without = {key: value for key, value in RECORD.items() if key != field}
    for bad in (without, {**RECORD, field: None}, {**RECORD, field: ["x"]}):
        with pytest.raises(UserError, match=f"field '{field}'"):
            infilling_problem(bad)


def test_entry_point_and_test_must_fit():
    with pytest.raises(UserError, match=r"'entry_point'.*Python name"):
        infilling_problem({**RECORD, "entry_point": "double) or (1"})
    with pytest.raises(UserError, match=r"'test'.*check\(candidate\)"):
        infilling_problem({**RECORD, "test": "pass"})


def test_the_program_is_that_of_the_authors():
    """prompt + completion + suffix, a new line, the tests, a new line, the call; nothing stripped."""
    text = program(infilling_problem(RECORD), "    y = x  \n")
    expected = RECORD["prompt"] + "    y = x  \n" + RECORD["suffix"] + "\n" + RECORD["test"] + "\ncheck(double)"
    assert text.rstrip("\n") == expected


@needs_bubblewrap
@pytest.mark.parametrize(
    ("middle", "right"),
    [
        ("    y = 2 * x\n", True),
        ("    return x + x\n", True),
        ("    y = x\n", False),
        ("    pass\n", False),
        ("", False),
        ("    y = (\n", False),
        ("    exit(0)\n", False),
        ("    import os; os._exit(0)\n", False),
        ('    y = """\n', False),
        ("    y = 2 * x\nexit(0)\n", False),
        ("    while True: pass\n", False),
    ],
)
def test_only_right_middles_pass(middle, right):
    assert passes(infilling_problem(RECORD), middle, timeout=1.0 if "while" in middle else 10.0) == right


@needs_bubblewrap
def test_the_authors_solutions_pass_and_stubs_fail():
    problems = [infilling_problem(record) for record in records("humaneval_single_line_infilling")]
    some = random.Random(0).sample(problems, 40)
    failed = [p.task_id for p, done in zip(some, run_all([program(p, p.middle) for p in some], 4)) if not done.passed]
    assert failed == []

    whole = [record for record in records("humaneval") if record["task_id"] in {f"HumanEval/{n}" for n in range(20)}]
    stubs = [program(infilling_problem({**record, "suffix": ""}), "    pass\n") for record in whole]
    assert len(stubs) == 20 and not any(done.passed for done in run_all(stubs, 4))


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "HumanEval-RandomSpanInfillingLight"])
def test_all_solutions_pass(name):
    problems = [infilling_problem({"suffix": "", **record}) for record in records(name)]
    assert len(problems) == 164
    done = run_all([program(p, p.middle) for p in problems], 4, timeout=30.0)
    assert [p.task_id for p, outcome in zip(problems, done) if not outcome.passed] == []


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("humaneval_single_line_infilling", 1033),
        ("HumanEval-MultiLineInfilling", 5815),
        ("HumanEval-RandomSpanInfilling", 1640),
        ("HumanEval-RandomSpanInfillingLight", 164),
    ],
)
def test_the_published_sets_read(name, count):
    """Every record is a problem; all problems of one function make the same source, up to blank lines."""
    problems = [infilling_problem(record) for record in records(name)]
    assert len(problems) == count == len({problem.task_id for problem in problems})
    sources: dict[str, set[str]] = {}
    for problem in problems:
        number = problem.task_id.split("/")[2]
        sources.setdefault(number, set()).add("".join((problem.prefix + problem.middle + problem.suffix).split()))
    assert len(sources) <= 164 and all(len(found) == 1 for found in sources.values())


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    """Against all draws of k from the samples, written out."""
    for samples in range(1, 7):
        for correct in range(samples + 1):
            right = [n < correct for n in range(samples)]
            for k in range(1, samples + 1):
                draws = [any(draw) for draw in itertools.combinations(right, k)]
                assert pass_at_k(samples, correct, k) == pytest.approx(sum(draws) / len(draws))


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(200, 0, 100) == 0.0 and pass_at_k(200, 200, 1) == 1.0 and pass_at_k(200, 101, 100) == 1.0
    product = math.prod(1 - 10 / n for n in range(191, 201))  # as the Codex paper computes it
    assert pass_at_k(200, 10, 10) == pytest.approx(1 - product)


def test_pass_at_k_needs_k_samples():
    for k in (0, 6, -1):
        with pytest.raises(UserError, match="5 samples"):
            pass_at_k(5, 1, k)
