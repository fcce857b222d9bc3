"""What stands between a model's answer and a number in the table: examples, prompts, judges, what is remembered."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_model import tiny_data

from common.errors import UserError
from tools import evaluate
from tools.evaluation import examples, judging
from tools.evaluation import run as running
from tools.evaluation.answers import Answers
from tools.evaluation.documents import find_file
from tools.evaluation.harness import Asked, Evaluated, batches, cut
from tools.evaluation.likelihood import Score
from tools.evaluation.results import Example, Result, per_token_choice, table, write_results
from tools.evaluation.tasks import GROUPS, TASKS, chosen


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("details") / "data")


class Recorder(Evaluated):
    """Notes what it is asked; says what `say` says; a shorter continuation is likelier."""

    kind = "masked_diffusion"
    eot_token_id = 0

    def __init__(self, folder, say=lambda asked: "", batch_size=32):
        super().__init__(Answers(folder), batch_size, torch.device("cpu"), progress=False)
        self.say, self.seen, self.sizes = say, [], []

    def score(self, asked):
        self.seen += asked
        self.sizes.append(len(asked))
        return [Score(-float(len(a.continuation)), 0.5, len(a.continuation.split()), False) for a in asked]

    def write(self, asked):
        self.seen += asked
        self.sizes.append(len(asked))
        return [self.say(a) for a in asked]

    def size(self, asked):
        return len(asked.context), 1

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return [ord(c) for c in string]

    def _loglikelihood_tokens(self, requests, **kwargs):
        raise AssertionError("a task asks by texts, which score and write answer")

    loglikelihood_rolling = _loglikelihood_tokens


def recorded(name, data, folder, say=lambda asked: "", num_fewshot=None, **how):
    """(what was asked, in the order of lengths; the result)."""
    lm = Recorder(folder, say)
    prepared = running.prepare([name], "masked_diffusion", str(data), num_fewshot)
    return lm.seen, running.evaluate(lm, prepared, num_fewshot=num_fewshot, **how)[name]


# judges


@pytest.mark.parametrize(
    ("judge", "doc", "text", "expected"),
    [
        (judging.last_number, {"number": 5.0}, "2 and 3 are 5", (1, 0)),
        (judging.last_number, {"number": 5.0}, "5 is 2 and 3", (0, 0)),
        (judging.last_number, {"number": 5.0}, "It is 4.\n#### 5", (1, 1)),
        (judging.last_number, {"number": 5.0}, "5\n#### 4", (0, 0)),
        (judging.first_number, {"number": 5.0}, "5 of 7", (1,)),
        (judging.first_number, {"number": 5.0}, "7 of 5", (0,)),
        (judging.final_number, {"number": 5.0}, "7 of 5", (1,)),
        (judging.final_number, {"number": 5.0}, "5 of 7", (0,)),
        (judging.letter, {"answer": "B"}, " (B)", (1,)),
        (judging.letter, {"answer": "B"}, " (C)", (0,)),
        (judging.letter, {"answer": "B"}, " nothing", (0,)),
        (judging.final_letter, {"answer": "B"}, "Not (A). Therefore, the answer is B.", (1,)),
        (judging.final_letter, {"answer": "A"}, "Not (A). Therefore, the answer is B.", (0,)),
        (judging.final_letter, {"answer": "B"}, "The answer is A? The answer is C? The answer is B.", (1,)),
        (judging.contains, {"answers": ["red", "bright red"]}, "It is Red!", (1,)),
        (judging.contains, {"answers": ["red", "bright red"]}, "It is blue.", (0,)),
        (judging.word_counted_twice, examples.last_word({"text": "a big fox"}), " fox ", (2,)),
        (judging.word_counted_twice, examples.last_word({"text": "a big fox"}), " foxes", (0,)),
    ],
)
def test_a_judge_counts_the_right_answer_alone(judge, doc, text, expected):
    assert tuple(judge(doc, [text]).values()) == expected


def test_of_several_answers_the_most_frequent_is_judged_and_any_may_hit():
    for answers, consistent, hit in (
        (["4", "5", "5"], 1, 1),
        (["5 of 9", "4", "4"], 0, 1),
        (["5 of 9", "5", "9"], 1, 1),
        (["4", "3"], 0, 0),
        (["none", "none", "5"], 1, 1),
    ):
        found = judging.several_numbers({"number": 5.0}, [answers])
        assert found == {"self_consistency": consistent, "hit_at_k": hit}, answers
    assert judging.several_letters({"answer": "B"}, [["(A)", "(B)", "B."]])["self_consistency"] == 1
    doc = {"answer": {"aliases": ["The King"]}}
    assert judging.several_texts(doc, [["a queen", "The king", " the king!"]]) == {"self_consistency": 1, "hit_at_k": 1}


def test_rouge_compares_the_text_with_what_stood_there():
    doc = examples.gap("", " the fox ran", "")
    assert set(judging.rouge(doc, [" the fox ran "]).values()) == {1.0}
    assert judging.rouge(doc, ["the fox"])["rouge1"] == pytest.approx(0.8)
    assert set(judging.rouge(doc, ["a hen"]).values()) == {0.0}


def test_a_line_is_judged_with_its_end_and_other_gaps_as_they_are(monkeypatch):
    ran = []
    monkeypatch.setattr(judging.code_tasks, "passes", lambda problem, middle: ran.append(middle))
    record = {"task_id": "t", "entry_point": "f", "prompt": "def f():\n", "suffix": "", "test": "def check(f): ..."}
    for middle, text in (("    return 1\n", "    return 2"), ("    return 1\n", "    return 2\n"), ("1", "2")):
        judging.code(examples.code({**record, "canonical_solution": middle}), [text])
    assert ran == ["    return 2\n", "    return 2\n", "2"]


# examples


@pytest.mark.parametrize("right", ["1", "2", 1, 2])
def test_the_third_of_five_sentences_is_to_be_found_and_the_right_ending_follows(right):
    record = {f"InputSentence{n}": f"S{n}." for n in range(1, 5)}
    record |= {"RandomFifthSentenceQuiz1": "E1.", "RandomFifthSentenceQuiz2": "E2.", "AnswerRightEnding": right}
    assert examples.story(record) == examples.gap("S1. S2.", " S3.", f" S4. E{right}.")


def test_stories_are_split_where_sentences_end():
    found = examples.story({"text": "He is old. He said 'Go!' She left. 'Why?' Nobody knew."})
    assert found == examples.gap("He is old. He said 'Go!'", " She left.", " 'Why?' Nobody knew.")
    assert examples.story({"text": "A. B! C? D. E."}) == examples.gap("A. B!", " C?", " D. E.")
    assert examples.story({"text": "A. B. C. D."}) is None
    assert examples.story({"text": "A. B. C. D. E. F."}) is None
    with pytest.raises(UserError, match="neither"):
        examples.story({"story": "A."})


def test_records_become_what_is_asked():
    assert examples.last_word({"text": "a big red fox"}) == examples.gap("a big red", " fox", "")
    found = examples.squad({"context": "C.", "question": "Q?", "answers": {"text": ["red", "bright red"]}})
    assert found == {**examples.gap("C.\nQuestion: Q?\nAnswer:", " bright red", ""), "answers": ["red", "bright red"]}
    assert examples.trivia({"question": "Who?", "answer": {"aliases": ["a", "b"]}})["question"] == "Who"
    assert examples.gsm8k({"question": "?", "answer": "1,000 and 4 are 1,004.\n#### 1,004"})["number"] == 1004
    mawps = {"question": "Q", "answer": "2", "number": 2.0}
    assert examples.mawps({"original_text": "Q", "ans": 2.0}) == mawps == examples.mawps({"question": "Q", "result": 2})
    code = examples.code({"prompt": "p", "canonical_solution": "m", "suffix": "s"})
    assert code["infill"] == examples.gap("p", "m", "s")["infill"] and "instruction" not in code
    assert "instruction" in examples.code_with_instruction({"prompt": "p", "canonical_solution": "m", "suffix": "s"})
    chase = {"option1": "a", "option2": "b", "answer": "1"}
    assert examples.winogrande({**chase, "sentence": "no"}) is None
    assert examples.winogrande({**chase, "sentence": "a _"}) and examples.last_word({"text": "fox"}) is None


def test_sat_math_is_asked_with_its_passage_and_letters_and_ends_its_steps_with_the_answer():
    record = {"passage": "P.", "question": "Q?", "options": ["(A)1", "(B)2", "(C)3"], "label": "B"}
    found = examples.sat_math({**record, "other": {"solution": "So\nit is."}})
    asked = "Question: P.\nQ?\nOptions: (A)1 (B)2 (C)3\n"
    assert found["problem"] == f"{asked}Answer: Among A through C, the answer is"
    assert found["problem_in_steps"] == f"{asked}Explanation:"
    assert found["solution"] == "So it is. Therefore, the answer is B."
    assert examples.sat_math({**record, "passage": None})["problem"].startswith("Question: Q?\n")
    assert judging.final_letter(found, [found["solution"]]) == {"accuracy": 1}


def test_a_file_is_found_whatever_its_capitals_and_an_exact_name_goes_first(tmp_path):
    for name in ("Social-I-QA_dev.jsonl", "mawps-test.jsonl.gz", "mawps.jsonl", "lambada.json", "gsm8k_train.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert find_file(tmp_path, ["social_i_qa", "siqa"]).name == "Social-I-QA_dev.jsonl"
    assert find_file(tmp_path, ["mawps_test", "mawps"]).name == "mawps-test.jsonl.gz", "the best name first"
    assert find_file(tmp_path, ["mawps"]).name == "mawps.jsonl", "that is its whole name"
    assert find_file(tmp_path, ["lambada"]) is None and find_file(tmp_path, ["gsm8k_test"]) is None
    (tmp_path / "mawps.jsonl").unlink()
    (tmp_path / "mawps_train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="several"):
        find_file(tmp_path, ["mawps"])


# what a model is asked


def test_examples_before_a_question_are_none_of_the_questions(data, tmp_path):
    seen, result = recorded("sat_math_few_shot", data, tmp_path / "a", lambda a: " B")
    assert len(seen) == result.scores()["n"] == 2, "of six, four stand before the questions"
    for asked in seen:
        shown = [part.split(" ?")[0] for part in asked.context.split("x = ")[1:]]
        assert shown[:4] == ["2", "3", "4", "5"] and shown[4:] in (["0"], ["1"])
        assert asked.context.count("the answer is B") == 4 and asked.context.endswith("the answer is")
    assert result.scores()["accuracy"] == 1
    seen, result = recorded("sat_math_few_shot", data, tmp_path / "b", num_fewshot=1)
    assert {a.context.count("x = ") for a in seen} == {2} and result.scores()["n"] == 5
    seen, result = recorded("sat_math_few_shot", data, tmp_path / "c", num_fewshot=0)
    assert {a.context.count("x = ") for a in seen} == {1} and result.scores()["n"] == 6
    seen, _ = recorded("sat_math_cot", data, tmp_path / "d", num_fewshot=1)
    assert all("Explanation: So. Therefore, the answer is B." in a.context for a in seen)


def test_examples_of_a_file_of_their_own_are_its_first_ones_in_order(data, tmp_path):
    seen, result = recorded("mawps_few_shot", data, tmp_path / "a")
    for asked in seen:
        places = [asked.context.index(f"{n} and 1 ?\nAnswer: {n + 1}\n") for n in range(4)]
        assert places == sorted(places) and "4 and 1 ?" not in asked.context
    assert result.scores()["n"] == 2
    seen, _ = recorded("mawps", data, tmp_path / "b")
    assert sorted(a.context for a in seen) == [f"Question: 1 and {n} ?\nAnswer:" for n in (1, 2)]
    seen, _ = recorded("mawps", data, tmp_path / "c", num_fewshot=2)
    assert all("1 and 1 ?\nAnswer: 2\n" in a.context and "2 and 1 ?" not in a.context for a in seen)


def test_gaps_have_no_examples_before_them(data, tmp_path):
    seen, result = recorded("rocstories", data, tmp_path, num_fewshot=1)
    assert [a.context for a in seen] == ["Once there was a fox. It lived in the wood."], (
        "the same request is asked once"
    )
    assert seen[0].suffix == " One day it saw a bird. It ran." and seen[0].middle == " It was old and grey."
    assert result.scores()["n"] == 2


def test_drawn_answers_are_asked_several_times_and_all_are_judged(data, tmp_path):
    seen, result = recorded("mawps_sampled", data, tmp_path, lambda a: f" {min(a.number % 1000, 2)}")
    assert len(seen) == 8 and {a.temperature for a in seen} == {0.7}
    assert sorted(a.number for a in seen) == [0, 1, 2, 3, 1000, 1001, 1002, 1003]
    first = result.examples[0]
    assert first.answers == [[" 0", " 1", " 2", " 2"]]
    assert first.metrics == {"self_consistency": 1, "hit_at_k": 1}, "1 and 1 are 2"
    assert result.examples[1].metrics == {"self_consistency": 0, "hit_at_k": 0}, "1 and 2 are 3"


def test_answers_have_as_many_tokens_and_end_as_their_task_says(data, tmp_path):
    for n, (name, most, until) in enumerate(
        (("triviaqa", 24, {"\n", ".", ","}), ("mawps", 12, {"\n"}), ("gsm8k", 256, {"Question:", "\n\n"}))
    ):
        seen, _ = recorded(name, data, tmp_path / f"{n}a")
        assert {a.max_tokens for a in seen} == {most} and all(set(a.until) == until for a in seen), name
        assert {a.temperature for a in seen} == {0.0} and {a.number for a in seen} == {0}
        seen, _ = recorded(name, data, tmp_path / f"{n}b", max_gen_toks=7)
        assert {a.max_tokens for a in seen} == {7}
    assert all(not a.context.count("??") and "?\nAnswer:" in a.context for a in recorded("triviaqa", data, tmp_path)[0])


def test_the_authors_ways_are_asked_as_their_scripts_do(data, tmp_path):
    seen, result = recorded("winogrande_paper", data, tmp_path / "w")
    assert all(a.faulty and a.continuation == "ran away." for a in seen), "no space between option and what follows"
    assert all(a.continuation == " ran away." for a in recorded("winogrande", data, tmp_path / "x")[0])
    seen, result = recorded("lambada_paper", data, tmp_path / "l", lambda a: a.middle)
    assert all(a.faulty and a.temperature == 1.0 and a.middle.startswith(" ") and a.suffix == "" for a in seen)
    assert result.scores()["accuracy"] == 2.0 and "counts twice" in result.scores()["note"]
    _, result = recorded("piqa_paper", data, tmp_path / "p")
    assert set(result.examples[0].metrics) == {"accuracy"}
    for name, most in (("triviaqa_paper", 2000), ("rocstories_paper", 1000), ("triviaqa", None)):
        assert TASKS[name].most == most
    for name in ("lambada", "hellaswag", "winogrande", "social_i_qa", "piqa", "triviaqa"):
        assert TASKS[f"{name}_paper"].kinds == ("masked_diffusion",)


def test_the_first_so_many_alone_are_read_where_a_task_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "mawps", dataclasses.replace(TASKS["mawps"], most=1))
    assert recorded("mawps", data, tmp_path)[1].scores()["n"] == 1


def test_steps_of_reasoning_are_judged_by_their_end(data, tmp_path):
    _, result = recorded("mawps_cot", data, tmp_path / "m", lambda a: " 1 and 1 are 2")
    assert [e.metrics["accuracy"] for e in result.examples] == [1, 0]
    say = " Is the answer A? No. Therefore, the answer is B."
    assert recorded("sat_math_cot", data, tmp_path / "s", lambda a: say, num_fewshot=0)[1].scores()["accuracy"] == 1


def test_groups_have_each_task_once_and_no_code_but_the_first():
    assert chosen("piqa, table1,piqa") == ["piqa", *(n for n in GROUPS["table1"] if n != "piqa")]
    assert [n for g in GROUPS.values() for n in g if TASKS[n].runs_code] == [
        "humaneval_single_line", "humaneval_single_line_paper",
    ]  # fmt: skip


# what is remembered


@given(st.sampled_from([f.name for f in dataclasses.fields(Asked)]))
def test_every_part_of_a_request_is_in_its_key(name):
    one = Asked("c", "t", suffix="s", middle="m", until=("u",))
    other = {"greedy": False, "faulty": True, "max_tokens": 3, "until": ("v",), "temperature": 0.5, "number": 1}
    assert dataclasses.replace(one, **{name: other.get(name, "different")}).key != one.key
    assert dataclasses.replace(one).key == one.key


def test_ranks_read_each_others_answers_and_leave_their_files(tmp_path):
    mine, theirs = Answers(tmp_path, 0), Answers(tmp_path, 1)
    theirs.add({"a": 1})
    assert "a" not in mine.known and (tmp_path / "rank1.jsonl").read_bytes().endswith(b"}\n"), "written at once"
    with (tmp_path / "rank1.jsonl").open("ab") as file:
        file.write(b'{"key": "b')
    mine.reload()
    assert mine.known == {"a": 1}
    assert (tmp_path / "rank1.jsonl").read_bytes().endswith(b'{"key": "b'), "that rank may be writing the line"
    assert Answers(tmp_path, 1).known == {"a": 1} and (tmp_path / "rank1.jsonl").read_bytes().endswith(b"}\n")


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_batches_hold_everything_and_no_more_rows_than_fit(rows, most):
    found = list(batches(list(range(len(rows))), rows, most))
    assert [i for batch in found for i in batch] == list(range(len(rows))) and all(found)
    assert all(len(batch) == 1 or sum(rows[i] for i in batch) <= most for batch in found)


@given(st.text("ab.", max_size=12), st.lists(st.text("ab.", max_size=2), max_size=3))
def test_a_text_is_cut_before_the_first_of_its_ends(text, until):
    begins = [text.find(stop) for stop in until if stop and stop in text]
    assert cut(text, until) == text[: min(begins, default=len(text))]


def test_a_request_is_answered_once_in_batches_the_longest_first(tmp_path):
    lm = Recorder(tmp_path, batch_size=2)
    asked = [Asked("x" * n, "y") for n in (1, 3, 2, 3, 5)]
    lm._answered(asked, lm.score, "likelihoods")
    assert [len(a.context) for a in lm.seen] == [5, 3, 2, 1] and lm.sizes == [2, 2]


# results


def example(number, answers=(), errors=(), **metrics):
    return Example(number, {}, 0, [], list(answers), list(errors), metrics)


def test_scores_are_means_with_the_error_of_a_sample():
    values = (1.0, 0.0, 0.0, 1.0, 1.0)
    result = Result("t", "accuracy", [example(n, errors=[1.0, 2.0], accuracy=v) for n, v in enumerate(values)])
    result.left_out, result.source = 2, "a file"
    scores = result.scores()
    assert scores["accuracy"] == 0.6 and scores["stderr"] == pytest.approx(math.sqrt(0.3 / 5))
    assert (scores["n"], scores["likelihood_stderr"], scores["left_out"], scores["data"]) == (5, 1.5, 2, "a file")
    both = [example(n, accuracy=v, rest=1.0) for n, v in enumerate(values)]
    assert Result("t", "accuracy", both).scores() | {"stderr": 0, "n": 5} == {
        "accuracy": 0.6, "stderr": 0, "rest": 1, "rest_stderr": 0, "n": 5, "metric": "accuracy",
    }  # fmt: skip
    assert Result("t", "accuracy", both).scores()["stderr"] == scores["stderr"]
    logs = [-1.0, -2.0]
    twice = Result("t", "accuracy", [example(n, accuracy=1.0, log_likelihood=v) for n, v in enumerate(logs)]).scores()
    assert twice["perplexity"] == pytest.approx(math.exp(1.5)) and twice["stderr"] == 0
    assert twice["perplexity_stderr"] == pytest.approx(math.exp(1.5) * 0.5)


def test_a_choice_by_token_is_the_one_with_the_highest_mean():
    scores = [Score(-4.0, 0.0, 1, False), Score(-6.0, 0.0, 3, False), Score(-9.0, 0.0, 3, False)]
    assert [per_token_choice(scores, n) for n in range(3)] == [0, 1, 0]


def test_the_table_says_what_a_reader_must_know(tmp_path):
    report = {"model": "m", "kind": "masked_diffusion", "not_for_this_model": ["other"], "truncated": 3}
    result = Result("t", "accuracy", [example(n, accuracy=v) for n, v in enumerate((1.0, 0.0))], "odd", 2)
    write_results(tmp_path, report, {"t": result}, [])
    write_results(tmp_path, report, {"u": Result("u", "accuracy", [example(0, accuracy=1.0)])}, [])
    text = (tmp_path / "results.md").read_text()
    assert "| t | accuracy, % | 50.0 ± 50.0 | 2 |" in text and "| u | accuracy, % | 100.0 | 1 |" in text
    for said in ("- t: odd.", "- t: 2 records", "- other: not for", "- 3 requests were longer"):
        assert said in text
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["u"]["stderr"] is None
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert "longer" not in table({**report, "truncated": 0, "tasks": {"t": result.scores()}})


def test_answers_of_other_settings_are_refused(tmp_path):
    stamp = {"model": "m", "weights": "w", "seed": 0}
    for _ in range(2):
        with evaluate.opened(tmp_path / "out", stamp):
            pass
    for other in ({**stamp, "seed": 1}, {**stamp, "draws": 8}, {"model": "m", "weights": "w"}):
        with pytest.raises(UserError, match="another --output"), evaluate.opened(tmp_path / "out", other):
            pass
