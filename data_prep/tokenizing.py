"""Texts to token ids, exactly as `tokenizer.encode` gives them, and the fingerprint that names a tokenizer.

In: a folder or Hub name, texts. Out: one array of ids a text. The same fingerprint stands in the
manifest and is computed again by the trainer, so that shards are never read with another vocabulary.
"""

import hashlib
import json

import numpy as np

from .config import UserError


def load_tokenizer(name: str, revision: str = "main"):
    """AutoTokenizer, with an error that says what to do. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises many kinds; all mean that there is no tokenizer
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no tokenizer could be loaded from {name!r}: {reason}") from error


def fingerprint(tokenizer) -> str:
    """sha256 of what decides a document's ids: vocabulary, merges, normaliser, pre-tokeniser, added tokens.

    Padding and truncation settings do not enter, nor does an added mask token: a diffusion model's
    tokenizer reads documents as its base's does.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != tokenizer.mask_token]
    else:
        state = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def encode_batch(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text, equal to `tokenizer.encode(text, add_special_tokens=False)`; int64 arrays."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
    return [np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64) for text in texts]


def special_ids(tokenizer) -> dict[str, int | None]:
    """The ids that the manifest records."""
    return {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
