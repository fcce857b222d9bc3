"""From tasks and a model to scores, over lm-evaluation-harness.

`prepare` reads and checks all examples, before a model is loaded; `evaluate` asks the model and judges.
"""

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from pyarrow.lib import ArrowException

from common.errors import UserError

from .documents import find_file, from_hub, read_records
from .harness import FAULTY, Asked, Evaluated
from .likelihood import Score
from .results import Example, Result, per_token_choice
from .tasks import TASKS, Task


@dataclass
class Prepared:
    """A task with its examples. `task` is None for one of lm-eval's own, which reads them itself."""

    name: str
    task: Task | None
    documents: list[dict] = field(default_factory=list)
    shots: list[dict] = field(default_factory=list)  # examples before a question
    source: str = "lm-eval's"  # where the examples are from
    left_out: int = 0  # records that cannot be asked


def prepare(names: Sequence[str], kind: str, data_dir: str | None, num_fewshot: int | None) -> list[Prepared]:
    """The tasks with their examples; those that are not for this kind of model are left out by the caller.

    Raises UserError for an unknown task and for files that are missing or damaged, all of the missing ones at once.
    """
    unknown = [n for n in names if n not in TASKS]
    own = TaskManager() if unknown else None
    missing = []
    found = []
    for name in names:
        task = TASKS.get(name)
        if task is None:
            if data_dir or own is None or name not in own.task_index:
                at = " with --data_dir" if data_dir else ", also in lm-eval"
                raise UserError(f"--tasks: there is no {name!r}{at}; there are {', '.join(TASKS)}")
            found.append(Prepared(name, None))
        elif kind in task.kinds:
            found.append(_with_examples(task, data_dir, num_fewshot, missing))
    if missing:
        raise UserError(f"--data_dir {data_dir} lacks {'; '.join(missing)}; leave those tasks out, or add the files")
    return found


def _with_examples(task: Task, data_dir: str | None, num_fewshot: int | None, missing: list[str]) -> Prepared:
    """A task with its examples; what `data_dir` lacks is added to `missing`."""
    records, source = _records(task.files, task.hub, task.fields, data_dir)
    if records is None:
        missing.append(f"{task.files[0]}*.jsonl(.gz) for {task.name}")
        return Prepared(task.name, task)
    documents = _documents(task, records[: task.most], source)
    kept = [d for d in documents if d is not None]
    prepared = Prepared(task.name, task, kept, source=source, left_out=len(documents) - len(kept))
    if "fewshot_config" in task.config:
        return prepared  # its examples are part of the task
    wanted = task.examples_before(num_fewshot)
    if wanted and task.shots:
        records, source = _records(task.shots, task.shots_hub, (), data_dir)
        if records is None:
            missing.append(f"{task.shots[0]}*.jsonl(.gz) for the examples of {task.name}")
        prepared.shots = [d for d in _documents(task, (records or [])[: 4 * wanted], source) if d is not None][:wanted]
    elif wanted:
        prepared.documents, prepared.shots = kept[:-wanted], kept[-wanted:]
    if (len(prepared.shots) < wanted or not prepared.documents) and not missing:
        raise UserError(f"{task.name}: {wanted} examples are wanted before each question, {source} has too few")
    return prepared


def _records(
    files: Sequence[str], hub: tuple[str, str | None, str] | None, fields: Sequence[str], data_dir: str | None
) -> tuple[list[dict] | None, str]:
    """(records, where they are from); None where `data_dir` has no such file."""
    if data_dir:
        path = find_file(data_dir, files)
        return (None, "") if path is None else (read_records(path, fields), str(path))
    if hub is None:
        raise UserError(f"{files[-1]} is not on the Hub: its publishers give it on request; give --data_dir")
    return from_hub(*hub), f"{hub[0]} ({hub[2]})"


def _documents(task: Task, records: list[dict], source: str) -> list[dict | None]:
    found = []
    for number, record in enumerate(records, start=1):
        try:
            found.append(task.document(record))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{source}, record {number}: not as {task.name} has them ({reason})") from None
    return found


def configuration(prepared: Prepared, num_fewshot: int | None, max_gen_toks: int | None) -> dict[str, Any]:
    """lm-eval's configuration of one of our tasks, its examples in it."""
    assert prepared.task is not None, "lm-eval has the configuration of its own tasks"
    config = {**prepared.task.config, "task": prepared.name}
    if "fewshot_config" not in config:
        config["num_fewshot"] = prepared.task.examples_before(num_fewshot)
    if prepared.shots:
        config |= {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
    if max_gen_toks is not None and "max_gen_toks" in config.get("generation_kwargs", {}):
        config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": max_gen_toks}
    splits = {"test": prepared.documents, **({"shots": prepared.shots} if prepared.shots else {})}
    config["custom_dataset"] = lambda **_: {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    return config


def _made(prepared: Prepared, num_fewshot: int | None, max_gen_toks: int | None, seed: int) -> dict[str, Any]:
    """lm-eval's task by name; several where the name is of a group."""
    if prepared.task is None:
        made = TaskManager().load([prepared.name])["tasks"]
    else:
        made = {prepared.name: ConfigurableTask(config=configuration(prepared, num_fewshot, max_gen_toks))}
    for task in made.values():
        if num_fewshot is not None and prepared.task is None:
            task.set_config("num_fewshot", num_fewshot)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    return made


def check(tasks: Sequence[Prepared], limit: int | None, num_fewshot: int | None, ranks: int) -> None:
    """Make all requests of our tasks once, before a model is loaded.

    Raises UserError for examples that lm-eval cannot ask, and for fewer of them than ranks.
    """
    quiet()
    for prepared in tasks:
        if prepared.task is None:
            continue
        count = min(limit or len(prepared.documents), len(prepared.documents))
        if count < ranks:
            raise UserError(f"{prepared.name}: {count} examples for {ranks} ranks; start as many ranks or fewer")
        try:
            [task] = _made(prepared, num_fewshot, None, 0).values()
            with contextlib.redirect_stderr(io.StringIO()):  # its bar
                task.build_all_requests(limit=limit, rank=0, world_size=1)
        except (ValueError, KeyError, IndexError, TypeError, ArrowException, UnicodeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{prepared.source}: lm-eval cannot ask {prepared.name} of these examples "
                f"({type(error).__name__}: {reason})"
            ) from None


def quiet() -> None:
    """Leave out what lm-eval and datasets say of every task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not logging.getLogger().handlers:  # else a library adds one that prints our own lines again
        logging.getLogger().addHandler(logging.NullHandler())
    datasets.disable_progress_bars()


def evaluate(
    lm: Evaluated,
    tasks: Sequence[Prepared],
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_gen_toks: int | None = None,
    seed: int = 0,
) -> dict[str, Result]:
    """The results by task; empty on all ranks but the first."""
    lm.only_compared = {
        p.name for p in tasks if p.task is not None and p.task.config["output_type"] == "multiple_choice"
    }
    quiet()
    made: dict[str, Any] = {}
    for prepared in tasks:
        made |= _made(prepared, num_fewshot, max_gen_toks, seed)
    ask: Any = lm_eval.evaluate  # its decorator hides the arguments
    own = all(p.task is not None for p in tasks)  # lm-eval's tasks get its standard errors
    found = ask(lm=lm, task_dict={"tasks": made}, limit=limit, bootstrap_iters=0 if own else 1000)
    if found is None:
        return {}
    lm.answers.reload()
    return {name: _result(name, samples, found["results"][name], lm) for name, samples in found["samples"].items()}


def _result(name: str, samples: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any], lm: Evaluated) -> Result:
    """A task's examples with their metrics, in the order of the data. `numbers`: lm-eval's own."""
    task = TASKS.get(name)
    if task is None:
        return _of_lm_eval(name, samples, numbers)
    names = dict(task.metrics)
    examples = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        metrics = {ours: float(sample[theirs]) for theirs, ours in names.items()}
        scores = _scores(name, sample, lm)
        if scores and "accuracy_norm" in metrics:
            metrics["accuracy_per_token"] = per_token_choice(scores, sample["target"])
        answers = [list(r) for r in sample["resps"]] if not scores else [s.value for s in scores]
        errors = [s.stderr for s in scores]
        prompts = [list(a) for a in sample["arguments"]]
        examples.append(Example(sample["doc_id"], sample["doc"], sample["target"], prompts, answers, errors, metrics))
    return Result(name, task.metrics[0][1], examples, task.note)


def _of_lm_eval(name: str, samples: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any]) -> Result:
    """A task of lm-eval's own: its numbers as it gives them, `metric` or with several filters `metric,filter`."""
    filters = {s["filter"] for s in samples}
    given = {}
    for key, value in numbers.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float):
            title = {"acc": "accuracy", "acc_stderr": "accuracy_stderr"}.get(metric, metric)
            given[title if len(filters) == 1 else f"{title},{kind}"] = float(value)
    examples = []
    for s in sorted(samples, key=lambda s: s["doc_id"]):
        metrics = {m: float(s[m]) for m in s["metrics"] if isinstance(s[m], int | float)}
        prompts = [list(a) for a in s["arguments"]]
        examples.append(Example(s["doc_id"], s["doc"], s["target"], prompts, list(s["resps"]), [], metrics))
    main = next(m for m in given if "_stderr" not in m)
    return Result(name, main, examples, given=given)


def _scores(name: str, sample: Mapping[str, Any], lm: Evaluated) -> list[Score]:
    """The scores of an example's continuations; none where texts were asked for."""
    pairs = [a for a in sample["arguments"] if len(a) == 2 and isinstance(a[1], str)]
    asked = [Asked(a[0], a[1], name not in lm.only_compared, name.endswith(FAULTY)) for a in pairs]
    found = [lm.answers.known.get(a.key) for a in asked]
    return [Score(**answer) for answer in found if isinstance(answer, dict)]
