"""Turn a run's checkpoint into a Hugging Face folder that loads without this project.

    python -m tools.export runs/diffugpt_s exports/diffugpt_s
    python -m tools.export runs/diffugpt_s exports/base --step 0     # the model before training, with its mask token
    python -m tools.export runs/diffugpt_s exports/diffugpt_s --push_to_hub my-team/diffugpt_s      # see docs/hub.md

In: RUN_DIR. Out: a folder with safetensors under the base architecture's own parameter names, config.json, the
tokenizer and a model card. Of a masked diffusion run it also holds the mask token and the code that trained:

    AutoModel.from_pretrained("exports/diffugpt_s", trust_remote_code=True)

An autoregressive run gives a plain causal language model of transformers, without code of this project:

    AutoModelForCausalLM.from_pretrained("exports/gpt")

DeepSpeed keeps checkpoints as pickles: export only runs that you trust.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from common.cli import command, make_parser
from common.errors import UserError
from pretrain import adapt
from pretrain.model.modeling_diffullama import DiffusionModel, diffusion_class
from pretrain.runtime.checkpoint import find_checkpoint

from . import repository
from .card import model_card
from .run_folder import RunFolder, read_run
from .shipping import check_free, write_folder
from .trained import trained_weights
from .weights import DTYPES, MAX_SHARD_SIZE, Weight, empty_model


def export(
    run_dir: str | Path,
    out_dir: str | Path,
    step: int | None = None,
    dtype: str = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Path:
    """Write the Hugging Face folder and return its path.

    `step` None takes the newest checkpoint, 0 the model before training. `dtype` "auto" takes the one that training
    computed in, which gives the trained model's logits exactly. `max_shard_size` limits each weights file; as much
    is in memory at once.
    Raises UserError for an `out_dir` that is not empty and for a run without that checkpoint.
    """
    out_dir = Path(out_dir)
    check_free(out_dir)
    run = read_run(run_dir)
    described = run.path / "model"
    if not described.exists():
        raise UserError(f"{described} not found; the run has not begun to train")
    config = AutoConfig.from_pretrained(described)
    tokenizer = AutoTokenizer.from_pretrained(described)
    weights, about = _untrained(run, config) if step == 0 else _trained(run, step)
    if dtype != "auto":
        about["dtype"] = dtype
    model = empty_model(config, DTYPES[about["dtype"]], shipped_class(run, config))
    _describe(model, about)
    write_folder(out_dir, model, weights, tokenizer, model_card(run, model, about), max_shard_size)
    return out_dir


def shipped_class(run: RunFolder, config: PretrainedConfig) -> Any:
    """The class of the exported model: with bidirectional attention, or transformers' own where nothing is masked."""
    if run.config.objective == "autoregressive":
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return diffusion_class(type(config))


def _untrained(run: RunFolder, config: PretrainedConfig) -> tuple[Mapping[str, Weight], dict]:
    """The weights that the run began with, in the dtype that it trained in."""
    base = adapt.base_config(run.config.model, seq_len=0)
    mask_token_id = getattr(config, "mask_token_id", None)
    dtype = "bf16" if config.dtype == torch.bfloat16 else "fp32"
    model = adapt.load_model(run.config.model, base, mask_token_id, DTYPES[dtype], seed=run.config.train.seed)
    return model.state_dict(), {"step": 0, "tokens": 0, "dtype": dtype}


def _describe(model: PreTrainedModel, about: dict) -> None:
    """Make the run's config.json that of the export: its dtype, its class, the steps behind it."""
    config: Any = model.config
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    if isinstance(model, DiffusionModel):
        config.diffusion = {**config.diffusion, "step": about["step"], "tokens": about["tokens"]}
        return
    config.use_cache = True  # training goes without; decoding from left to right would be slow
    if hasattr(config, "auto_map"):  # of a diffusion model that the run began with
        del config.auto_map


def _trained(run: RunFolder, step: int | None) -> tuple[Mapping[str, Weight], dict]:
    """The fp32 weights of a checkpoint, read when they are needed, and its checkpoint.json."""
    found = find_checkpoint(run.path, step)
    if found is None:
        there = sorted(f.name for f in (run.path / "checkpoints").glob("step_*")) or ["none"]
        raise UserError(
            f"{run.path} has no checkpoint{'' if step is None else f' of step {step}'}; it has {', '.join(there)}"
        )
    folder, about = found
    return trained_weights(folder, about["zero_stage"]), about


def _push(args: Namespace) -> str:
    """Push the export; returns the commit's URL. Raises UserError that says how to push again without an export."""
    options = (f" --revision {args.revision}" if args.revision else "") + (" --private" if args.private else "")
    try:
        return repository.push(args.out_dir, args.push_to_hub, args.revision, args.private)
    except (UserError, repository.HubUnreachable) as error:
        again = f"python -m tools.hub push {args.out_dir} {args.push_to_hub}{options}"
        raise UserError(f"{error}; the export is in {args.out_dir}, push it with: {again}") from None


@command
def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit code."""
    parser = make_parser("python -m tools.export", __doc__)
    parser.add_argument("run_dir", help="what `run_dir` was when training")
    parser.add_argument("out_dir", help="the folder to write; must be empty or not exist")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint; 0: the model before training")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as trained")
    parser.add_argument(
        "--max_shard_size", default=MAX_SHARD_SIZE, metavar="SIZE", help="of a weights file; default: %(default)s"
    )
    parser.add_argument("--push_to_hub", metavar="org/name", help="then push it to this repository of the Hub")
    parser.add_argument("--revision", metavar="BRANCH", help="of the repository; default: main")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(argv)
    if not args.push_to_hub and (args.revision or args.private):
        raise UserError("--revision and --private are of a push; give --push_to_hub org/name with them")
    if args.push_to_hub:  # what would fail after the export is to fail now
        check_free(Path(args.out_dir))
        repository.check_repo_id(args.push_to_hub, args.revision)
        try:
            repository.prepare(args.push_to_hub, args.private)
        except repository.HubUnreachable as error:
            raise UserError(f"{error}; nothing was exported") from None
    print(f"wrote {export(args.run_dir, args.out_dir, args.step, args.dtype, args.max_shard_size)}")
    if args.push_to_hub:
        print(f"pushed {_push(args)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
