"""How good a checkpoint is: the tasks of the paper, for diffusion models and for autoregressive ones.

    python -m tools.evaluate exports/demo --tasks table1 --data_dir eval --limit 100 --output evaluations/demo
    python -m tools.evaluate HuggingFaceTB/SmolLM2-135M --tasks lambada,piqa --data_dir eval --output evaluations/base
    torchrun --nproc_per_node 8 -m tools.evaluate exports/diffullama_7b --tasks table1 --output evaluations/7b

The examples come from --data_dir, a .jsonl or .jsonl.gz for each task whose name begins with the task's, or else from
the Hub. --tasks also takes table9 (mathematics and question answering, zero-shot, few-shot, several drawn answers, in
steps), table1_paper (as the authors' scripts score, faults included) and any task of lm-evaluation-harness.
Writes results.json, results.md and every example to OUT. Stopped? The same command goes on where it was; with other
tasks or another --limit it adds to what OUT has.
"""

import argparse
import fcntl
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.cli import make_parser, resumable_command
from common.errors import UserError
from common.files import write_atomically
from common.log import log, this_rank
from pretrain.model.settings import SamplingSettings

from .decoding import settings_of
from .evaluation.likelihood import DEFAULT, DRAWS, LIKELIHOODS
from .generate import add_rules, given_settings
from .loading import fingerprint, kind_of, load_any

MISSING = ""
try:
    from .evaluation import results
    from .evaluation import run as running
    from .evaluation.answers import Answers
    from .evaluation.autoregressive_lm import AutoregressiveLM
    from .evaluation.diffusion_lm import DiffusionLM, Likelihood
    from .evaluation.sandbox import check_sandbox
    from .evaluation.tasks import chosen
except ImportError as error:  # --help works without them
    MISSING = error.name or str(error)

FORMAT = 1  # of the answers; raised when a prompt, an estimator or a way of decoding changes
LOCK = ".lock"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError for values that mean nothing."""
    parser = make_parser("python -m tools.evaluate", __doc__)
    parser.add_argument(
        "checkpoint", help="an exported diffusion model or an autoregressive one; a folder or a name on the Hub"
    )
    parser.add_argument(
        "--tasks", required=True, help="names with commas; table1, table1_paper, table9 for all of a table"
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="folder of the results")
    parser.add_argument("--data_dir", help="folder of local files; default: the Hub")
    parser.add_argument("--limit", type=int, help="the first so many examples of each task; default: all")
    parser.add_argument(
        "--likelihood", choices=LIKELIHOODS, default=DEFAULT, help="of a diffusion model; default: %(default)s"
    )
    parser.add_argument(
        "--draws", type=int, default=DRAWS, help="of each likelihood; default: %(default)s; short targets are exact"
    )
    parser.add_argument("--seed", type=int, default=0, help="of draws and texts; default: %(default)s")
    parser.add_argument(
        "--batch_size", type=int, default=32, help="rows of a model call; changes no score; default: %(default)s"
    )
    parser.add_argument(
        "--num_fewshot", type=int, help="examples before each question, but none before gaps; default: as the task says"
    )
    parser.add_argument("--max_gen_toks", type=int, help="tokens that an answer may have; default: as the task says")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 on a GPU, else fp32")
    parser.add_argument(
        "--dry_run", action="store_true", help="read the examples, say what would be asked, load no model"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code in the checkpoint")
    add_rules(parser)
    args = parser.parse_args(argv)
    for name, least in (
        ("limit", 1),
        ("draws", 1),
        ("batch_size", 1),
        ("num_fewshot", 0),
        ("max_gen_toks", 1),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    if args.temperature is not None:
        raise UserError("--temperature is not for evaluating: each task says whether texts are drawn, and how hot")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a file, expected a folder")
    return args


def start_ranks() -> torch.device:
    """Join the other ranks where torchrun has started several; the device of this one."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # one rank may be done long before another
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    return torch.device("cpu")


def check_folder(folder: Path, stamp: dict[str, Any]) -> None:
    """Raise UserError where OUT has other things in it, or answers that depend on something else than `stamp`."""
    path = folder / "settings.json"
    if not path.exists():
        if folder.exists() and any(p.name != LOCK for p in folder.iterdir()):
            raise UserError(f"{folder} is not empty, and holds no results; choose another --output")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; choose another --output") from None
    other = [name for name in {**before, **stamp} if before.get(name) != stamp.get(name)]
    if other:
        raise UserError(
            f"{folder} has results with {other[0]} {before.get(other[0])!r}, this command has "
            f"{stamp.get(other[0])!r}; choose another --output"
        )


def check_counts(folder: Path, tasks: Sequence[Any], limit: int | None) -> None:
    """Raise UserError where OUT has more examples of a task than this command asks for, which would be lost."""
    known = results.earlier(folder)
    for p in tasks:
        count = min(limit or len(p.documents), len(p.documents))
        if p.task is not None and known.get(p.name, {"n": 0})["n"] > count:
            raise UserError(
                f"{folder} has {known[p.name]['n']} examples of {p.name}, this command asks for {count}; "
                "raise --limit, or choose another --output"
            )


@contextmanager
def opened(folder: Path, stamp: dict[str, Any]) -> Iterator[None]:
    """OUT, for this command alone. All ranks call it; the first one writes. Raises UserError on all of them."""
    check_folder(folder, stamp)
    wait()
    with ExitStack() as held:
        if this_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(folder / LOCK, "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process writes {folder}") from None
            write_atomically(folder / "settings.json", (json.dumps(stamp, indent=2) + "\n").encode())
        wait()
        yield


def wait() -> None:
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def prepared_tasks(args: argparse.Namespace, names: Sequence[str], kind: str) -> list[Any]:
    """The tasks with their examples, checked before a model is loaded. Raises UserError."""
    tasks = running.prepare(names, kind, args.data_dir, args.num_fewshot)
    for p in tasks:
        left_out = f", {p.left_out} left out" if p.left_out else ""
        log.info("%s: %d examples of %s%s", p.name, len(p.documents), p.source, left_out)
    if not tasks:
        raise UserError(f"none of these tasks is for {kind.replace('_', ' ')} models")
    if any(p.task is not None and p.task.runs_code for p in tasks):
        check_sandbox()
    running.check(tasks, args.limit, args.num_fewshot, int(os.environ.get("WORLD_SIZE", "1")))
    return tasks


def decided_by(args: argparse.Namespace, kind: str, dtype: torch.dtype, settings: SamplingSettings) -> dict:
    """What the answers in OUT depend on, besides their own texts."""
    stamp: dict[str, Any] = {
        "model": args.checkpoint, "kind": kind, "weights": fingerprint(args.checkpoint), "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."), "trust_remote_code": args.trust_remote_code, "format": FORMAT,
        "num_fewshot": args.num_fewshot, "max_gen_toks": args.max_gen_toks,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")},
    }  # fmt: skip
    if kind == "masked_diffusion":
        stamp |= {"likelihood": {"name": args.likelihood, "draws": args.draws}}
        chosen = {**vars(settings), "order": settings.by, "temperature": None}  # tasks have their own temperatures
        stamp["decoding"] = {k: v for k, v in chosen.items() if v is not None and v is not False and v != 0.0}
    return stamp


def chosen_settings(model: Any, given: dict[str, Any]) -> SamplingSettings:
    """As `settings_of`; where neither the user nor the checkpoint names an order or a rule, by confidence.

    The random order of Algorithm 2 would make it chance whether greedy decoding gives a word.
    """
    settings = settings_of(model, given)
    return replace(settings, order="confidence") if settings.blind and settings.by == "random" else settings


@resumable_command
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    args = arguments(argv)
    if MISSING:
        raise UserError(f'{MISSING} is missing: pip install -c constraints.txt -e ".[eval]"')
    device = start_ranks()
    names = chosen(args.tasks)
    kind = kind_of(args.checkpoint, args.trust_remote_code)
    tasks = prepared_tasks(args, names, kind)
    others = [name for name in names if name not in {p.name for p in tasks}]
    if others:
        log.warning("not for %s models: %s", kind.replace("_", " "), ", ".join(others))
    if args.dry_run:
        return 0
    folder = Path(args.output)
    check_counts(folder, tasks, args.limit)
    dtype = DTYPES.get(args.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model, tokenizer = load_any(args.checkpoint, kind, dtype, device, args.trust_remote_code)
    diffusion = kind == "masked_diffusion"
    settings = chosen_settings(model, given_settings(args)) if diffusion else SamplingSettings()
    stamp = decided_by(args, kind, dtype, settings)
    with opened(folder, stamp):
        answers = Answers(folder / "answers", this_rank())
        if diffusion:
            likelihood = Likelihood(args.likelihood, args.draws, args.seed)
            lm = DiffusionLM(model, tokenizer, answers, likelihood, settings, args.batch_size)
        else:
            lm = AutoregressiveLM(model, tokenizer, answers, args.seed, args.batch_size)
        found = running.evaluate(lm, tasks, args.limit, args.num_fewshot, args.max_gen_toks, args.seed)
        if this_rank() == 0:
            about = {
                "settings": {
                    k: v for k, v in stamp.items() if k in ("dtype", "num_fewshot", "max_gen_toks", "decoding")
                }
            }
            about |= {k: v for k, v in stamp.items() if k in ("model", "kind", "likelihood", "seed", "versions")}
            about |= {"not_for_this_model": others, "truncated": len(answers.truncated)}
            report = results.write_results(folder, about, found, tasks)
            print(results.table(report))
            log.info("written to %s", folder)
        wait()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
