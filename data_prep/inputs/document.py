"""What a document is, and the count of what was left out."""

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .files import open_decompressed

BLOCK_BYTES = 1 << 22  # of a long text file that are in memory at once
TOO_LONG = "longer than max_document_mb"  # why a document is bad


@dataclass(frozen=True)
class LongText:
    """A document too long to hold: its length and hash are known, its text is read again in blocks."""

    path: str
    characters: int
    utf8_bytes: int
    digest: bytes  # as `digest` gives it

    def __len__(self) -> int:
        return self.characters

    def blocks(self) -> Iterator[str]:
        """Its text, a few MB at a time."""
        decode = codecs.getincrementaldecoder("utf-8-sig")().decode  # without a byte order mark
        with open_decompressed(self.path) as file:
            while content := file.read(BLOCK_BYTES):
                yield decode(content)


@dataclass(frozen=True)
class TokenizedText:
    """A document whose ids are known; its text decides its split and is what is counted."""

    ids: np.ndarray  # (tokens,) int64, without BOS and EOS
    text: str

    def __len__(self) -> int:
        return len(self.text)


Document = str | LongText | TokenizedText


def text_of(document: Document) -> str:
    """The document's text, of a long one the beginning."""
    if isinstance(document, str):
        return document
    return document.text if isinstance(document, TokenizedText) else next(document.blocks())


def digest(document: Document) -> bytes:
    """16 bytes that stand for a document's text: they decide its split and find its duplicates."""
    if isinstance(document, LongText):
        return document.digest
    if isinstance(document, TokenizedText):
        return digest(document.text)
    return hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass
class Tally:
    """What was left out of a unit, by reason."""

    bad: Counter = field(default_factory=Counter)  # unusable documents; config.max_bad_fraction limits these
    filtered: Counter = field(default_factory=Counter)  # documents that are empty, or that the source does not want
    damaged: list[str] = field(default_factory=list)  # "path: reason" of files damaged or cut off; max_damaged_files


Found = Iterator[tuple[Any, dict]]  # what should be the text, and the record that filters look at
