"""A folder as it ships: weights under the base architecture's names, configuration, tokenizer, code, card. Not a verb.

Written by `tools.export` from a run and by `tools.import_checkpoint` from a checkpoint of others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from common.errors import UserError
from common.files import atomic_folder
from pretrain.model.modeling_diffullama import DiffusionModel

from .weights import MAX_SHARD_SIZE, Weight, matched_weights, save_weights, split_into_files

DECODING = {"order": "left_to_right", "temperature": 1.0}  # one token a step is exact; see docs/decoding.md

# of a model card: how to ask a diffusion model
FILL_A_GAP = """```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModel.from_pretrained(path, trust_remote_code=True)
text = "Once upon a time there was a" + tokenizer.mask_token * 6 + " who lived in a castle."
ids = tokenizer(text, return_tensors="pt").input_ids
print(tokenizer.decode(model.diffusion_generate(ids, temperature=0)[0]))
```
"""


def check_free(out_dir: Path) -> None:
    """Raise UserError for a folder that holds something."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} is not empty; choose another folder or delete it")


def write_folder(
    out_dir: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Weight],
    tokenizer: Any,
    card: str,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write what `model`, which needs no storage, is with these weights: whole, or not at all.

    One weights file at a time is in memory.
    Raises UserError for an `out_dir` that is not empty and for weights that do not fit the model.
    """
    check_free(out_dir)
    weights = matched_weights(weights, model)
    files = split_into_files(weights, model.dtype, max_shard_size)
    with atomic_folder(out_dir) as folder:
        save_weights(weights, files, model.dtype, folder)
        describe_for_transformers(folder, model, tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")


def describe_for_transformers(
    folder: Path, model: PreTrainedModel, tokenizer: Any, generation: GenerationConfig | None = None
) -> None:
    """Write configuration and tokenizer, and of a diffusion model its code and its decoding defaults.

    `generation`: the decoding defaults of an autoregressive model.
    """
    if isinstance(model, DiffusionModel):
        model.describe_code()
        model.save_code(folder)
        generation = generation_defaults(model.config, tokenizer)
    if generation is not None:
        generation.save_pretrained(folder)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def generation_defaults(config: Any, tokenizer: Any) -> GenerationConfig:
    """generation_config.json: what `diffusion_generate` does unless it is told otherwise."""
    special = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")}
    return GenerationConfig(do_sample=True, **DECODING, **special, pad_token_id=tokenizer.pad_token_id)
