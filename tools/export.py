"""Turn a run's checkpoint into a Hugging Face folder that loads without this project.

    python -m tools.export runs/diffugpt_s exports/diffugpt_s
    python -m tools.export runs/diffugpt_s exports/base --step 0     # the model before training, with its mask token

In: RUN_DIR. Out: a folder with safetensors under the base architecture's own parameter names, config.json, the
tokenizer and a model card. Of a masked diffusion run it also holds the mask token and the code that trained:

    AutoModel.from_pretrained("exports/diffugpt_s", trust_remote_code=True)

An autoregressive run gives a plain causal language model of transformers, without code of this project:

    AutoModelForCausalLM.from_pretrained("exports/gpt")

DeepSpeed keeps checkpoints as pickles: export only runs that you trust.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from huggingface_hub.constants import SAFETENSORS_WEIGHTS_FILE_PATTERN
from safetensors.torch import save_file
from tqdm import tqdm
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
from pretrain import adapt
from pretrain.model.modeling_diffullama import DiffusionModel, diffusion_class
from pretrain.model.reading import uses_shift
from pretrain.runtime.checkpoint import find_checkpoint

from .run_folder import RunFolder, read_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_SIZE = "4GB"
DECODING = {"order": "left_to_right", "temperature": 1.0}  # one token a step is exact; see docs/decoding.md


class Weight(Protocol):
    """A tensor, or one of DeepSpeed's that is read from disk when `contiguous` is called."""

    shape: torch.Size

    def contiguous(self) -> torch.Tensor: ...


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
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} is not empty; choose another folder or delete it")
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
    weights = matched_weights(weights, model)
    files = split_into_files(weights, model.dtype, max_shard_size)
    _describe(model, about)
    with atomic_folder(out_dir) as folder:
        save_weights(weights, files, model.dtype, folder)
        if isinstance(model, DiffusionModel):
            model.save_code(folder)
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if isinstance(model, DiffusionModel):
            generation_defaults(model.config, tokenizer).save_pretrained(folder)
        (folder / "README.md").write_text(model_card(run, model, about), encoding="utf-8")
    return out_dir


def shipped_class(run: RunFolder, config: PretrainedConfig) -> Any:
    """The class of the exported model: with bidirectional attention, or transformers' own where nothing is masked."""
    if run.config.objective == "autoregressive":
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return diffusion_class(type(config))


def empty_model(config: PretrainedConfig, dtype: torch.dtype, model_class: Any) -> PreTrainedModel:
    """The model without storage: its parameters' names, shapes, sizes and ties."""
    with torch.device("meta"):
        return model_class(config).to(dtype)


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
    if about["zero_stage"] == 0:
        path = folder / "mp_rank_00_model_states.pt"
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)["module"], about
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    return weights, about


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


def generation_defaults(config: Any, tokenizer: Any) -> GenerationConfig:
    """generation_config.json: what `diffusion_generate` does unless it is told otherwise."""
    special = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")}
    return GenerationConfig(do_sample=True, **DECODING, **special, pad_token_id=tokenizer.pad_token_id)


def matched_weights(weights: Mapping[str, Weight], model: PreTrainedModel) -> dict[str, Weight]:
    """The weight of each of the model's names; a weight that is tied to another is left out.

    Raises UserError for a missing name or another shape.
    """
    tied = model.all_tied_weights_keys
    aliases = {source: name for name, source in tied.items()}
    found = {}
    for name, expected in model.state_dict().items():
        if name in tied:
            continue
        weight = weights.get(name, weights.get(aliases.get(name, "")))
        if weight is None:
            raise UserError(f"the checkpoint does not fit the run's configuration: {name} is missing")
        if weight.shape != expected.shape:
            shapes = f"{tuple(weight.shape)}, expected {tuple(expected.shape)}"
            raise UserError(f"the checkpoint does not fit the run's configuration: {name} has shape {shapes}")
        found[name] = weight
    return found


def split_into_files(weights: Mapping[str, Weight], dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
    """Which weights go into which file, nothing read. Raises UserError for a `max_shard_size` that is not a size."""
    try:
        return split_state_dict_into_shards_factory(
            dict(weights),
            get_storage_size=lambda weight: weight.shape.numel() * dtype.itemsize,
            filename_pattern=SAFETENSORS_WEIGHTS_FILE_PATTERN,
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise UserError(f"--max_shard_size is {max_shard_size!r}, expected a number and a unit, such as 4GB") from None


def save_weights(weights: Mapping[str, Weight], split: StateDictSplit, dtype: torch.dtype, folder: Path) -> None:
    """Write safetensors as transformers does, with one file at a time in memory."""
    files = split.filename_to_tensors.items()
    for file, names in tqdm(files, desc="write", unit="file", disable=not split.is_sharded):
        tensors = {name: weights[name].contiguous().to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def model_card(run: RunFolder, model: PreTrainedModel, about: dict) -> str:
    """README.md of the folder, with the Hub's front matter."""
    base = run.config.model.base
    fresh = run.config.model.init == "random"
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "origin": f"A new model with the tokenizer of {Path(base).name}" if fresh else Path(base).name,
        "how": "pretraining" if fresh else "continual pretraining",
        "trained": f"{about['step']:,} steps, {about['tokens']:,} tokens, on `{run.config.data.path}`",
        "architecture": f"`{model.config.model_type}`, {parameters / 1e6:.1f}M parameters",
    }
    metrics = [m for m in run.metrics if m["step"] <= about["step"]]
    front_matter = [] if fresh or Path(base).exists() else [f"base_model: {base}"]  # a name on the Hub
    if isinstance(model, DiffusionModel):
        facts["reads"] = SHIFTED if uses_shift(model.config) else NOT_SHIFTED
        facts["table"] = _table(metrics, {"val_nelbo": "NELBO", "val_masked_ce": "masked CE"})
        card = DIFFUSION_CARD
        front_matter = ["pipeline_tag: fill-mask", "tags: [diffusion, masked-diffusion, text-diffusion]", *front_matter]
    else:
        facts["table"] = _table(metrics, {run.reported.held_out: "cross-entropy"})
        card = CAUSAL_CARD
        front_matter = ["pipeline_tag: text-generation", *front_matter]
    return "\n".join(["---", "library_name: transformers", *front_matter, "---", card.format(**facts)])


def _table(metrics: list[dict], columns: dict[str, str]) -> str:
    """Markdown of the validations among `metrics`; `columns` maps their names in metrics.jsonl to titles."""
    lines = [f"| step | tokens | {' | '.join(columns.values())} |", "| --- " * (2 + len(columns)) + "|"]
    for m in metrics:
        if all(m.get(key) is not None for key in columns):
            losses = " | ".join(f"{m[key]:.3f}" for key in columns)
            lines.append(f"| {m['step']} | {m['tokens']:,} | {losses} |")
    return "\n".join(lines)


SHIFTED = "the shift from the autoregressive model is done inside."
NOT_SHIFTED = "hidden state i gives them: there is no shift, and the first token may be a mask too."

DIFFUSION_CARD = """
# A masked diffusion language model

{origin}, trained as a masked diffusion model by {how}
(["Scaling Diffusion Language Models via Adaptation from Autoregressive Models"](https://arxiv.org/abs/2410.17891))
for {trained}.
Architecture {architecture}, bidirectional.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModel.from_pretrained(path, trust_remote_code=True)
text = "Once upon a time there was a" + tokenizer.mask_token * 6 + " who lived in a castle."
ids = tokenizer(text, return_tensors="pt").input_ids
print(tokenizer.decode(model.diffusion_generate(ids, temperature=0)[0]))
```

`generation_config.json` holds the defaults: one token a step, from left to right. `order` (also entropy, confidence,
random), `block_length`, `threshold`, `entropy_bound`, `cache="window"`, `streamer` and others are in the docstring.

`forward(input_ids).logits[:, i]` predict token i; {reads}

## Held-out loss

NELBO in nats a token (an upper bound of the negative log-likelihood), masked cross-entropy in nats a
masked token, both on noise that is the same for every row of the table.

{table}

## Licence

That of the base model and of the training data.
"""

CAUSAL_CARD = """
# An autoregressive language model

{origin}, trained on next-token prediction by {how} for {trained}.
Architecture {architecture}, causal. It is a plain model of transformers: no code beside the weights, nothing to mask.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))
```

## Held-out loss

In nats a token.

{table}

## Licence

That of the base model and of the training data.
"""


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
    args = parser.parse_args(argv)
    print(f"wrote {export(args.run_dir, args.out_dir, args.step, args.dtype, args.max_shard_size)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
