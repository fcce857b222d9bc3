"""The tasks of the paper's tables, as configurations of lm-evaluation-harness over examples that we read ourselves.

Where lm-eval has the task, its prompt and metrics are taken. Names that end in `_paper` are scored as the authors'
scripts score, faults included, so that both numbers can stand beside each other; `note` says what is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

from common.errors import UserError

from . import examples, judging

REPEATS = 4  # drawn answers a question, for self-consistency and hit@k
TEMPERATURE = 0.7  # of drawn answers
SHOTS = 4  # examples before a question

Config = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task: its examples, what the model is asked, and how answers are judged."""

    name: str
    files: tuple[str, ...]  # what names of local files begin with, the best first
    hub: tuple[str, str | None, str] | None  # path, name and split on the Hub
    fields: tuple[str, ...]  # that each record must have
    config: Config  # lm-eval's, without the examples
    metrics: tuple[tuple[str, str], ...] = (("accuracy", "accuracy"),)  # (lm-eval's name, ours), the main one first
    document: Callable[[dict], dict | None] = dict  # of a record; None: left out, and counted
    most: int | None = None  # the first so many alone
    shots: tuple[str, ...] = ()  # files of the examples before a question; none: the last of its own are kept for it
    shots_hub: tuple[str, str | None, str] | None = None
    kinds: tuple[str, ...] = ("masked_diffusion", "autoregressive")
    runs_code: bool = False
    note: str = ""  # what is faulty

    def examples_before(self, asked: int | None) -> int:
        """How many examples stand before each question, where the user asks for so many; gaps have none."""
        if self.config.get("doc_to_text") == GAP:
            return 0
        return self.config.get("num_fewshot") or 0 if asked is None else asked


def lm_eval_config(path: str) -> Config:
    """lm-eval's own configuration of a task, without where its data is. By path: its index takes seconds to make."""
    config = dict(load_yaml(Path(lm_eval.tasks.__file__).parent / f"{path}.yaml"))
    for key in ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "tag"):
        config.pop(key, None)
    return {**config, "test_split": "test", "should_decontaminate": False}


CHOICES = (("acc", "accuracy"), ("acc_norm", "accuracy_norm"))
ROUGES = tuple((name, name) for name in ("rouge1", "rouge2", "rougeL"))
GAP = "{{infill.prefix}}"
GREEDY: Config = {"do_sample": False, "temperature": 0.0}


def generation(judge: Callable[[dict, list], dict], metrics: tuple[str, ...], tokens: int | None, **how: Any) -> Config:
    """A task whose answers are texts."""
    limits = {"until": how.pop("until", []), **({} if tokens is None else {"max_gen_toks": tokens})}
    return {
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {**GREEDY, **limits},
        "process_results": judge,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        **how,
    }


def infilling(judge: Callable[[dict, list], dict], metrics: tuple[str, ...]) -> Config:
    """A task of gaps: documents have `infill`, with `prefix`, `suffix` and the `middle` whose length is given."""
    texts = {"doc_to_text": GAP, "doc_to_target": "{{infill.middle}}"}
    return generation(judge, metrics, None, **texts)


def _tables() -> tuple[list[Task], list[Task], list[Task]]:
    """(Table 1, its faulty twins, Table 9)."""
    lambada = Task(
        "lambada", ("lambada",), ("cimec/lambada", None, "test"), ("text",), lm_eval_config("lambada/lambada_standard"),
        (("acc", "accuracy"), ("perplexity", "log_likelihood")), examples.passage,
    )  # fmt: skip
    hellaswag = Task(
        "hellaswag", ("hellaswag",), ("Rowan/hellaswag", None, "validation"),
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"), lm_eval_config("hellaswag/hellaswag"), CHOICES,
        examples.hellaswag,
    )  # fmt: skip
    winogrande = Task(
        "winogrande", ("winogrande",), ("allenai/winogrande", "winogrande_xl", "validation"),
        ("sentence", "option1", "option2", "answer"), lm_eval_config("winogrande/default"), CHOICES[:1],
        examples.winogrande,
    )  # fmt: skip
    siqa = Task(
        "social_i_qa", ("social_i_qa", "siqa", "social_iqa"), ("lighteval/siqa", None, "validation"),
        ("context", "question", "answerA", "answerB", "answerC", "label"), lm_eval_config("siqa/siqa"), CHOICES[:1],
        examples.social_i_qa,
    )  # fmt: skip
    piqa = Task(
        "piqa", ("piqa",), ("baber/piqa", None, "validation"), ("goal", "sol1", "sol2", "label"),
        lm_eval_config("piqa/piqa"), CHOICES, examples.piqa,
    )  # fmt: skip
    trivia_config = lm_eval_config("triviaqa/default")
    trivia_config["generation_kwargs"] = {**trivia_config["generation_kwargs"], "max_gen_toks": 24}
    triviaqa = Task(
        "triviaqa", ("triviaqa",), ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"), ("question", "answer"),
        trivia_config, (("exact_match", "accuracy"),), examples.trivia,
    )  # fmt: skip
    gsm8k = Task(
        "gsm8k", ("gsm8k_test",), ("openai/gsm8k", "main", "test"), ("question", "answer"),
        generation(judging.last_number, ("accuracy", "accuracy_strict"), 256, until=["Question:", "\n\n"]),
        (("accuracy", "accuracy"), ("accuracy_strict", "accuracy_strict")), examples.gsm8k,
        shots=("gsm8k_train",), shots_hub=("openai/gsm8k", "main", "train"),
    )  # fmt: skip
    rocstories = Task(
        "rocstories", ("rocstories_cloze", "rocstories"), None, (),
        infilling(judging.rouge, ("rouge1", "rouge2", "rougeL")), ROUGES, examples.story,
    )  # fmt: skip
    code = [
        Task(
            f"humaneval_{name}", (f"humaneval_{published}", f"humaneval_{name}"),
            ("loubnabnl/humaneval_infilling", on_hub, "test"),
            ("task_id", "entry_point", "prompt", "suffix", "canonical_solution", "test"),
            infilling(judge, ("accuracy",)), (("accuracy", "accuracy"),), examples.code, runs_code=True,
        )
        for name, published, on_hub, judge in (
            ("single_line", "single_line_infilling", "HumanEval-SingleLineInfilling", judging.code_line),
            ("multi_line", "multi_line_infilling", "HumanEval-MultiLineInfilling", judging.code),
            ("random_span", "random_span_infilling", "HumanEval-RandomSpanInfilling", judging.code),
            ("random_span_light", "random_span_infilling_light", "HumanEval-RandomSpanInfillingLight", judging.code),
        )
    ]  # fmt: skip
    table1 = [triviaqa, lambada, hellaswag, winogrande, siqa, piqa, gsm8k, rocstories, code[0]]
    return table1, [*_faulty(lambada, hellaswag, winogrande, siqa, piqa, rocstories, code[0])], [
        *_mathematics(), *_trivia(triviaqa), *code[1:],
    ]  # fmt: skip


def _faulty(
    lambada: Task, hellaswag: Task, winogrande: Task, siqa: Task, piqa: Task, rocstories: Task, code: Task
) -> list[Task]:
    """The authors' ways of Table 1."""
    diffusion = ("masked_diffusion",)
    short = "grid points of t at which nothing is masked count as a loss of 0, so short options win"
    choices = [
        replace(task, name=f"{task.name}_paper", metrics=task.metrics[:1], kinds=diffusion, note=short)
        for task in (hellaswag, siqa, piqa)
    ]
    winogrande_paper = replace(
        winogrande, name="winogrande_paper", kinds=diffusion, config={**winogrande.config, "target_delimiter": ""},
        note=f"no space between option and what follows it; {short}",
    )  # fmt: skip
    lambada_paper = replace(
        lambada, name="lambada_paper", metrics=(("accuracy", "accuracy"),), kinds=diffusion,
        document=examples.last_word,
        config=_drawn(infilling(judging.word_counted_twice, ("accuracy",)), 1.0),
        note="each hit counts twice, words are drawn, and the length of the word is given",
    )  # fmt: skip
    triviaqa_paper = Task(
        "triviaqa_paper", ("squad",), ("rajpurkar/squad", None, "validation"), ("context", "question", "answers"),
        infilling(judging.contains, ("accuracy",)), document=examples.squad, most=2000, kinds=diffusion,
        note="it is SQuAD, with its paragraph and the length of the longest answer given; an answer within the text "
        "counts",
    )  # fmt: skip
    rocstories_paper = replace(
        rocstories, name="rocstories_paper", most=1000,
        note="autoregressive models may write as many tokens as the sentence has characters",
    )  # fmt: skip
    code_paper = replace(
        code, name=f"{code.name}_paper", document=examples.code_with_instruction,
        note="autoregressive models get an instruction in English first (its words here are ours) and as many tokens "
        "as the line has characters; no problem is left out for its length",
    )  # fmt: skip
    return [triviaqa_paper, lambada_paper, *choices, winogrande_paper, rocstories_paper, code_paper]


def _drawn(config: Config, temperature: float, repeats: int = 1) -> Config:
    """With answers drawn, `repeats` a question."""
    how = {**config["generation_kwargs"], "do_sample": True, "temperature": temperature}
    everything = [{"name": "all", "filter": [{"function": "take_first_k", "k": repeats}]}]
    return {**config, "generation_kwargs": how, "repeats": repeats, "filter_list": everything}


def _ways(zero: Task, several: Callable[[dict, list], dict]) -> list[Task]:
    """Zero-shot; few-shot; few-shot with several drawn answers: the most frequent one, and whether any is right."""
    few = {**zero.config, "num_fewshot": SHOTS}
    names = ("self_consistency", "hit_at_k")
    drawn = {**_drawn(few, TEMPERATURE, REPEATS), "process_results": several}
    drawn["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in names]
    return [
        zero,
        replace(zero, name=f"{zero.name}_few_shot", config=few),
        replace(zero, name=f"{zero.name}_sampled", config=drawn, metrics=tuple((m, m) for m in names)),
    ]


def _mathematics() -> list[Task]:
    """MAWPS and SAT-Math."""
    mawps = Task(
        "mawps", ("mawps_test", "mawps"), ("MU-NLPC/Calc-mawps", None, "test"), (),
        generation(judging.first_number, ("accuracy",), 12, until=["\n"]), document=examples.mawps,
        shots=("mawps_train",), shots_hub=("MU-NLPC/Calc-mawps", None, "train"),
    )  # fmt: skip
    sat = Task(
        "sat_math", ("sat_math",), ("hails/agieval-sat-math", None, "test"), ("question", "options", "label"),
        generation(judging.letter, ("accuracy",), 8, until=["\n"], doc_to_text="{{problem}}"),
        document=examples.sat_math,
    )  # fmt: skip
    shown = lm_eval_config("gsm8k/gsm8k-cot")["fewshot_config"]
    mawps_steps = generation(judging.final_number, ("accuracy",), 96, until=["\nQ:", "\n\n"])
    mawps_steps |= {"doc_to_text": "Q: {{question}}\nA:", "num_fewshot": 8, "fewshot_config": shown}
    mawps_steps["doc_to_target"] = "{{target if target is defined else answer}}"
    sat_steps = generation(judging.final_letter, ("accuracy",), 192, until=["\n\n", "Question:"])
    sat_steps |= {"doc_to_text": "{{problem_in_steps}}", "doc_to_target": "{{solution}}", "num_fewshot": SHOTS}
    return [
        *_ways(mawps, judging.several_numbers),
        replace(mawps, name="mawps_cot", config=mawps_steps, shots=(), shots_hub=None),
        *_ways(sat, judging.several_letters),
        replace(sat, name="sat_math_cot", config=sat_steps),
    ]


def _trivia(triviaqa: Task) -> list[Task]:
    return _ways(triviaqa, judging.several_texts)


_TABLE1, _PAPER, _TABLE9 = _tables()
TASKS = {task.name: task for task in (*_TABLE1, *_PAPER, *_TABLE9)}
GROUPS = {
    "table1": tuple(task.name for task in _TABLE1),
    "table1_paper": tuple(task.name for task in _PAPER),
    "table9": tuple(task.name for task in _TABLE9 if not task.runs_code),
}


def chosen(names: str) -> list[str]:
    """The names of tasks in a list with commas, groups taken apart, each once. Raises UserError for an empty one."""
    found: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name:
            found += GROUPS.get(name, (name,))
    if not found:
        raise UserError(f"--tasks {names!r} names no task")
    return list(dict.fromkeys(found))
