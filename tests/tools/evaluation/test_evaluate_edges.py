"""What could silently change a score: defaults, changed checkpoints and settings, tokenizers, odd data."""

import fcntl
import json
import shutil

import pytest
from helpers import SHARED
from known_model import tiny_data
from published_sets import SETS
from test_diffusion_lm import asked_by
from test_evaluate import command, evaluated, refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.decoding import load
from tools.evaluate import chosen_settings
from tools.evaluation import examples, judging
from tools.evaluation import run as running
from tools.evaluation.answers import Answers
from tools.evaluation.autoregressive_lm import AutoregressiveLM
from tools.evaluation.harness import Asked, text_of
from tools.evaluation.published import column_of
from tools.evaluation.tasks import GROUPS, TASKS

LLAMA = SHARED / "data" / "tokenizers" / "llama2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("evaluation") / "data")


def test_where_no_order_is_named_the_surest_tokens_come_first(tiny_checkpoint):
    model, _ = load(str(tiny_checkpoint), device="cpu")
    model.generation_config.order = None
    assert chosen_settings(model, {}).order == "confidence"
    assert chosen_settings(model, {"order": "random"}).order == "confidence", "chance says nothing of a model"
    assert chosen_settings(model, {"order": "entropy"}).order == "entropy"
    assert chosen_settings(model, {"entropy_bound": 0.5}).by == "entropy"


def test_is_greedy_is_no_chance_even_in_random_order(tiny_checkpoint, tmp_path):
    model, tokenizer = load(str(tiny_checkpoint), device="cpu")
    pairs = []
    for n in range(12):
        context = tokenizer(f"The king {n} of the wood")["input_ids"]
        text = model.diffusion_generate(_masks(model, context, 4), order="confidence", temperature=0, eos_token_id=-1)
        pairs.append((context, text[0, len(context) :].tolist()))
    lm = asked_by(model, tokenizer, tmp_path, order="random")
    found = lm._greedy_gives(pairs)
    assert found == lm._greedy_gives(pairs) == [lm._greedy_gives([pair])[0] for pair in pairs]


def _masks(model, context, count):
    import torch

    return torch.tensor([[*context, *[model.config.mask_token_id] * count]])


def test_a_changed_checkpoint_does_not_get_the_answers_of_the_old_one(tiny_checkpoint, data, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    evaluated(checkpoint, data, tmp_path / "out", "--limit", "1")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "diffusion": {"shift": False}}))
    assert "has results with weights" in refusal(capsys, command(checkpoint, data, tmp_path / "out"))


def test_results_are_not_replaced_by_fewer_or_other_ones(tiny_checkpoint, data, tmp_path, capsys):
    evaluated(tiny_checkpoint, data, tmp_path / "out", "--limit", "2")
    before = (tmp_path / "out" / "results.json").read_text()
    for flags, says in (
        (("--limit", "1"), "has 2 examples of lambada, this command asks for 1"),
        (("--num_fewshot", "1"), "has results with num_fewshot None"),
        (("--max_gen_toks", "9"), "has results with max_gen_toks 6"),
        (("--temperature", "0.5"), "--temperature is not for evaluating"),
    ):
        assert says in refusal(capsys, command(tiny_checkpoint, data, tmp_path / "out", "--limit", "2", *flags))
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_two_commands_do_not_write_one_folder(tiny_checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process writes" in refusal(capsys, command(tiny_checkpoint, data, out))


def test_damaged_files_of_our_own_are_named(tiny_checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    evaluated(tiny_checkpoint, data, out, "--limit", "1")
    good = (out / "results.json").read_text()
    for content in ("{", "[]", '{"a": 1}'):
        (out / "results.json").write_text(content)
        assert "results.json is damaged" in refusal(capsys, command(tiny_checkpoint, data, out))
    (out / "results.json").write_text(good)
    (out / "settings.json").write_text("{")
    assert "settings.json is damaged" in refusal(capsys, command(tiny_checkpoint, data, out))


def test_what_was_too_long_is_counted_again_after_a_restart(tiny_checkpoint, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "lambada.jsonl").write_text(json.dumps({"text": "word " * 300 + "end"}) + "\n")
    first = evaluated(tiny_checkpoint, folder, tmp_path / "out", tasks="lambada")
    again = evaluated(tiny_checkpoint, folder, tmp_path / "out", tasks="lambada")
    assert first["truncated"] == again["truncated"] == 1 and first == again


def test_fewer_examples_than_ranks_are_refused_before_anything_is_loaded(data):
    tasks = running.prepare(["piqa"], "masked_diffusion", str(data), None)
    running.check(tasks, None, None, 3)
    with pytest.raises(running.UserError, match="3 examples for 4 ranks"):
        running.check(tasks, None, None, 4)
    with pytest.raises(running.UserError, match="2 examples for 3 ranks"):
        running.check(tasks, 2, None, 3)


def test_data_of_mixed_types_are_refused_before_a_model_is_loaded(tiny_checkpoint, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"question": "?", "answer": {"aliases": ["x"]}}, {"question": "?", "answer": {"aliases": [1]}}]
    (folder / "triviaqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refusal(capsys, command(tiny_checkpoint, folder, tmp_path / "out", tasks="triviaqa"))
    assert "lm-eval cannot ask triviaqa" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("document", "record"),
    [
        (examples.piqa, {"sol1": "a", "sol2": "b", "label": 7}),
        (examples.piqa, {"sol1": "", "sol2": "b", "label": 0}),
        (examples.hellaswag, {"endings": ["a", "b"], "label": ""}),
        (examples.winogrande, {"sentence": "_ ran", "option1": "a", "option2": "b", "answer": ""}),
        (examples.winogrande, {"sentence": "it ran", "option1": "a", "option2": "b", "answer": "1"}),
        (examples.social_i_qa, {"answerA": "a", "answerB": "b", "answerC": "c", "label": "0"}),
        (examples.passage, {"text": "word"}),
        (examples.last_word, {"text": " word "}),
        (examples.story, {"text": "One. Two. Three."}),
    ],
)
def test_what_cannot_be_asked_is_left_out(document, record):
    assert document(record) is None


def test_labels_are_read_as_numbers_and_passages_without_space_around_them():
    assert examples.piqa({"sol1": "a", "sol2": "b", "label": "1"})["label"] == 1
    assert examples.passage({"text": " a word \n"}) == {"text": "a word"}


def test_a_story_keeps_its_closing_quotes():
    found = examples.story({"text": 'He said "Hi." She "ran!" Then? Who. "No."'})["infill"]
    assert found == {"prefix": 'He said "Hi." She "ran!"', "middle": " Then?", "suffix": ' Who. "No."'}


def test_the_instruction_of_the_authors_reaches_autoregressive_models_alone(tiny_checkpoint, base_dir, data, tmp_path):
    from lm_eval.api.instance import Instance

    record = json.loads((data / "humaneval_single_line.jsonl").read_text().splitlines()[0])
    document = TASKS["humaneval_single_line_paper"].document(record)
    model = AutoModelForCausalLM.from_pretrained(base_dir("llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_dir("llama"))
    request = Instance("generate_until", document, ("", {}), 0, ("humaneval_single_line_paper", 0, 1))
    causal = AutoregressiveLM(model, tokenizer, Answers(tmp_path / "answers"), progress=False)
    assert causal._to_write(request).context == examples.INSTRUCTION + record["prompt"]
    diffusion = asked_by(*load(str(tiny_checkpoint), device="cpu"), tmp_path)
    assert diffusion._to_write(request).context == record["prompt"] and diffusion._to_write(request).faulty


@pytest.mark.skipif(not LLAMA.exists(), reason="LLaMA-2's tokenizer is not there")
def test_sentencepiece_keeps_the_indentation_of_what_is_written():
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    for text in ("    return x", " word", "word", "\n    y = 1"):
        whole = tokenizer("x =\n" + text, add_special_tokens=False)["input_ids"]
        before = tokenizer("x =\n", add_special_tokens=False)["input_ids"]
        assert text_of(whole[len(before) :], tokenizer) == text


def test_empty_answers_do_not_vote():
    document = {"answer": {"aliases": ["Paris"]}}
    assert judging.several_texts(document, [["", " ", "paris", "."]]) == {"self_consistency": 1.0, "hit_at_k": 1.0}
    assert judging.several_texts(document, [["", " "]]) == {"self_consistency": 0.0, "hit_at_k": 0.0}


def test_lm_evals_own_tasks_keep_its_numbers():
    sample = {"doc_id": 0, "doc": {}, "target": "x", "arguments": [("a", "b")], "resps": [], "metrics": ["perplexity"]}
    one = running._of_lm_eval(
        "lambada_openai",
        [{**sample, "filter": "none", "perplexity": -3.2}],
        {
            "alias": "x",
            "perplexity,none": 24.5,
            "perplexity_stderr,none": 2.0,
            "acc,none": 0.3,
            "acc_stderr,none": "N/A",
        },
    ).scores()
    assert one == {"perplexity": 24.5, "stderr": 2.0, "accuracy": 0.3, "n": 1, "metric": "perplexity"}
    words = {**sample, "metrics": ["word_perplexity"], "word_perplexity": (-9.0, 3)}
    assert (
        running._of_lm_eval("wikitext", [{**words, "filter": "none"}], {"word_perplexity,none": 20.1}).scores()[
            "word_perplexity"
        ]
        == 20.1
    )
    both = running._of_lm_eval(
        "gsm8k",
        [{**sample, "filter": f, "perplexity": 1.0} for f in ("strict", "flexible")],
        {"exact_match,strict": 0.1, "exact_match,flexible": 0.2},
    ).scores()
    assert both["exact_match,strict"] == 0.1 and both["exact_match,flexible"] == 0.2


def test_every_task_of_table_1_stands_beside_the_papers_column():
    columns = [column_of(name) for name in (*GROUPS["table1"], *GROUPS["table1_paper"])]
    assert None not in columns and len(set(columns)) == 9


@pytest.mark.skipif(not SETS.is_dir(), reason="the published sets are not there")
def test_the_published_files_are_found_and_read():
    names = list(TASKS)
    prepared = running.prepare(names, "masked_diffusion", str(SETS), None)
    prepared += running.prepare(names, "autoregressive", str(SETS), None)
    assert {p.name for p in prepared} == set(names)
    counts = {p.name: len(p.documents) for p in prepared}
    assert counts["humaneval_random_span"] == 1640 and counts["humaneval_random_span_light"] == 164
    assert counts["lambada"] == 2576 and counts["rocstories"] == 1871 and counts["rocstories_paper"] == 1000
    assert counts["sat_math"] == 220 and counts["sat_math_few_shot"] == 216
    assert {p.name for p in prepared if p.left_out} == set()


def test_drawn_texts_have_numbers_of_their_example_whatever_the_ranks(tiny_checkpoint, tmp_path):
    from lm_eval.api.instance import Instance

    lm = asked_by(*load(str(tiny_checkpoint), device="cpu"), tmp_path)
    seen = []
    lm._answered = lambda asked, *_: seen.append([a.number for a in asked])
    how = {"max_gen_toks": 4, "do_sample": True, "temperature": 0.7}
    requests = [Instance("generate_until", {}, ("same", how), 0, ("t", doc, 2)) for doc in (0, 1) for _ in range(2)]
    lm.generate_until(requests)
    lm.generate_until(requests[2:])
    assert seen == [[0, 1, 1000, 1001], [1000, 1001]]
    assert Asked("same", temperature=0.7, number=1).key != Asked("same", temperature=0.7).key
