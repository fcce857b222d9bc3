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
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.cli import make_parser, resumable_command
from common.errors import UserError
from common.files import write_atomically
from common.log import log
from pretrain.model.settings import SamplingSettings

from .decoding import settings_of
from .evaluation.likelihood import DEFAULT, DRAWS, LIKELIHOODS
from .evaluation.loading import fingerprint, kind_of, load_any
from .generate import add_rules, given_settings

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
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a file, expected a folder")
    return args


def start_ranks() -> torch.device:
    """Join the other ranks where torchrun has started several; the device of this one."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    return torch.device("cpu")


def settle(folder: Path, stamp: dict[str, Any]) -> None:
    """Write what the answers in OUT depend on. Raises UserError where OUT has answers of something else."""
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in {**before, **stamp} if before.get(name) != stamp.get(name)]
        if other:
            raise UserError(
                f"{folder} has results with {other[0]} {before.get(other[0])!r}, this command has "
                f"{stamp.get(other[0])!r}; choose another --output"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and holds no results; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(stamp, indent=2) + "\n").encode())


@resumable_command
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    args = arguments(argv)
    try:
        from .evaluation import run as running
        from .evaluation.autoregressive_lm import AutoregressiveLM
        from .evaluation.diffusion_lm import DiffusionLM, Likelihood
        from .evaluation.harness import Answers
        from .evaluation.results import table, write_results
        from .evaluation.sandbox import check_sandbox
        from .evaluation.tasks import chosen
    except ImportError as error:
        raise UserError(f'{error.name} is missing: pip install -c constraints.txt -e ".[eval]"') from None
    device = start_ranks()
    names = chosen(args.tasks)
    kind = kind_of(args.checkpoint, args.trust_remote_code)
    tasks = running.prepare(names, kind, args.data_dir, args.num_fewshot)
    others = [name for name in names if name not in {p.name for p in tasks}]
    for p in tasks:
        log.info(
            "%s: %d examples of %s%s",
            p.name,
            len(p.documents),
            p.source,
            f", {p.left_out} left out" if p.left_out else "",
        )
    if others:
        log.warning("not for %s models: %s", kind.replace("_", " "), ", ".join(others))
    if not tasks:
        raise UserError("no task is left to ask")
    if any(p.task is not None and p.task.runs_code for p in tasks):
        check_sandbox()
    if args.dry_run:
        return 0
    folder = Path(args.output)
    dtype = DTYPES.get(args.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model, tokenizer = load_any(args.checkpoint, kind, dtype, device, args.trust_remote_code)
    given = given_settings(args)
    settings = settings_of(model, given) if kind == "masked_diffusion" else SamplingSettings()
    stamp: dict[str, Any] = {
        "model": args.checkpoint, "kind": kind, "weights": fingerprint(args.checkpoint, model), "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if kind == "masked_diffusion":
        stamp |= {"likelihood": args.likelihood, "draws": args.draws}
        stamp["settings"] = {
            k: v for k, v in vars(settings).items() if v is not None and v is not False and k != "temperature"
        }
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        settle(folder, stamp)
    if dist.is_initialized():
        dist.barrier()
    answers = Answers(folder / "answers", rank)
    if kind == "masked_diffusion":
        likelihood = Likelihood(args.likelihood, args.draws, args.seed)
        lm = DiffusionLM(model, tokenizer, answers, likelihood, settings, args.batch_size)
    else:
        lm = AutoregressiveLM(model, tokenizer, answers, args.seed, args.batch_size)
    results = running.evaluate(lm, tasks, args.limit, args.num_fewshot, args.max_gen_toks, args.seed)
    if rank == 0:
        for p in tasks:
            if p.name in results:
                results[p.name].left_out, results[p.name].source = p.left_out, p.source
        report = {
            "model": args.checkpoint, "kind": kind,
            **({"likelihood": {"name": args.likelihood, "draws": args.draws}} if kind == "masked_diffusion" else {}),
            "seed": args.seed, "settings": stamp, "not_for_this_model": others, "truncated": len(lm.truncated),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")},
        }  # fmt: skip
        write_results(folder, report, results)
        print(table(json.loads((folder / "results.json").read_text(encoding="utf-8"))))
        log.info("written to %s", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
