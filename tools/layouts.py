"""How others lay out the diffusion models that they adapted: names, masks, shift. Not a verb.

Everything here is read off the code that writes and loads these folders:

    diffugpt     HKUNLP/DiffuLLaMA, model.py: GPT-2 without its wrapper, as `embed_tokens` and `denoise_model`
    diffullama   HKUNLP/DiffuLLaMA, inf_diffullama.py: a plain LLaMA; their fine-tuning wraps it as `denoise_model`
    dream        HKUNLP/Dream, modeling_dream.py: Qwen2's names
    a2d          ZHZisZZ/dllm, pipelines/a2d: the base's names under a model_type of their own
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

Renames = tuple[tuple[str, str], ...]  # beginnings of names, from and to; the first that fits counts


@dataclass(frozen=True)
class Layout:
    """One layout. Model types map theirs to transformers', classes map transformers' model types to theirs."""

    name: str
    model_types: Mapping[str, str]
    classes: Mapping[str, str]
    shift: bool | None  # None: `right_shift_logits` of its config.json says it, no by default
    normalize_by: str | None  # of its training loss, as diffusion.normalize_by; None: not published
    masks: Mapping[int, int]  # of published checkpoints: rows of the embedding → mask
    reads: Renames = ()  # their names → the base architecture's
    writes: Renames = ()  # and back
    buffers: str = r"(.*\.)?rotary_emb\.inv_freq"  # names that hold no weights: constants that each model makes anew
    tied: bool | None = None  # None: tie_word_embeddings of its config.json says it
    adds_mask: str | None = None  # the mask token that its loader gives a tokenizer, whatever it had
    one_file: bool = False  # its loader reads model.safetensors alone
    mask_in_config: bool = False


LAYOUTS = {
    "diffugpt": Layout(
        name="diffugpt",
        model_types={"gpt2": "gpt2"},
        classes={"gpt2": "GPT2LMHeadModel"},
        shift=True,
        normalize_by="masked",
        masks={50257: 10541, 50258: 50257},  # diffugpt-s, diffugpt-m
        reads=(("embed_tokens.", "transformer.wte."), ("denoise_model.", "transformer.")),
        writes=(("transformer.wte.", "embed_tokens."), ("transformer.", "denoise_model.")),
        buffers=r"denoise_model\.h\.\d+\.attn\.(bias|masked_bias)",
        tied=True,
        one_file=True,
    ),
    "diffullama": Layout(
        name="diffullama",
        model_types={"llama": "llama"},
        classes={"llama": "LlamaForCausalLM"},
        shift=True,
        normalize_by="masked",
        masks={32000: 811},
        reads=(("embed_tokens.", "model.embed_tokens."), ("denoise_model.", "model.")),
    ),
    "dream": Layout(
        name="dream",
        model_types={"Dream": "qwen2"},
        classes={"qwen2": "DreamModel"},
        shift=True,
        normalize_by=None,
        masks={151936: 151666, 152064: 151666},
        mask_in_config=True,
    ),
    "a2d": Layout(
        name="a2d",
        model_types={"a2d-llama": "llama", "a2d-qwen2": "qwen2", "a2d-qwen3": "qwen3"},
        classes={
            "llama": "A2DLlamaLMHeadModel",
            "qwen2": "A2DQwen2LMHeadModel",
            "qwen3": "A2DQwen3LMHeadModel",
        },
        shift=None,
        normalize_by="maskable",
        masks={},
        adds_mask="<|mask|>",
    ),
}

EXPECTED = (
    "diffugpt (model_type gpt2, tensors denoise_model.*), diffullama (model_type llama with a vocabulary of 32000, or "
    "tensors denoise_model.*), dream (model_type Dream), a2d (model_type a2d-llama, a2d-qwen2 or a2d-qwen3)"
)


def recognise(config: Mapping[str, Any], names: Iterable[str], where: Path) -> Layout:
    """The layout of a config.json and its tensors' names. Raises UserError for one that is not known."""
    names = list(names)
    check_not_ours(config, where)
    model_type = config.get("model_type")
    wrapped = any(name.startswith("denoise_model.") for name in names)
    for layout in LAYOUTS.values():
        if model_type in layout.model_types and (wrapped or model_type not in ("gpt2", "llama")):
            return layout
    if model_type == "llama" and config.get("vocab_size") in LAYOUTS["diffullama"].masks:
        return LAYOUTS["diffullama"]
    raise UserError(
        f"{where}: this layout is not known: model_type {model_type!r}, {len(names)} tensors: "
        f"{', '.join(sorted(names)[:3])}, …; expected {EXPECTED}. Where you know which, name it with --layout"
    )


def named_layout(name: str, config: Mapping[str, Any], where: Path) -> Layout:
    """The layout that the user names. Raises UserError where config.json is of another architecture."""
    check_not_ours(config, where)
    layout = LAYOUTS[name]
    if config.get("model_type") not in layout.model_types:
        raise UserError(
            f"{where}/config.json has model_type {config.get('model_type')!r}; "
            f"--layout {name} expects {' or '.join(layout.model_types)}"
        )
    return layout


def check_not_ours(config: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for a folder that `tools.export` or an earlier import wrote."""
    if is_ours(config):
        raise UserError(
            f"{where} is already in this project's layout: nothing to import. Train from it with model.base={where}, "
            "or write one of the other layouts with --to"
        )


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a masked diffusion model of this project."""
    code = (config.get("auto_map") or {}).get("AutoModelForMaskedLM", "")
    described = isinstance(config.get("diffusion"), Mapping) or code.startswith("modeling_diffullama.")
    return described and config.get("mask_token_id") is not None


def our_shift(config: Mapping[str, Any]) -> bool:
    """Whether a model of this project has the shift, by its config.json."""
    return (config.get("diffusion") or {}).get("shift", True)


def renamed(name: str, renames: Renames) -> str:
    """`name` with the first of these beginnings replaced."""
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def is_buffer(name: str, layout: Layout) -> bool:
    """Whether a tensor of this name is a constant, such as GPT-2's causal mask, and no weight."""
    return re.fullmatch(layout.buffers, name) is not None


# What belongs to the folder that it was in, or has another place in ours.
NOT_COPIED = (
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "mask_token_id", "right_shift_logits", "diffusion",
)  # fmt: skip


def base_settings(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The settings of the base architecture's configuration, of an embedding with so many rows."""
    settings = {key: value for key, value in config.items() if key not in NOT_COPIED}
    return {**settings, "vocab_size": rows, "use_cache": False}


def their_config(layout: Layout, config: Mapping[str, Any], torch_dtype: str) -> dict[str, Any]:
    """config.json in `layout` of our `config`, in the spelling of transformers 4, which their code was written for."""
    theirs = {key: value for key, value in config.items() if key not in NOT_COPIED}
    rope = theirs.pop("rope_parameters", None)
    if rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        theirs["rope_theta"] = rope["rope_theta"]
        theirs["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    model_type = next(key for key, value in layout.model_types.items() if value == config["model_type"])
    theirs |= {"model_type": model_type, "torch_dtype": torch_dtype}
    theirs["architectures"] = [layout.classes[config["model_type"]]]
    if layout.mask_in_config:
        theirs["mask_token_id"] = config["mask_token_id"]
    if layout.shift is None:
        theirs["right_shift_logits"] = our_shift(config)
    if layout.name == "diffugpt":  # the length that inf_diffugpt.py generates
        theirs.setdefault("task_specific_params", {"text-generation": {"max_length": config["n_positions"]}})
    if layout.name == "dream":
        theirs.pop("layer_types", None)
        repository = "Dream-org/Dream-v0-Base-7B"  # which has the code; it is not copied
        theirs["auto_map"] = {
            "AutoConfig": f"{repository}--configuration_dream.DreamConfig",
            "AutoModel": f"{repository}--modeling_dream.DreamModel",
        }
    return theirs


def their_generation_config(layout: Layout, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """generation_config.json in `layout` of our `config`; None where the code that loads it needs none."""
    if layout.name != "dream":  # whose from_pretrained fails without
        return None
    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")}
    return {"_from_model_config": True, **special}
