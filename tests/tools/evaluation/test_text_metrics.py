"""Metrics of text: what they see in an answer, what they must not see, and that they agree with their definitions."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_sets import records

from tools.evaluation.text_metrics import (
    choice_letter,
    contains_answer,
    distinct_n,
    exact_match,
    first_number,
    last_number,
    majority,
    normalised,
    numbers,
    rouge,
    same_number,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles!", "beatles"),
        ("  a\tcat \n an  owl ", "cat owl"),
        ("theatre, another antenna", "theatre another antenna"),  # articles only as words
        ("U.S.A.", "usa"),
        ("“Sunset” Blvd.", "sunset blvd"),
        ("the", ""),
        ("ÉCOLE", "école"),
    ],
)
def test_what_does_not_count_is_taken_from_an_answer(text, expected):
    assert normalised(text) == expected


@settings(max_examples=50)
@given(st.text())
def test_normalising_ignores_case_and_space(text):
    assert normalised(f"  {text}\n") == normalised(text)
    assert normalised(normalised(text)) in (normalised(text), " ".join(normalised(text).split()))
    assert not set(normalised(text)) & set('.,!?"')


def test_an_answer_is_found_inside_a_text_and_matched_as_a_whole():
    aliases = ["Sunset Blvd.", "Sunset Boulevard"]
    assert contains_answer("It was the SUNSET boulevard, in 1993", aliases)
    assert not exact_match("It was the SUNSET boulevard, in 1993", aliases)
    assert exact_match("the sunset boulevard!", aliases) and contains_answer("the sunset boulevard!", aliases)
    assert contains_answer("at the party", ["art"])  # a substring, as the authors count
    for unrelated in ("", "Sunset", "Boulevard Sunset", "the"):
        assert not contains_answer(unrelated, aliases) and not exact_match(unrelated, aliases)


def test_an_alias_of_nothing_matches_nothing():
    for text in ("", "whatever", "The"):
        assert not contains_answer(text, ["The", "!", ""]) and not exact_match(text, ["The", "!", ""])
    assert not contains_answer("text", []) and not exact_match("text", [])


def test_normalised_aliases_of_triviaqa_agree():
    """The set brings its aliases normalised by its authors, who put a space for a hyphen; else ours are the same."""
    agree = total = 0
    for record in records("triviaqa_rc_wikipedia_nocontext_validation")[:2000]:
        answer = record["answer"]
        theirs = {name.replace(" ", "") for name in answer["normalized_aliases"]}
        agree += sum(normalised(alias).replace(" ", "") in theirs for alias in answer["aliases"])
        total += len(answer["aliases"])
    assert agree / total > 0.98


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", [18]),
        ("The total is $1,234.50.", [1234.5]),
        ("3,000,000", [3e6]),
        ("1, 2, 3", [1, 2, 3]),
        ("-5", [-5]),
        ("−5 degrees", [-5]),
        ("-$5 or $-5", [-5, -5]),
        ("16-3=13", [16, 3, 13]),
        ("(4)-2", [4, 2]),
        ("50% of 80", [50, 80]),
        ("It is 7.", [7]),
        (".5 and 0.25", [0.5, 0.25]),
        ("5km", [5]),
        ("none, - $ . ,", []),
        ("9" * 400, []),
        ("", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text, expected):
    assert numbers(text) == expected
    assert first_number(text) == (expected[0] if expected else None)
    assert last_number(text) == (expected[-1] if expected else None)


@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=5))
def test_written_numbers_come_back(values):
    for text in (" ".join(f"{value:,}" for value in values), ", then ".join(map(str, values)) + "."):
        assert numbers(text) == values


def test_the_marked_answer_of_gsm8k_wins():
    text = "16 - 3 = 13 eggs.\n#### 18\n\nQuestion: 5 apples and 7 pears"
    assert first_number(text) == last_number(text) == 18
    assert last_number("#### $2,125.50 for 3") == 2125.5
    assert last_number("16 eggs, 9 left ####") == 9  # nothing behind it


def test_all_answers_of_gsm8k_are_read():
    for record in records("gsm8k_test_first_1119"):
        expected = float(record["answer"].rpartition("####")[2].replace(",", ""))
        assert last_number(record["answer"]) == first_number(record["answer"]) == expected


def test_same_number():
    assert (
        same_number(18, 18.0) and same_number(1 / 3, 0.33333334) and same_number(0.1 + 0.2, 0.3) and same_number(0, 0)
    )
    assert not same_number(18, 19) and not same_number(18, -18) and not same_number(0.33, 1 / 3)
    assert not same_number(None, None) and not same_number(None, 0) and not same_number(0, None)


@pytest.mark.parametrize("letter", "ABCDE")
@pytest.mark.parametrize(
    "form",
    [
        "({})",
        "{}",
        " {}\n",
        "{}.",
        "{}) because 7 > 3",
        "{}\nQuestion: what is (A)?",
        "The answer is {}",
        "The answer is ({}).",
        "the answer is: {}.",
        "Answer: {}",
        "So A cow has option {}, and not (E).",
        "Because 3 x 4 = 12, it must be {}.",
        "We choose **{}**",
        "\\boxed{{{}}}",
        "A man has 3 apples. The answer is {}",
    ],
)
def test_a_choice_is_found(letter, form):
    assert choice_letter(form.format(letter)) == letter


def test_small_letters_in_brackets_are_choices():
    assert choice_letter("(b)") == "B" and choice_letter("the answer is (d)") == "D"


@pytest.mark.parametrize(
    "text",
    ["", "A man walks into a bar", "the answer is a dog", "F", "(F)", "the answer is 12", "U.S.A.", "BAD", "DNA"],
)
def test_no_choice_is_made_up(text):
    assert choice_letter(text) is None


def test_majority():
    assert majority([1, 2, 2]) == 2 and majority(["b", "a", "a", "b"]) == "b" and majority([3]) == 3
    assert majority([None, None, None, 7]) == 7
    assert majority([None, None]) is None and majority([]) is None
    assert majority([0.0, 1.0, 0.0, None, None, None]) == 0.0  # zero is an answer


def test_rouge_is_its_definition():
    """F-measures of shared unigrams, bigrams and of the longest common subsequence, counted by hand."""
    scores = rouge("the cat sat on the mat", "the cat lay on a mat")
    assert scores == pytest.approx({"rouge1": 2 * 4 / 12, "rouge2": 2 * 1 / 10, "rougeL": 2 * 4 / 12})
    order = rouge("one two three", "three two one")
    assert order == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 1 / 3})
    assert rouge("same words here", "Same words, here!") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert set(rouge("something", "").values()) == {0}


def test_rouge_does_not_stem():
    assert rouge("she was running", "she was run")["rouge1"] == pytest.approx(2 / 3)


def test_distinct_n_is_its_definition():
    assert distinct_n([[1, 2, 1, 2]], 1) == 2 / 4
    assert distinct_n([[1, 2, 1, 2]], 2) == 2 / 3
    assert distinct_n([[1, 2], [1, 2]], 2) == 1 / 2  # over all texts, and no n-gram across two
    assert distinct_n([[1, 2], [3, 4]], 2) == 1.0
    assert distinct_n([[1], []], 2) == distinct_n([], 1) == 0.0


def test_repetition_lowers_distinct_n():
    words = random.Random(0).choices(range(50), k=200)
    assert distinct_n([words * 2], 2) < distinct_n([words], 2)
    assert distinct_n([words, words], 2) == distinct_n([words], 2) / 2
