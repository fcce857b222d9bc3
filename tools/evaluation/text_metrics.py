"""Metrics of generated text: answers, numbers, choices, ROUGE, diversity. Text in, numbers out; nothing else is read.

Only `rouge` needs a library, of the extra `eval`.
"""

import functools
import math
import re
import string
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

from common.errors import UserError

Answer = TypeVar("Answer", bound=Hashable)

QUOTES = "‘’´`“”"  # what TriviaQA's evaluation deletes too, and the double ones
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation + QUOTES)

# A minus counts where it cannot be a subtraction: "-5", "$-5" and "-$5", but not "16-3".
NUMBER = re.compile(
    r"(?:(?<![\w)\]%.])(?P<minus>[-−]))?\$?(?P<inner_minus>(?<=\$)[-−])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)
FINAL_ANSWER = "####"  # in front of the answer in GSM8K

# What names a choice, the surest first. A lone capital A is mostly an article, so it needs what follows.
CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*[(\[{]?([A-E])\b(?!['’])",
        r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*[(\[{]([a-e])[)\]}]",
        r"^\s*([A-E])(?:[.):,]|\s*$|\s*\n)",
        r"[(\[{]([A-Ea-e])[)\]}]",
        r"(?<![\w.])([A-E])(?=[.):,](?:\s|$)|\s*$)",
        r"(?<![\w.])([B-E])(?![\w.'’])",
    )
)


def normalised(text: str) -> str:
    """An answer without what does not count: case, punctuation, the words a, an and the, and white space.

    The normalisation of SQuAD's evaluation, with TriviaQA's further quotation marks.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def contains_answer(text: str, aliases: Iterable[str]) -> bool:
    """Whether one of the right answers stands somewhere in the text, both normalised.

    As the paper counts TriviaQA: the answer may be a part of a word ("art" is in "party"). An alias of which nothing
    is left, such as "The", is never found.
    """
    found = normalised(text)
    return any(alias and alias in found for alias in map(normalised, aliases))


def exact_match(text: str, aliases: Iterable[str]) -> bool:
    """Whether the text is one of the right answers, both normalised. No alias of which nothing is left matches."""
    found = normalised(text)
    return bool(found) and any(alias == found for alias in map(normalised, aliases))


def rouge(reference: str, text: str) -> dict[str, float]:
    """F-measures "rouge1", "rouge2" and "rougeL", from 0 to 1, without stemming; the package rouge_score computes."""
    return {name: score.fmeasure for name, score in _rouge_scorer().score(reference, text).items()}


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("ROUGE needs the package rouge_score; pip install 'diffullama[eval]'") from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def numbers(text: str) -> list[float]:
    """All numbers of a text, in order: "$1,234.50" is 1234.5, "50%" is 50, "16-3" is 16 and 3."""
    found = []
    for match in NUMBER.finditer(text):
        value = float(match["digits"].replace(",", ""))
        if math.isfinite(value):  # hundreds of digits are no answer
            found.append(-value if match["minus"] or match["inner_minus"] else value)
    return found


def first_number(text: str) -> float | None:
    """The first number, or the one after the first `####` where a number follows it; None where there is none."""
    final = numbers(text.partition(FINAL_ANSWER)[2])
    return (final or numbers(text) or [None])[0]


def last_number(text: str) -> float | None:
    """The last number, or the one after the first `####` where a number follows it; None where there is none.

    After a `####` the first one: what a model writes behind its answer is often another question.
    """
    final = numbers(text.partition(FINAL_ANSWER)[2])
    return final[0] if final else (numbers(text) or [None])[-1]


def same_number(a: float | None, b: float | None) -> bool:
    """Whether two numbers are equal up to rounding, 1e-6 of their size; no number equals nothing, itself included."""
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def choice_letter(text: str) -> str | None:
    """The letter A to E that a generated answer chooses: "(B)", "B.", "The answer is B"; None where there is none."""
    plain = text.replace("*", "")  # bold, in Markdown
    for pattern in CHOICES:
        found = pattern.search(plain)
        if found:
            return found[1].upper()
    return None


def majority(answers: Iterable[Answer | None]) -> Answer | None:
    """The most frequent answer, of several the one that came first; None does not count, and is what nothing gives."""
    counts: dict[Answer, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=lambda answer: counts[answer], default=None)


def distinct_n(texts: Iterable[Sequence[int]], n: int) -> float:
    """The share of different n-grams among all n-grams of the texts, from token ids; 0 where no text has n tokens.

    Li et al. 2016, "A Diversity-Promoting Objective Function". It falls with the amount of text: compare equal sizes.
    """
    assert n >= 1, f"n-grams have at least one token, not {n}"
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
