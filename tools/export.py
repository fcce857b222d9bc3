"""Turn a run's checkpoint into a Hugging Face folder that loads without this project.

    python -m tools.export runs/diffugpt_s exports/diffugpt_s
    python -m tools.export runs/diffugpt_s exports/base --step 0     # the model before training, with its mask token
    python -m tools.export runs/diffullama exports/gguf --for llama.cpp
    python -m tools.export runs/diffugpt_s exports/gpt2 --as_autoregressive
    python -m tools.export runs/diffugpt_s exports/diffugpt_s --push_to_hub my-team/diffugpt_s      # see docs/hub.md

In: RUN_DIR. Out: a folder with safetensors under the base architecture's own parameter names, config.json, the
tokenizer and a model card. Of a masked diffusion run it also holds the mask token and the code that trained:

    AutoModel.from_pretrained("exports/diffugpt_s", trust_remote_code=True)

Where transformers' own class can be bidirectional, AutoModelForCausalLM loads it too, without remote code.
An autoregressive run gives a plain causal language model of transformers, without code of this project:

    AutoModelForCausalLM.from_pretrained("exports/gpt")

Before the folder is there, the logits of what was written are compared with those of the checkpoint.
DeepSpeed keeps checkpoints as pickles: export only runs that you trust.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from common.cli import command, make_parser
from common.errors import UserError
from common.files import atomic_folder
from common.log import log
from pretrain import adapt
from pretrain.config import ModelConfig
from pretrain.model.modeling_diffullama import DiffusionModel, diffusion_class
from pretrain.runtime.checkpoint import checkpoint_id, find_checkpoint

from . import llama_cpp, repository
from .card import write_card
from .parity import Parity, compare, fixed_batch, logits_of
from .run_folder import RunFolder, read_run
from .shipping import check_free, describe_for_transformers
from .trained import trained_weights
from .weights import (
    DTYPES,
    MAX_SHARD_SIZE,
    Weight,
    empty_model,
    first_rows,
    matched_weights,
    save_weights,
    split_into_files,
    stored_weights,
)

TARGETS = ("transformers", "llama.cpp")


def export(
    run_dir: str | Path,
    out_dir: str | Path,
    step: int | None = None,
    dtype: str = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    target: str = "transformers",
) -> Path:
    """Write the folder, whole or not at all, and return its path.

    `step` None takes the newest checkpoint, 0 the model before training. `dtype` "auto" takes the one that training
    computed in, which gives the trained model's logits exactly. `max_shard_size` limits each weights file; as much
    is in memory at once. `target`: transformers; llama.cpp; or autoregressive, the base's own architecture and
    vocabulary, causal.
    Raises UserError for an `out_dir` that is not empty, for a run without that checkpoint, for a model that the target
    does not take, and where the logits of what was written are not the trained ones.
    """
    out_dir = Path(out_dir).resolve()
    check_free(out_dir)
    run = read_run(run_dir)
    described = run.path / "model"
    if not described.exists():
        raise UserError(f"{described} not found; the run has not begun to train")
    config = AutoConfig.from_pretrained(described)
    tokenizer = AutoTokenizer.from_pretrained(described)
    check_target(run, config, target)
    sentencepiece = llama_cpp.sentencepiece_model(run.config.model, tokenizer) if target == "llama.cpp" else None
    trained, about = _untrained(run, config) if step == 0 else _trained(run, step)
    config.dtype = DTYPES[about["dtype"]]
    shipped = copy.deepcopy(config)
    if target == "autoregressive" and run.config.objective != "autoregressive":
        shipped = base_as_it_was(run)
        tokenizer = adapt.load_tokenizer(run.config.model)
    shipped.dtype = config.dtype if dtype == "auto" else DTYPES[dtype]
    model = empty_model(shipped, shipped.dtype, shipped_class(run, config, target))
    weights = matched_weights(first_rows(trained, model) if target == "autoregressive" else trained, model)
    files = split_into_files(weights, model.dtype, max_shard_size)
    _finish_config(model, about, run.config.objective)
    with atomic_folder(out_dir) as folder, adapt.freed_memory_returns():
        save_weights(weights, files, model.dtype, folder)
        if target == "llama.cpp":
            llama_cpp.write_description(folder, model.config, tokenizer, sentencepiece)
        else:
            causal = not isinstance(model, DiffusionModel)
            describe_for_transformers(folder, model, tokenizer, base_generation(run.config.model) if causal else None)
        write_card(folder, run, model, about, target)
        shipped = model.config if target == "llama.cpp" else AutoConfig.from_pretrained(folder)
        check_parity(folder, shipped, trained, config, type(model))
    log.info("exported step %d", about["step"])
    return out_dir


def check_target(run: RunFolder, config: PretrainedConfig, target: str) -> None:
    """Raise UserError where what is asked for cannot be made of this run."""
    if target == "autoregressive" and run.config.model.init == "random":
        raise UserError("--as_autoregressive gives back the base's architecture, and this run began without a base")
    if target == "llama.cpp":
        reason = llama_cpp.reason_unsupported(config)
        if run.config.objective == "autoregressive":
            reason = "this run is autoregressive: export it as usual"
        if reason:
            raise UserError(f"llama.cpp cannot run this model: {reason}")


def shipped_class(run: RunFolder, config: PretrainedConfig, target: str = "transformers") -> Any:
    """The class of the exported model: with bidirectional attention, or transformers' own where nothing is masked."""
    if "autoregressive" in (run.config.objective, target):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return diffusion_class(type(config))


def base_generation(base: ModelConfig) -> GenerationConfig | None:
    """The decoding defaults of an autoregressive base; None where it has none."""
    try:
        return GenerationConfig.from_pretrained(base.base, revision=base.revision)
    except OSError:
        return None


def base_as_it_was(run: RunFolder) -> PretrainedConfig:
    """The configuration of the base that the run began with, and nothing of diffusion in it. Raises UserError."""
    config = adapt.base_config(run.config.model, seq_len=0)
    adapt.describe_model(config, {})
    return config


def check_parity(
    folder: Path, shipped: PretrainedConfig, trained: Mapping[str, Weight], config: PretrainedConfig, model_class: Any
) -> None:
    """Say how the logits of the weights in `folder` compare with those of the trained ones, on a fixed batch.

    `shipped` describes the first, `config` the second. Raises UserError where they differ when both compute in the
    dtype that was written.
    """
    ids = fixed_batch(config, vocabulary=shipped.vocab_size)
    written = logits_of(model_class, shipped, stored_weights(folder), ids)

    def in_dtype(dtype: torch.dtype) -> Parity:
        described = copy.deepcopy(config)
        described.dtype = dtype
        return compare(written, logits_of(model_class, described, trained, ids)[..., : shipped.vocab_size])

    dtype: Any = shipped.dtype
    parity = in_dtype(dtype)
    if not parity.exact:
        raise UserError(f"the written weights are not the trained ones; nothing was kept ({parity})")
    trained_in: Any = config.dtype
    log.info("%s", parity if dtype == trained_in else in_dtype(trained_in))


def _untrained(run: RunFolder, config: PretrainedConfig) -> tuple[Mapping[str, Weight], dict]:
    """The weights that the run began with, in the dtype that it trained in."""
    base = adapt.base_config(run.config.model, seq_len=0)
    mask_token_id = getattr(config, "mask_token_id", None)
    dtype = "bf16" if config.dtype == torch.bfloat16 else "fp32"
    model = adapt.load_model(run.config.model, base, mask_token_id, DTYPES[dtype], seed=run.config.train.seed)
    return model.state_dict(), {"step": 0, "tokens": 0, "dtype": dtype}


def _trained(run: RunFolder, step: int | None) -> tuple[Mapping[str, Weight], dict]:
    """The fp32 weights of a checkpoint, read when they are needed, and its checkpoint.json."""
    found = find_checkpoint(run.path, step)
    if found is None:
        there = sorted(f.name for f in (run.path / "checkpoints").glob("step_*")) or ["none"]
        raise UserError(
            f"{run.path} has no checkpoint{'' if step is None else f' of step {step}'}; it has {', '.join(there)}"
        )
    folder, about = found
    return trained_weights(folder, about["zero_stage"]), {**about, "checkpoint": checkpoint_id(folder)}


def _finish_config(model: PreTrainedModel, about: dict, objective: str) -> None:
    """Make config.json that of the export: its dtype, its class, the steps behind it."""
    config: Any = model.config
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    trained = {key: about[key] for key in ("step", "tokens", "checkpoint") if key in about}
    if isinstance(model, DiffusionModel):
        config.diffusion = {**config.diffusion, **trained}
        return
    config.use_cache = True  # training goes without; decoding from left to right would be slow
    if objective == "autoregressive":
        config.training = trained
    if hasattr(config, "auto_map"):  # of a diffusion model that the run began with
        del config.auto_map


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
    parser.add_argument(
        "--for", dest="target", choices=TARGETS, default="transformers", help="who reads it; default: %(default)s"
    )
    parser.add_argument(
        "--as_autoregressive",
        action="store_true",
        help="give the weights back in the base's own architecture and vocabulary: causal, no mask token",
    )
    parser.add_argument("--push_to_hub", metavar="org/name", help="then push it to this repository of the Hub")
    parser.add_argument("--revision", metavar="BRANCH", help="of the repository; default: main")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(argv)
    if args.as_autoregressive and args.target != "transformers":
        raise UserError(f"--as_autoregressive goes with --for transformers, not with --for {args.target}")
    if not args.push_to_hub and (args.revision or args.private):
        raise UserError("--revision and --private are of a push; give --push_to_hub org/name with them")
    if args.push_to_hub:  # what would fail after the export is to fail now
        check_free(Path(args.out_dir))
        repository.check_repo_id(args.push_to_hub, args.revision)
        try:
            repository.prepare(args.push_to_hub, args.private)
        except repository.HubUnreachable as error:
            raise UserError(f"{error}; nothing was exported") from None
    target = "autoregressive" if args.as_autoregressive else args.target
    print(f"wrote {export(args.run_dir, args.out_dir, args.step, args.dtype, args.max_shard_size, target)}")
    if args.push_to_hub:
        print(f"pushed {_push(args)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
