"""python -m tools.evaluate: the harness's own numbers, whatever the batch, the ranks and the interruptions."""

import json
import shutil

import pytest
import torch
from bubblewrap import needs_bubblewrap
from helpers import launch
from known_model import tiny_data
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import evaluate
from tools.evaluation import run as running
from tools.evaluation.harness import Answers, Asked
from tools.evaluation.results import mean_and_error
from tools.evaluation.tasks import GROUPS, TASKS

WITHOUT_CODE = [n for n in GROUPS["table1"] if not TASKS[n].runs_code]
FAST = ("--draws", "4", "--max_gen_toks", "6")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("evaluation") / "data")


def command(model, data, output, *flags, tasks="lambada,piqa"):
    return [str(model), "--tasks", tasks, "--data_dir", str(data), "--output", str(output), *FAST, *flags]


def evaluated(model, data, output, *flags, tasks="lambada,piqa") -> dict:
    assert evaluate.main(command(model, data, output, *flags, tasks=tasks)) == 0
    return json.loads((output / "results.json").read_text())


def refusal(capsys, arguments) -> str:
    capsys.readouterr()
    assert evaluate.main(arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_an_ar_model_has_the_numbers_of_lm_evals_own_hf(base_dir, data, tmp_path):
    names = [n for n in WITHOUT_CODE if n not in ("rocstories", "gsm8k", "triviaqa")]
    report = evaluated(base_dir("llama"), data, tmp_path / "out", tasks=",".join(names))
    assert report["kind"] == "autoregressive"
    model = AutoModelForCausalLM.from_pretrained(base_dir("llama"), dtype=torch.float32).eval()
    hf = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(base_dir("llama")), batch_size=3)
    prepared = running.prepare(names, "autoregressive", str(data), None)
    theirs = simple_evaluate(
        model=hf, tasks=[running.configuration(p, None, None) for p in prepared], bootstrap_iters=0
    )
    for name in names:
        ours, expected = report["tasks"][name], theirs["results"][name]
        assert ours["accuracy"] == expected["acc,none"]
        assert ours.get("accuracy_norm") == expected.get("acc_norm,none")
        assert ours["n"] == expected["sample_len"]
        lines = (tmp_path / "out" / "samples" / f"{name}.jsonl").read_text().splitlines()
        for line, sample in zip(lines, theirs["samples"][name], strict=True):
            found = [r[0][0] for r in sample["resps"]]
            assert json.loads(line)["answers"] == pytest.approx(found, abs=1e-4)
    assert report["tasks"]["winogrande"]["left_out"] == 1


def test_choices_are_the_likelier_ones_by_a_computation_of_its_own(tiny_checkpoint, data, tmp_path):
    """PIQA: the prompt written out here, every mask of each answer enumerated by transformers' own class."""
    from test_diffusion_lm import over_all_orders

    records = [{"goal": "eat soup", "sol1": "ee", "sol2": "we", "label": n} for n in (0, 1)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    report = evaluated(tiny_checkpoint, folder, tmp_path / "out", "--draws", "64", tasks="piqa")
    stock = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    context = tokenizer("Question: eat soup\nAnswer:")["input_ids"]
    with torch.no_grad():
        bounds = []
        for answer in ("ee", "we"):
            target = tokenizer("Question: eat soup\nAnswer: " + answer)["input_ids"][len(context) :]
            bounds.append(over_all_orders(stock, context, target, tokenizer.mask_token_id))
    sample = json.loads((tmp_path / "out" / "samples" / "piqa.jsonl").read_text().splitlines()[0])
    assert sample["answers"] == pytest.approx(bounds, rel=1e-4)
    best = bounds.index(max(bounds))
    assert sample["metrics"]["accuracy"] == float(best == 0)
    assert report["tasks"]["piqa"]["accuracy"] == 0.5, "one of two equal questions is labelled otherwise"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked_diffusion", "autoregressive"])
def test_every_task_of_the_tables_runs(kind, tiny_checkpoint, base_dir, data, tmp_path):
    model = tiny_checkpoint if kind == "masked_diffusion" else base_dir("llama")
    names = list(dict.fromkeys(n for g in ("table1", "table1_paper", "table9") for n in GROUPS[g]))
    names = [n for n in names if not TASKS[n].runs_code]
    report = evaluated(model, data, tmp_path / "out", "--num_fewshot", "1", tasks=",".join(names))
    asked = [n for n in names if kind in TASKS[n].kinds]
    assert list(report["tasks"]) == asked and report["not_for_this_model"] == [n for n in names if n not in asked]
    for name in asked:
        scores = report["tasks"][name]
        lines = [json.loads(s) for s in (tmp_path / "out" / "samples" / f"{name}.jsonl").read_text().splitlines()]
        mean, error = mean_and_error([line["metrics"][TASKS[name].metrics[0][1]] for line in lines])
        if scores["metric"] in scores and name != "lambada":
            assert scores[scores["metric"]] == mean and scores["stderr"] == (None if error != error else error)
        assert scores["n"] == len(lines) > 0
        assert bool(scores.get("note")) == name.endswith("_paper")
    text = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {name} |" in text for name in asked)
    assert ("counts twice" in text) == (kind == "masked_diffusion")


@needs_bubblewrap
def test_code_in_gaps_is_judged_by_its_tests(tiny_checkpoint, data, tmp_path, monkeypatch):
    from tools.evaluation.diffusion_lm import DiffusionLM

    monkeypatch.setattr(
        DiffusionLM, "write", lambda self, asked: [a.middle if "x + 1" in a.middle else "" for a in asked]
    )
    report = evaluated(tiny_checkpoint, data, tmp_path / "out", tasks="humaneval_single_line")
    assert report["tasks"]["humaneval_single_line"]["accuracy"] == 0.5
    lines = (tmp_path / "out" / "samples" / "humaneval_single_line.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"]["accuracy"] for line in lines] == [1.0, 0.0]


def test_interrupted_after_any_answer_it_goes_on_to_the_same_table(
    tiny_checkpoint, data, tmp_path, monkeypatch, capsys
):
    tasks = "lambada,piqa,rocstories"
    whole = evaluated(tiny_checkpoint, data, tmp_path / "whole", "--batch_size", "4", tasks=tasks)
    written = sum(len(p.read_text().splitlines()) for p in (tmp_path / "whole" / "answers").iterdir())
    add, output = Answers.add, tmp_path / "cut"

    def interrupted(self, answers, truncated):
        add(self, answers, truncated)
        raise KeyboardInterrupt

    times = 0
    monkeypatch.setattr(Answers, "add", interrupted)
    while evaluate.main(command(tiny_checkpoint, data, output, "--batch_size", "4", tasks=tasks)) == 130:
        times += 1
        torn = next((output / "answers").iterdir())
        torn.write_bytes(torn.read_bytes() + b'{"key": "torn')
    assert 4 < times <= written
    assert json.loads((output / "results.json").read_text()) == whole
    answers = [json.loads(line)["key"] for line in torn.read_text().splitlines()]
    assert len(answers) == len(set(answers)) == written, "nothing is computed twice"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked_diffusion", "autoregressive"])
def test_neither_ranks_nor_batches_change_a_score(kind, tiny_checkpoint, base_dir, data, tmp_path):
    model = tiny_checkpoint if kind == "masked_diffusion" else base_dir("llama")
    tasks = "lambada,piqa,rocstories,mawps_sampled"
    one = evaluated(model, data, tmp_path / "one", tasks=tasks)
    flags = command(model, data, tmp_path / "two", "--batch_size", "3", tasks=tasks)
    result = launch(2, ["-m", "tools.evaluate", *flags], launcher="torchrun")
    assert result.returncode == 0, result.stdout + result.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["tasks"].keys() == one["tasks"].keys()
    for name, scores in one["tasks"].items():
        for key, value in scores.items():
            assert two["tasks"][name][key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))
    assert len(list((tmp_path / "two" / "answers").iterdir())) == 2


def test_a_larger_limit_and_other_tasks_add_to_what_is_there(tiny_checkpoint, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert evaluated(tiny_checkpoint, data, out, "--limit", "1")["tasks"]["piqa"]["n"] == 1
    asked = []
    score = running.Evaluated._answered

    def watched(self, requests, answer, what):
        asked.append(sum(r.key not in self.answers.known for r in requests))
        return score(self, requests, answer, what)

    monkeypatch.setattr(running.Evaluated, "_answered", watched)
    report = evaluated(tiny_checkpoint, data, out, tasks="piqa")
    assert asked == [4] and report["tasks"]["piqa"]["n"] == 3 and report["tasks"]["lambada"]["n"] == 1


def test_likelihoods_by_name_differ_and_another_one_needs_another_folder(tiny_checkpoint, data, tmp_path, capsys):
    values = {}
    for name in ("nelbo", "mask_count", "dream", "paper"):
        out = tmp_path / name
        evaluated(tiny_checkpoint, data, out, "--likelihood", name, tasks="piqa")
        line = json.loads((out / "samples" / "piqa.jsonl").read_text().splitlines()[0])
        values[name] = line["answers"][1]
        assert line["errors"][1] > 0
    assert len(set(values.values())) == 4 and values["paper"] > values["nelbo"] / 3
    said = refusal(capsys, command(tiny_checkpoint, data, tmp_path / "dream", "--likelihood", "nelbo"))
    assert "dream" in said and "nelbo" in said and "another --output" in said


@pytest.mark.parametrize(
    ("flags", "tasks", "says"),
    [
        ((), "lambda", "no 'lambda'"),
        ((), " , ", "names no task"),
        (("--limit", "0"), "piqa", "--limit is 0"),
        (("--draws", "0"), "piqa", "--draws is 0"),
        (("--threshold", "2"), "piqa", "threshold"),
        (("--num_fewshot", "9"), "piqa", "9 examples"),
    ],
)
def test_bad_commands_are_one_line_errors(flags, tasks, says, tiny_checkpoint, data, tmp_path, capsys):
    assert says in refusal(capsys, command(tiny_checkpoint, data, tmp_path / "out", *flags, tasks=tasks))
    assert not (tmp_path / "out" / "results.json").exists()


def test_data_that_cannot_be_used_is_named(tiny_checkpoint, data, tmp_path, capsys):
    def said(folder, tasks="piqa"):
        return refusal(capsys, command(tiny_checkpoint, folder, tmp_path / "out", tasks=tasks))

    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    assert "piqa*.jsonl" in said(tmp_path) and "lambada*.jsonl" in said(tmp_path, "piqa,lambada")
    assert "no folder" in said(tmp_path / "none")
    (bad / "lambada_test.jsonl").write_text('{"text": "a b"}\n{"words": 1}\n')
    assert "lambada_test.jsonl:2 has no 'text'" in said(bad, "lambada")
    (bad / "lambada_test.jsonl").write_text('{"text": "a b"}\n{"text": \n')
    assert "lambada_test.jsonl:2 is no JSON" in said(bad, "lambada")
    (bad / "lambada_test.jsonl").write_text("")
    assert "holds no examples" in said(bad, "lambada")
    (bad / "piqa_valid.jsonl.gz").write_bytes(b"no gzip")
    assert "cannot be read" in said(bad)
    (bad / "piqa_other.jsonl").write_text("{}\n")
    assert "several files for piqa" in said(bad)
    (bad / "triviaqa_valid.jsonl").write_text('{"question": "?", "answer": "x"}\n')
    assert "answer.aliases" in said(bad, "triviaqa")
    (bad / "humaneval_single_line.jsonl").write_text('{"task_id": "t"}\n')
    assert "has no 'entry_point'" in said(bad, "humaneval_single_line")


def test_folders_of_others_stay(tiny_checkpoint, data, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    assert "is not empty" in refusal(capsys, command(tiny_checkpoint, data, tmp_path / "mine"))
    assert "is a file" in refusal(capsys, command(tiny_checkpoint, data, tmp_path / "mine" / "thesis.txt"))
    evaluated(tiny_checkpoint, data, tmp_path / "out", "--limit", "1")
    answers = next((tmp_path / "out" / "answers").iterdir())
    answers.write_text("damaged\n" + answers.read_text())
    assert "is damaged" in refusal(capsys, command(tiny_checkpoint, data, tmp_path / "out"))


def test_a_dry_run_asks_nothing(tiny_checkpoint, data, tmp_path, capsys):
    assert evaluate.main(command(tiny_checkpoint, data, tmp_path / "out", "--dry_run")) == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr()
    assert "piqa: 3 examples" in printed.err + printed.out


def test_an_ar_model_gets_as_many_tokens_as_the_gap_had(base_dir, tmp_path):
    from tools.evaluation.autoregressive_lm import AutoregressiveLM

    model = AutoModelForCausalLM.from_pretrained(base_dir("llama"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_dir("llama"))
    lm = AutoregressiveLM(model, tokenizer, Answers(tmp_path / "answers"), progress=False)
    middle = " and then a fox"
    count = len(tokenizer(middle)["input_ids"])
    ids = tokenizer("One day", return_tensors="pt")
    for faulty, budget in ((False, count), (True, len(middle))):
        [text] = lm.write([Asked("One day", suffix=" ran.", middle=middle, faulty=faulty)])
        new = model.generate(**ids, max_new_tokens=budget, do_sample=False, pad_token_id=0)[0, ids.input_ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("text", "passes"),
    [("    y = x + 1", 1.0), ("\n\n    y = x + 1\n    y = 3", 1.0), ("    y = 3\n    y = x + 1", 0.0), ("\n \n", 0.0)],
)
def test_of_a_line_the_first_that_is_not_blank_counts(text, passes, data):
    from tools.evaluation import judging

    record = json.loads((data / "humaneval_single_line.jsonl").read_text().splitlines()[0])
    assert judging.code_line(TASKS["humaneval_single_line"].document(record), [text]) == {"accuracy": passes}
