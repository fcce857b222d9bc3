"""Which kind of model a checkpoint is, its weights, and what tells them from others."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from common.log import log

from ..decoding import load

DECISIVE = (
    ".safetensors",
    ".json",
    ".model",
    ".py",
    ".txt",
    ".jinja",
)  # files that a model or its tokenizer is made of
SAMPLE = 1 << 20  # bytes at both ends of a file that tell it from others


def kind_of(checkpoint: str, trust_remote_code: bool = False) -> str:
    """ "masked_diffusion" where the configuration names a mask token, else "autoregressive"."""
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{checkpoint} cannot be loaded: {reason}") from None
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{checkpoint} cannot be loaded: {reason}") from None
    return model.eval().to(device), tokenizer


def fingerprint(checkpoint: str, model: Any) -> str:
    """What tells weights from others: of a folder, its files' sizes and both their ends; else the Hub's commit."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(getattr(model.config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in DECISIVE):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size}\n".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()[:16]
