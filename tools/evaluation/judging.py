"""How a task's answers are judged: a document and the model's answers to numbers, one an example.

lm-eval calls these as `process_results(doc, results)`: `results` holds one text, or where several were drawn a list.
"""

import string
from collections.abc import Callable
from typing import Any

from . import code_tasks, text_metrics


def _hit(right: object) -> dict[str, float]:
    return {"accuracy": float(bool(right))}


def rouge(doc: dict, results: list) -> dict[str, float]:
    """ROUGE-1, 2 and L (F) of the sentence found."""
    return text_metrics.rouge(doc["infill"]["middle"].strip(), results[0].strip())


def code(doc: dict, results: list) -> dict[str, float]:
    """Whether the function with the text in its gap passes its tests, in a sandbox."""
    problem = code_tasks.infilling_problem(doc)
    middle = results[0]
    if doc["infill"]["middle"].endswith("\n") and not middle.endswith("\n"):
        middle += "\n"  # a line was asked for, and ends where it ends
    return _hit(code_tasks.passes(problem, middle))


def code_line(doc: dict, results: list) -> dict[str, float]:
    """As `code`, where one line is asked for: the first that is not blank."""
    lines = [line for line in results[0].split("\n") if line.strip()]
    return code(doc, lines[:1] or [""])


def word_counted_twice(doc: dict, results: list) -> dict[str, float]:
    """The authors' LAMBADA: 2 for a hit."""
    text = results[0][0] if isinstance(results[0], list) else results[0]
    return {"accuracy": 2.0 * (text.strip() == doc["infill"]["middle"].strip())}


def contains(doc: dict, results: list) -> dict[str, float]:
    """Whether the text has one of the answers in it."""
    return _hit(text_metrics.contains_answer(results[0], doc["answers"]))


def last_number(doc: dict, results: list) -> dict[str, float]:
    """GSM8K: the last number of the text; strictly, the one after ####."""
    _, mark, after = results[0].rpartition("####")
    strict = mark and text_metrics.same_number(text_metrics.first_number(after), doc["number"])
    loose = text_metrics.same_number(text_metrics.last_number(results[0]), doc["number"])
    return {"accuracy": float(bool(loose)), "accuracy_strict": float(bool(strict))}


def first_number(doc: dict, results: list) -> dict[str, float]:
    """The first number of the text."""
    return _hit(text_metrics.same_number(text_metrics.first_number(results[0]), doc["number"]))


def final_number(doc: dict, results: list) -> dict[str, float]:
    """The last number of the text, after steps of reasoning."""
    return _hit(text_metrics.same_number(text_metrics.last_number(results[0]), doc["number"]))


def letter(doc: dict, results: list) -> dict[str, float]:
    """The letter of an option."""
    return _hit(text_metrics.choice_letter(results[0]) == doc["answer"])


def final_letter(doc: dict, results: list) -> dict[str, float]:
    """The letter of an option, after steps of reasoning that end in `the answer is`."""
    return _hit(text_metrics.choice_letter(results[0].rpartition("answer is")[2]) == doc["answer"])


def _several(answers: list[Any], right: Callable[[Any], bool]) -> dict[str, float]:
    """The most frequent of the answers, and any of them."""
    most = text_metrics.majority(answers)
    return {
        "self_consistency": float(most is not None and right(most)),
        "hit_at_k": float(any(a is not None and right(a) for a in answers)),
    }


def several_numbers(doc: dict, results: list) -> dict[str, float]:
    """The first numbers of several texts."""
    found = [text_metrics.first_number(text) for text in results[0]]
    return _several(found, lambda number: text_metrics.same_number(number, doc["number"]))


def several_letters(doc: dict, results: list) -> dict[str, float]:
    """The letters of several texts."""
    return _several([text_metrics.choice_letter(text) for text in results[0]], lambda found: found == doc["answer"])


def several_texts(doc: dict, results: list) -> dict[str, float]:
    """Several texts, the same up to what lm-eval's exact match of TriviaQA ignores; empty ones are no answer."""
    right = {_plain(alias) for alias in doc["answer"]["aliases"]}
    return _several([_plain(text) or None for text in results[0]], lambda text: text in right)


def _plain(text: str) -> str:
    """A text without capitals, punctuation and the space around it."""
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))
