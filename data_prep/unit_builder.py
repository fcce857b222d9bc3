"""The documents of one unit into the rows of its two splits: tokenize, pack, write shards, count.

In: documents. Out: shard files, whose entries `SplitWriter.finish` returns (writing.py), and the counts in
`UnitBuilder.counts`.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import compress
from pathlib import Path
from re import Pattern
from typing import Any

import numpy as np

from common.errors import UserError

from . import cutting, engines, shards, tokenizing
from .config import PrepareConfig
from .engines import Engine
from .inputs.document import Document, LongText, TokenizedText, digest, text_of
from .packing import padding_id
from .tokenizing import SpecialTokens, TokenizerSpec
from .work_list import Unit
from .writing import RowSettings, SplitWriter

BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once
CHECK_ONE_IN = 512  # one document in so many is compared with the reference tokenizer
LONG_CHARACTERS = 1 << 22  # longer documents are tokenized in parts of BATCH_CHARACTERS
PARTS_A_DOCUMENT = 16  # a part is at most that share of max_document_mb: tokenizing takes some 50 bytes a character
NO_CUT = "no place to cut it"  # why a long document is bad


class EngineMismatch(Exception):
    """The fast engine gave other ids than the reference on a document of the run."""


@lru_cache(maxsize=2)
def engine_of(name: str, tokenizer: TokenizerSpec, parallel: bool = True) -> Engine:
    if name == engines.Gigatoken.name:
        return engines.Gigatoken(tokenizer, parallel)
    return tokenizing.Reference(tokenizer)


@lru_cache(maxsize=1)
def _cut_pattern(tokenizer: TokenizerSpec) -> Pattern | None:
    return cutting.find_cut_pattern(tokenizer)


def hash_of(document: Document) -> int:
    """64 bits of a document's hash: they decide its split, and whether its ids are checked."""
    return int.from_bytes(digest(document)[:8], "big")


def is_validation(document: Document, fraction: float) -> bool:
    """Held out by a hash of the text, so that the same document is in the same split of any corpus."""
    return hash_of(document) < fraction * 2**64


def batches(found: Iterator[Document]) -> Iterator[list[Any] | Document]:
    """Lists of documents that have about BATCH_CHARACTERS together; a long text comes alone."""
    batch: list[Any] = []
    size = 0
    for document in found:
        is_long = isinstance(document, str) and len(document) > LONG_CHARACTERS
        alone = isinstance(document, LongText) or is_long
        if not alone:
            batch.append(document)
            size += len(document)
        if batch and (alone or size >= BATCH_CHARACTERS):
            yield batch
            batch = []
            size = 0
        if alone:
            yield document
    if batch:
        yield batch


class UnitBuilder:
    """Turns the documents of one unit into the rows of its two splits, and counts them.

    A document that does not fit `max_tokens` (0: no limit) is left out with all that follow: then `is_full` is true.
    """

    def __init__(
        self, unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec, engine: Engine, max_tokens: int = 0
    ):
        self.max_tokens = max_tokens
        self.is_full = False
        self.taken = 0  # documents before the one that did not fit
        self.engine = engine
        self.source = unit.source
        self.tokenizer = tokenizer
        self.reference = engine_of(tokenizing.Reference.name, tokenizer)
        self.must_check = not isinstance(engine, tokenizing.Reference)
        self.validation_fraction = config.validation_fraction
        self.bos: list[Any] = [tokenizer.special_ids["bos"]] * config.add_bos
        self.eos: list[Any] = [tokenizer.separator] * config.add_eos
        self.special = SpecialTokens(tokenizer)
        self.special_tokens: Counter = Counter()  # documents whose text has one, by token
        self.longest_part = (config.max_document_mb << 20) // PARTS_A_DOCUMENT
        rows = RowSettings(
            config.packing, config.seq_len, shards.dtype_for(tokenizer.size), padding_id(tokenizer.special_ids),
            tokenizer.fingerprint, config.shard_mb,
        )  # fmt: skip
        directory = Path(config.output_dir)
        self.splits = {name: SplitWriter(directory, unit.source, unit.index, name, rows) for name in shards.SPLITS}
        self.counts: Counter = Counter()

    def add_batch(self, texts: list[str]) -> None:
        ids, lengths = self._encode(texts)
        hashes = np.array([hash_of(text) for text in texts], dtype=np.uint64)
        if self.must_check:
            self._check(texts, ids, lengths, hashes)
        texts = list(compress(texts, self._pack(ids, lengths, hashes)))
        for text in texts:
            self._note_special(self.special.in_text(text), text)
        self._count(len(texts), sum(map(len, texts)), sum(map(_utf8_size, texts)))

    def add_tokens(self, documents: list[TokenizedText]) -> None:
        """Add documents whose ids are known. Special tokens in them stay what they are, and are counted."""
        ids = np.concatenate([document.ids for document in documents])
        lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
        hashes = np.array([hash_of(document) for document in documents], dtype=np.uint64)
        texts = [document.text for document in compress(documents, self._pack(ids, lengths, hashes))]
        for text in texts:
            self.special_tokens.update(self.special.in_text(text))
        self._count(len(texts), sum(map(len, texts)), sum(map(_utf8_size, texts)))

    def _pack(self, ids: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """Add documents, their ids end to end, to the rows of their splits.

        Returns (documents,) bool: those that have tokens. Without those that max_tokens leaves out at the end.
        """
        ids, lengths = _add_bos_and_eos(ids, lengths, self.bos, self.eos)
        if self.max_tokens:
            count = self._that_fit(lengths)
            hashes, lengths = hashes[:count], lengths[:count]
            ids = ids[: lengths.sum()]
        self.taken += len(lengths)
        self.counts["no tokens"] += int((lengths == 0).sum())
        if self.validation_fraction:
            held_out = hashes < self.validation_fraction * 2**64
        else:
            held_out = np.zeros(len(hashes), dtype=bool)
        in_validation = np.repeat(held_out, lengths)  # of each token
        self.splits["train"].add(ids[~in_validation], lengths[~held_out & (lengths > 0)])
        if held_out.any():
            self.splits["validation"].add(ids[in_validation], lengths[held_out & (lengths > 0)])
        self.counts["tokens"] += len(ids)
        return lengths > 0

    def add_long(self, document: Document) -> None:
        """Add one text in parts, so that neither its text nor its ids are in memory as a whole."""
        split = self.splits["validation" if is_validation(document, self.validation_fraction) else "train"]

        def blocks() -> Iterator[str]:
            return document.blocks() if isinstance(document, LongText) else _slices(text_of(document))

        def parts() -> Iterator[np.ndarray]:
            return self._encode_parts(blocks())

        if cutting.has_longer_part(blocks(), _cut_pattern(self.tokenizer), self.longest_part):
            self.counts[NO_CUT] += 1
            self.taken += 1
            return
        if self.max_tokens and not self._that_fit(np.array([sum(map(len, parts()))])):
            return
        self.taken += 1
        tokens = split.add_long(parts())
        if not tokens:
            self.counts["no tokens"] += 1
            return
        self._note_special(set().union(*map(self.special.in_text, blocks())), "a long document")
        self.counts["tokens"] += tokens
        size = document.utf8_bytes if isinstance(document, LongText) else _utf8_size(text_of(document))
        self._count(1, len(document), size)

    def _encode_parts(self, blocks: Iterator[str]) -> Iterator[np.ndarray]:
        """The ids of one document, BOS and EOS included, a part at a time; nothing for a document without tokens."""
        has_tokens = False
        for part in cutting.cut_text(blocks, _cut_pattern(self.tokenizer), BATCH_CHARACTERS):
            ids, lengths = self._encode([part])
            if self.must_check:
                self._check([part], ids, lengths, np.array([hash_of(part)], dtype=np.uint64))
            if len(ids) and not has_tokens:
                has_tokens = True
                yield np.array(self.bos, dtype=np.int64)
            yield ids.astype(np.int64)
        if has_tokens:
            yield np.array(self.eos, dtype=np.int64)

    def _encode(self, texts: list[str]) -> tokenizing.Encoded:
        """Their ids. Raises EngineMismatch where the fast engine fails, ValueError for an id outside the vocabulary."""
        try:
            ids, lengths = self.engine.encode(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of its Rust code is no Exception
            if not self.must_check:
                raise
            raise EngineMismatch(f"it fails: {error or type(error).__name__}") from error
        if len(ids) and int(ids.max()) >= self.tokenizer.size:
            raise ValueError(
                f"{self.engine.name} gave the id {ids.max()}, but the largest is {self.tokenizer.size - 1}"
            )
        return ids, lengths

    def _note_special(self, found: set[str], text: str) -> None:
        """Count the special tokens in a document's text. Raises UserError where there may be none."""
        if found and self.tokenizer.special_in_text == "error":
            raise UserError(
                f"source {self.source}: {sorted(found)[0]!r} is a special token, and stands in the text of a document "
                f"that begins {text[:60]!r}; with special_tokens_in_text=text it is tokenized as text"
            )
        self.special_tokens.update(found)

    def _that_fit(self, lengths: np.ndarray) -> int:
        """How many of the next documents, which have so many tokens, max_tokens leaves room for."""
        ends = self.counts["tokens"] + np.cumsum(lengths)
        count = int(np.searchsorted(ends, self.max_tokens, side="right"))
        self.is_full = count < len(lengths)
        return count

    def _count(self, documents: int, characters: int, size: int) -> None:
        self.counts.update(documents=documents, characters=characters, bytes=size)

    def _check(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> None:
        """Compare a sample of the batch, chosen by hash, with the reference. Raises EngineMismatch."""
        ends = np.cumsum(lengths)
        for i in np.flatnonzero(hashes % CHECK_ONE_IN == 0):
            expected, _ = self.reference.encode([texts[i]])
            if not np.array_equal(ids[ends[i] - lengths[i] : ends[i]], expected):
                raise EngineMismatch(
                    f"its ids differ from those of tokenizers on a document that begins {texts[i][:60]!r}"
                )


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + BATCH_CHARACTERS] for start in range(0, len(text), BATCH_CHARACTERS))


def _add_bos_and_eos(ids: np.ndarray, lengths: np.ndarray, bos: list[int], eos: list[int]) -> tokenizing.Encoded:
    """Put `bos` and `eos`, each of one token or none, around each document that has tokens."""
    has_tokens = lengths > 0
    new_lengths = lengths + (len(bos) + len(eos)) * has_tokens
    if not bos + eos or len(lengths) == 0:
        return ids.astype(np.int64), lengths
    out = np.empty(int(new_lengths.sum()), dtype=np.int64)
    ends = np.cumsum(new_lengths)
    is_text = np.ones(len(out), dtype=bool)
    if bos:
        first = (ends - new_lengths)[has_tokens]
        out[first] = bos[0]
        is_text[first] = False
    if eos:
        last = ends[has_tokens] - 1
        out[last] = eos[0]
        is_text[last] = False
    out[is_text] = ids
    return out, new_lengths
