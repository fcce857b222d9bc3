"""A folder of ours in one of the layouts of others, for their code to load. Not a verb; see tools.import_checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from common.errors import UserError
from common.files import atomic_folder
from pretrain.model.modeling_diffullama import diffusion_class

from . import layouts
from .layouts import LAYOUTS, Layout
from .source_folder import read_json
from .source_tokenizer import load_tokenizer, save_for_transformers_4
from .weights import (
    check_tensors,
    chosen_dtype,
    empty_model,
    matched_weights,
    save_weights,
    split_into_files,
    stored_weights,
)


def write_layout(
    folder: Path, out_dir: Path, layout: Layout, dtype: str, max_shard_size: str, dry_run: bool
) -> dict[str, str]:
    """Write a folder of ours in `layout`, or with `dry_run` only look; returns the lines to print.

    Raises UserError where the layout cannot hold the model: another architecture, shift or mask.
    """
    ours = read_json(folder / "config.json")
    check_writable(ours, layout, folder)
    config = AutoConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, layout, config)
    check_mask(ours, tokenizer, layout, folder)
    stored = stored_weights(folder)
    model = empty_model(config, chosen_dtype(stored, dtype, folder), diffusion_class(type(config)))
    check_tensors(stored, model, folder)
    named = {layouts.renamed(name, layout.writes): weight for name, weight in matched_weights(stored, model).items()}
    files = split_into_files(named, model.dtype, "1000TB" if layout.one_file else max_shard_size)
    spelled = str(model.dtype).removeprefix("torch.")
    if not dry_run:
        with atomic_folder(out_dir) as target:
            save_weights(named, files, model.dtype, target)
            described = {
                "config.json": layouts.their_config(layout, ours, spelled),
                "generation_config.json": layouts.their_generation_config(layout, ours),
            }
            for name, content in described.items():
                if content is not None:
                    (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            save_for_transformers_4(tokenizer, target)
    return {
        "layout": layout.name,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "mask": f"{ours['mask_token_id']}",
        "dtype": spelled,
        "files": ", ".join(files.filename_to_tensors),
    }


def check_writable(ours: Mapping[str, Any], layout: Layout, folder: Path) -> None:
    """Raise UserError where the code that loads `layout` would not compute what this model of ours does."""
    if not layouts.is_ours(ours):
        raise UserError(f"{folder} is not in this project's layout; --to writes from what `tools.export` or this wrote")
    if ours["model_type"] not in layout.classes:
        fitting = [other.name for other in LAYOUTS.values() if ours["model_type"] in other.classes]
        raise UserError(
            f"{folder} is a {ours['model_type']}; {layout.name} takes {', '.join(layout.classes)}. "
            f"This one fits {', '.join(fitting) or 'none of the layouts'}"
        )
    if layout.shift and not layouts.our_shift(ours):
        raise UserError(f"{folder} was trained with diffusion.shift=false, but {layout.name}'s code always shifts")
    if layout.tied and not ours.get("tie_word_embeddings", True):
        raise UserError(f"{folder} has a head of its own, but {layout.name} shares it with the embedding (tied)")


def check_mask(ours: Mapping[str, Any], tokenizer: Any, layout: Layout, folder: Path) -> None:
    """Raise UserError where the code that loads `layout` would take another token for the mask."""
    mask = ours["mask_token_id"]
    if tokenizer.mask_token_id != mask:
        raise UserError(
            f"{folder} has mask_token_id {tokenizer.mask_token_id} in its tokenizer, but {mask} in config.json; "
            "export it again"
        )
    if layout.adds_mask and tokenizer.mask_token != layout.adds_mask:
        raise UserError(
            f"{folder} has the mask token {tokenizer.mask_token!r}, but {layout.name}'s code takes {layout.adds_mask!r}"
        )
    published = layout.masks.get(ours["vocab_size"], mask)
    if published != mask and not layout.mask_in_config:
        raise UserError(
            f"{folder} has mask {mask}, but {layout.name}'s code takes {published} of {ours['vocab_size']} tokens"
        )
