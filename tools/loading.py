"""Which kind of model a checkpoint is, its weights, and what tells them from others. Not a verb."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from common.files import sha256_of
from common.log import log

from .decoding import load, why

DECISIVE = (
    ".safetensors",
    ".json",
    ".model",
    ".py",
    ".txt",
    ".jinja",
)  # files that a model or its tokenizer is made of


def read_config(checkpoint: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint, by folder or name on the Hub. Raises UserError where there is none."""
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint} cannot be loaded: {why(error)}") from None


def kind_of(checkpoint: str, trust_remote_code: bool = False) -> str:
    """ "masked_diffusion" where the configuration names a mask token, else "autoregressive". Raises UserError."""
    config = read_config(checkpoint, trust_remote_code)
    if getattr(config, "mask_token_id", None) is None:
        return "autoregressive"
    if not getattr(config, "diffusion", None):
        log.warning("%s names a mask token, but no diffusion: is it really a masked diffusion model?", checkpoint)
    return "masked_diffusion"


def load_any(
    checkpoint: str,
    kind: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of either kind, in eval mode. Raises UserError where it cannot be loaded.

    `dtype` None: as the checkpoint has it; `device` None: a GPU where there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "masked_diffusion":
        model, tokenizer = load(checkpoint, trust_remote_code, "cpu")
        return model.to(device=device, dtype=dtype), tokenizer
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype or "auto", trust_remote_code=trust_remote_code, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{checkpoint} cannot be loaded: {why(error)}") from None
    return model.eval().to(device), tokenizer


def fingerprint(checkpoint: str) -> str:
    """What tells a model and its tokenizer from others: a hash of a folder's files, or the Hub's commit."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(getattr(read_config(checkpoint), "_commit_hash", None))
    files = sorted(path for path in folder.iterdir() if path.suffix in DECISIVE)
    found = hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode())
    return found.hexdigest()[:16]
