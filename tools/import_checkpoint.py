"""Turn a diffusion language model that others adapted into a folder as `tools.export` writes it, and back.

    python -m tools.import_checkpoint diffusionfamily/diffugpt-s imported/diffugpt_s
    python -m tools.import_checkpoint gsm_adapter imported/gsm --base diffullama     # a LoRA, merged
    python -m tools.import_checkpoint exports/mine theirs/mine --to a2d

In: SOURCE, a folder or a name on the Hub, in one of the layouts diffugpt, diffullama, dream, a2d (docs/import.md).
Out: a folder with the same weights under the base architecture's own names, the mask token, the code to load it, a
card. Train from it with model.base=OUT, fill gaps with `python -m tools.generate OUT`. With --to: the reverse.

None of the source's code runs, and pickles are read as plain tensors.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from common.cli import command, make_parser
from common.errors import UserError
from common.log import log
from pretrain.adapt import check_adaptable
from pretrain.model.modeling_diffullama import diffusion_class

from . import layouts, lora
from .layouts import LAYOUTS, Layout
from .shipping import FILL_A_GAP, check_free, write_folder
from .source_folder import read_json, source_folder
from .source_tokenizer import find_mask, has_tokenizer, load_tokenizer, start_token_id
from .weights import (
    DTYPES,
    MAX_SHARD_SIZE,
    Weight,
    check_tensors,
    chosen_dtype,
    empty_model,
    matched_weights,
    split_into_files,
    stored_weights,
)
from .write_layout import write_layout

EPS = 1e-3  # the smallest time, in the trainers of DiffuLLaMA and dLLM alike


@dataclass(frozen=True)
class Checkpoint:
    """What is to be written, and the lines to print about it. No weight is read yet."""

    model: PreTrainedModel  # without storage
    weights: Mapping[str, Weight]
    tokenizer: Any
    layout: Layout
    summary: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A folder in one of the layouts: its config.json, its weights by the base architecture's names."""

    folder: Path
    config: dict[str, Any]
    layout: Layout
    weights: dict[str, Any]
    buffers: list[str]  # names left out: constants


def read_source(folder: Path, layout: str = "auto") -> Source:
    """Recognise a folder's layout. Raises UserError for one that is not known or already ours."""
    config = read_json(folder / "config.json")
    layouts.check_not_ours(config, folder)
    stored = stored_weights(folder)
    if layout == "auto":
        found = layouts.recognise(config, stored, folder)
    else:
        found = layouts.named_layout(layout, config, folder)
    if config.get("quantization_config"):
        raise UserError(f"{folder} is quantised ({config['quantization_config']}); import the model it was made from")
    buffers = sorted(name for name in stored if layouts.is_buffer(name, found))
    origin: dict[str, str] = {}  # the base's name → theirs
    for name in sorted(stored.keys() - set(buffers)):
        other = origin.setdefault(layouts.renamed(name, found.reads), name)
        if other != name:
            raise UserError(f"{folder}: {other} and {name} are the same weight twice; delete one of them")
    return Source(folder, config, found, {name: stored[theirs] for name, theirs in origin.items()}, buffers)


def base_config(source: Source) -> PretrainedConfig:
    """The base architecture's configuration, of the size that the embedding has. Raises UserError."""
    model_type = source.layout.model_types[source.config["model_type"]]
    embedding = "transformer.wte.weight" if model_type == "gpt2" else "model.embed_tokens.weight"
    if embedding not in source.weights:
        names = ", ".join(sorted(source.weights)[:3])
        raise UserError(f"{source.folder}: no tensor for {embedding}; found {names}, …")
    settings = layouts.base_settings(source.config, source.weights[embedding].shape[0])
    if source.layout.tied is not None:
        settings["tie_word_embeddings"] = source.layout.tied
    try:
        config = AutoConfig.for_model(model_type, **settings)
        empty_model(config, torch.float32, diffusion_class(type(config)))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{source.folder}/config.json describes no {model_type} model ({reason})") from None
    check_adaptable(config, seq_len=0)
    return config


def read_checkpoint(
    source: str | Path,
    layout: str = "auto",
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    mask_token_id: int | None = None,
    right_shift_logits: bool = False,
    dtype: str = "auto",
) -> Checkpoint:
    """All that an import needs to know, checked, with the weights still on disk. Raises UserError."""
    folder = source_folder(source)
    adapter = (folder / "adapter_config.json").exists()
    if adapter and base is None:
        raise UserError(f"{folder} is a LoRA adapter; name the folder of the model that it belongs to with --base")
    if base is not None and not adapter:
        raise UserError(f"--base is for a LoRA adapter, but {folder} has no adapter_config.json; leave --base out")
    read = read_source(source_folder(base) if base is not None else folder, layout)
    config = base_config(read)
    model = empty_model(config, chosen_dtype(read.weights, dtype, read.folder), diffusion_class(type(config)))
    check_tensors(read.weights, model, read.folder)
    weights, about_adapter = _merged(folder, read, model) if adapter else (read.weights, None)
    words = Path(tokenizer) if tokenizer else folder if not adapter or has_tokenizer(folder) else read.folder
    loaded = load_tokenizer(words, read.layout, config)
    rows = config.vocab_size
    mask = find_mask(read.layout, read.config, loaded, rows, mask_token_id, words)
    shift = read.layout.shift
    if shift is None:
        shift = right_shift_logits or bool(read.config.get("right_shift_logits", False))
    elif right_shift_logits:
        raise UserError(f"--right_shift_logits is for a2d; {read.layout.name} always shifts: leave it out")
    _describe(model, loaded, mask, shift, read.layout)
    summary = {
        "source": str(source),
        "layout": f"{read.layout.name} ({read.config['model_type']})",
        "adapter": about_adapter,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "vocabulary": f"{rows} rows in the embedding, {len(loaded)} tokens in the tokenizer",
        "mask": f"{mask} {loaded.mask_token!r}",
        "shift": "yes" if shift else "no",
        "dtype": f"{_stored_dtypes(read.weights)} → {str(model.dtype).removeprefix('torch.')}",
        "tensors": f"{len(read.weights)} taken, {_counted(read.buffers)}",
        "note": _note(read, mask_token_id),
    }
    return Checkpoint(model, weights, loaded, read.layout, {key: text for key, text in summary.items() if text})


def _merged(folder: Path, read: Source, model: PreTrainedModel) -> tuple[dict[str, Weight], str]:
    """The base's weights with the adapter of `folder` in them, and what it changed. Raises UserError."""
    settings = read_json(folder / "adapter_config.json")
    adapter = stored_weights(folder)
    chosen_dtype(adapter, "auto", folder)  # raises for integers
    done = lora.merge(
        read.weights,
        adapter,
        settings,
        rename=lambda name: layouts.renamed(name, read.layout.reads),
        transposed=model.config.model_type == "gpt2",
    )
    shared = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    untied = sorted(shared & {*done.updated, *done.replaced})
    if untied:
        raise UserError(
            f"{folder} changes {untied[0]}, which the base shares with its head (tied): whether the head should change "
            "too is not said; merge it with peft, and import that folder"
        )
    replaced = f", {len(done.replaced)} replaced" if done.replaced else ""
    return done.weights, f"LoRA of rank {settings['r']} merged into {len(done.updated)} weights{replaced}"


def _describe(model: PreTrainedModel, tokenizer: Any, mask: int, shift: bool, layout: Layout) -> None:
    """Give the model's configuration what an export's has, as far as it is known."""
    config: Any = model.config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is None:
            setattr(config, name, getattr(tokenizer, name))
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    config.mask_token_id = mask
    config.diffusion = {"shift": shift, "eps": EPS, "start_token_id": start_token_id(tokenizer)}
    if layout.normalize_by:
        config.diffusion["normalize_by"] = layout.normalize_by


def _stored_dtypes(weights: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}))


def _counted(buffers: list[str]) -> str:
    return f"{len(buffers)} buffers ignored ({buffers[0]}, …)" if buffers else "none ignored"


def _note(read: Source, mask_token_id: int | None) -> str | None:
    """What the files alone do not say."""
    length = ((read.config.get("task_specific_params") or {}).get("text-generation") or {}).get("max_length")
    if read.layout.name == "diffugpt" and length:
        return f"it was trained on texts of {length} tokens"
    if read.layout.name == "diffullama" and mask_token_id is None:
        return "a causal LLaMA looks the same: make sure that this one was adapted"
    if read.layout.name == "a2d" and "right_shift_logits" not in read.config:
        return "dLLM does not store right_shift_logits; give --right_shift_logits if it was trained with it"
    return None


def import_card(source: Path | str, checkpoint: Checkpoint) -> str:
    """README.md of an import: where it is from, its licence as the source's own card states it."""
    folder = source_folder(source)
    stated = {}
    if (folder / "README.md").exists():
        try:
            card = ModelCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True)
            stated = {key: value for key, value in card.data.to_dict().items() if key.startswith("license")}
        except Exception as error:  # of another's card nothing but the licence is wanted
            log.warning("%s/README.md says no licence that can be read (%s)", folder, type(error).__name__)
    front = ["library_name: transformers", "pipeline_tag: fill-mask"]
    front.append("tags: [diffusion, masked-diffusion, text-diffusion]")
    front += [f"{key}: {json.dumps(value)}" for key, value in stated.items()]
    name = str(source) if not Path(source).exists() else folder.resolve().name
    if not Path(source).exists():
        front.append(f"base_model: {source}")
    facts = {key: text.replace("|", "\\|") for key, text in checkpoint.summary.items() if key != "source"}
    table = "\n".join(f"| {key} | {text} |" for key, text in facts.items())
    licence = f"`{stated['license']}`, as the source's card states." if "license" in stated else "That of the source."
    return "\n".join(["---", *front, "---", CARD.format(name=name, table=table, use=FILL_A_GAP, licence=licence)])


CARD = """
# {name}, imported

The masked diffusion language model {name}, trained by others; the same weights under the names of its base
architecture. Nothing was trained.

| | |
| --- | --- |
{table}

{use}
## Licence

{licence}
"""


def print_summary(summary: Mapping[str, str]) -> None:
    """One line each, aligned."""
    for key, text in summary.items():
        print(f"{key:<12}{text}")


def import_checkpoint(
    source: str | Path, out_dir: str | Path, max_shard_size: str = MAX_SHARD_SIZE, dry_run: bool = False, **settings
) -> dict[str, str]:
    """Write our folder of a checkpoint of others, or with `dry_run` only look; returns the lines to print.

    `settings` are those of `read_checkpoint`. Raises UserError before anything is written.
    """
    out_dir = Path(out_dir)
    check_free(out_dir)
    found = read_checkpoint(source, **settings)
    weights = matched_weights(found.weights, found.model)
    files = split_into_files(weights, found.model.dtype, max_shard_size)
    if not dry_run:
        write_folder(out_dir, found.model, weights, found.tokenizer, import_card(source, found), max_shard_size)
    return {**found.summary, "files": ", ".join(files.filename_to_tensors)}


@command
def main(argv: list[str] | None = None) -> int:
    """Import, or write back; returns the exit code."""
    parser = make_parser("python -m tools.import_checkpoint", __doc__)
    parser.add_argument("source", help="a folder, or a name on the Hub; with --to, a folder of ours")
    parser.add_argument("out", type=Path, help="the folder to write; must be empty or not exist")
    parser.add_argument("--layout", choices=["auto", *LAYOUTS], default="auto", help="of SOURCE; default: %(default)s")
    parser.add_argument("--base", help="SOURCE is a LoRA adapter: the model to merge it into")
    parser.add_argument("--tokenizer", help="a folder with the tokenizer, where SOURCE has none")
    parser.add_argument("--mask_token_id", type=int, metavar="N", help="the mask, where SOURCE does not say it")
    parser.add_argument("--right_shift_logits", action="store_true", help="an a2d model that was trained with it")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as stored, fp16 as fp32")
    parser.add_argument(
        "--max_shard_size", default=MAX_SHARD_SIZE, metavar="SIZE", help="of a weights file; default: %(default)s"
    )
    parser.add_argument("--to", choices=list(LAYOUTS), help="write SOURCE, a folder of ours, in this layout")
    parser.add_argument("--dry_run", action="store_true", help="print what would be written, and write nothing")
    args = vars(parser.parse_args(argv))
    source, out, to, dry_run = (args.pop(name) for name in ("source", "out", "to", "dry_run"))
    if to is None:
        summary = import_checkpoint(source, out, dry_run=dry_run, **args)
    else:
        for name in ("base", "tokenizer", "mask_token_id", "right_shift_logits"):
            if args[name]:
                raise UserError(f"--{name} is for an import; leave it out with --to")
        check_free(out)
        summary = write_layout(source_folder(source), out, LAYOUTS[to], args["dtype"], args["max_shard_size"], dry_run)
    print_summary(summary)
    print(f"{out} would be written" if dry_run else f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
