"""Token ids that others made, as documents: checked against the tokenizer, and turned back into their texts.

In: the ids of a record. Out: a TokenizedText, so that what is made of it is what its text would have given.
"""

import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tokenizers

from common.errors import UserError

from . import tokenizing
from .inputs.document import TokenizedText
from .tokenizing import TokenizerSpec


@dataclass(frozen=True)
class Decoder:
    """What turns ids into documents: a tokenizer, and the ids that begin and end a document."""

    tokenizer: TokenizerSpec
    bos: int | None
    ends: frozenset[int]  # EOS, and the separator

    def document(self, ids: np.ndarray, where: str, max_bytes: int) -> TokenizedText | None:
        """The document of a record's ids, without BOS and EOS at its ends; None if it exceeds `max_bytes`.

        Raises UserError, which says `where` it is, for an id that is outside the vocabulary.
        """
        outside = np.flatnonzero((ids < 0) | (ids >= self.tokenizer.size))
        if len(outside):
            raise UserError(
                f"{where}: token {outside[0]:,} has the id {ids[outside[0]]}, but {self.tokenizer.name!r} has ids from "
                f"0 to {self.tokenizer.size - 1}; was it made with another tokenizer?"
            )
        if len(ids) and self.bos is not None and ids[0] == self.bos:
            ids = ids[1:]
        if len(ids) and int(ids[-1]) in self.ends:
            ids = ids[:-1]
        if len(ids) > max_bytes:
            return None
        text = text_decoder(self.tokenizer)(ids.tolist())
        return TokenizedText(ids, text) if len(text.encode("utf-8", "replace")) <= max_bytes else None


class _ByteLevel:
    """The text of a byte-level BPE's ids: every id stands for some bytes."""

    def __init__(self, state: dict):
        byte_of = {character: byte for byte, character in tokenizing.byte_characters().items()}
        added = {token["id"]: token["content"].encode() for token in state["added_tokens"]}
        vocabulary = {i: token for token, i in state["model"]["vocab"].items()}
        self._pieces = [b""] * (1 + max([*added, *vocabulary]))
        for i, token in vocabulary.items():
            known = all(character in byte_of for character in token)
            self._pieces[i] = bytes(byte_of[c] for c in token) if known else token.encode()
        for i, content in added.items():
            self._pieces[i] = content

    def __call__(self, ids: list[int]) -> str:
        return b"".join(map(self._pieces.__getitem__, ids)).decode("utf-8", "replace")


class _Decoding:
    """The text of any other tokenizer's ids, by the tokenizer itself."""

    def __init__(self, spec: TokenizerSpec):
        self._fast = tokenizers.Tokenizer.from_str(spec.state) if spec.state else None
        self._slow = None if spec.state else tokenizing.load_tokenizer(spec.name, spec.revision)

    def __call__(self, ids: list[int]) -> str:
        if self._fast is not None:
            return self._fast.decode(ids, skip_special_tokens=False)
        return str(self._slow.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))  # type: ignore[union-attr]


@lru_cache(maxsize=2)
def text_decoder(spec: TokenizerSpec) -> _ByteLevel | _Decoding:
    """ids → text, the inverse of the tokenizer wherever it has one."""
    state = json.loads(spec.state) if spec.state else {}
    is_byte_level = (state.get("decoder") or {}).get("type") == "ByteLevel" and state["model"]["type"] == "BPE"
    return _ByteLevel(state) if is_byte_level else _Decoding(spec)
