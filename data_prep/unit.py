"""One unit of work: read → tokenise → pack → shards, then a record of what was made.

Runs in a worker process; what it writes depends on the unit and the settings alone.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_atomically

from . import deduplication, documents, shards, tokenizing
from .config import PrepareConfig
from .packing import PACKERS

BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once
CHECKED = 512  # one document in so many is compared with the reference tokenizer
LONG_CHARACTERS = 1 << 22  # longer documents are tokenised in parts of BATCH_CHARACTERS
ENOUGH = 1000  # documents of a unit from which on max_bad_fraction is applied to it


class EngineMismatch(Exception):
    """The fast engine gave other ids than the reference on a document of the run."""


@lru_cache(maxsize=2)
def _engine(name: str, recipe: tokenizing.Recipe, parallel: bool = True):
    return tokenizing.Gigatoken(recipe, parallel) if name == "gigatoken" else tokenizing.Reference(recipe)


def record_path(directory: Path, unit: documents.Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.json"


def position(document: documents.Document) -> int:
    """64 bits of a document's hash: they decide its split, and whether it is checked."""
    return int.from_bytes(documents.digest(document)[:8], "big")


def is_validation(document: documents.Document, fraction: float) -> bool:
    """Held out by a hash of the text: the same document goes the same way in any corpus."""
    return position(document) < fraction * 2**64


@lru_cache(maxsize=1)
def _cut(recipe: tokenizing.Recipe):
    return tokenizing.find_cut(recipe)


def process(
    unit: documents.Unit, config: PrepareConfig, recipe: tokenizing.Recipe, engine: str, parallel: bool
) -> dict:
    """Write the unit's shards, then its record; returns the record.

    Where the engine differs from the reference on a checked document, the unit is made again with the
    reference, and the record's `engine_problem` says so.
    """
    problem = None
    try:
        record = _make(unit, config, recipe, _engine(engine, recipe, parallel))
    except EngineMismatch as mismatch:
        problem = str(mismatch)
        record = _make(unit, config, recipe, _engine("tokenizers", recipe))
    record["engine_problem"] = problem
    write_atomically(record_path(Path(config.output_dir), unit), json.dumps(record).encode())
    return record


def _make(unit: documents.Unit, config: PrepareConfig, recipe: tokenizing.Recipe, engine) -> dict:
    directory = Path(config.output_dir)
    source = next(source for source in config.sources if source.name == unit.source)
    maker, tally = _Maker(unit, config, recipe, engine), documents.Tally()
    found = documents.read(unit, source, tally)
    if config.deduplicate == "exact":
        found = deduplication.unique(found, directory, unit, tally)
    try:
        for batch in _batches(found):
            if isinstance(batch, list):
                maker.add_batch(batch)
            else:
                maker.add_long(batch)
        limit(tally.bad, maker.counts["documents"], config.max_bad_fraction, unit.source, at_least=ENOUGH)
        written = {name: [asdict(shard) for shard in split.finish()] for name, split in maker.splits.items()}
    except BaseException:
        for split in maker.splits.values():
            split.abandon()
        raise
    if maker.counts["no tokens"]:
        tally.filtered["no tokens"] += maker.counts["no tokens"]
    return {
        **{name: maker.counts[name] for name in ("documents", "characters", "bytes", "tokens")},
        "bad": dict(sorted(tally.bad.items())),
        "filtered": dict(sorted(tally.filtered.items())),
        "damaged": tally.damaged,
        "remainder": sum(split.packer.left_over for split in maker.splits.values()),
        "padding": sum(split.padding for split in maker.splits.values()),
        "engine": f"{engine.name} {engine.version}",
        **written,
    }


class _Maker:
    """The documents of one unit on their way into the rows of its two splits, counted."""

    def __init__(self, unit: documents.Unit, config: PrepareConfig, recipe: tokenizing.Recipe, engine):
        self.engine, self.recipe = engine, recipe
        self.reference = _engine("tokenizers", recipe)
        self.checks = not isinstance(engine, tokenizing.Reference)
        self.fraction = config.validation_fraction
        self.before = [recipe.special_ids["bos"]] * config.add_bos
        self.after = [recipe.special_ids["eos"]] * config.add_eos
        schema = shards.schema(config.seq_len, shards.dtype_for(recipe.size), recipe.fingerprint)
        self.splits = {name: _Split(unit, name, config, schema, padding_id(recipe)) for name in shards.SPLITS}
        self.counts: Counter = Counter()

    def add_batch(self, texts: list[str]) -> None:
        ids, lengths = self.engine.encode(texts)
        hashes = np.array([position(text) for text in texts], dtype=np.uint64)
        if self.checks:
            self._check(texts, ids, lengths, hashes)
        self.counts["no tokens"] += int((lengths == 0).sum())
        ids, lengths = _wrap(ids, lengths, self.before, self.after)
        held_out = hashes < self.fraction * 2**64 if self.fraction else np.zeros(len(texts), dtype=bool)
        in_validation = np.repeat(held_out, lengths)
        self.splits["train"].add(ids[~in_validation], lengths[~held_out & (lengths > 0)])
        if held_out.any():
            self.splits["validation"].add(ids[in_validation], lengths[held_out & (lengths > 0)])
        self._count(len(texts), sum(map(len, texts)), sum(map(_size, texts)), len(ids))

    def add_long(self, document: documents.Document) -> None:
        """One document in parts, so that neither its text nor its ids are held whole."""
        split = self.splits["validation" if is_validation(document, self.fraction) else "train"]
        blocks = document.blocks() if isinstance(document, documents.LongText) else _slices(document)
        tokens = split.add_long(self._encode_parts(blocks))
        self.counts["no tokens"] += tokens == 0
        size = document.bytes if isinstance(document, documents.LongText) else _size(document)
        self._count(1, len(document), size, tokens)

    def _encode_parts(self, blocks: Iterator[str]) -> Iterator[np.ndarray]:
        begun = False
        for part in tokenizing.cut_text(blocks, _cut(self.recipe), BATCH_CHARACTERS):
            ids, lengths = self.engine.encode([part])
            if self.checks:
                self._check([part], ids, lengths, np.array([position(part)], dtype=np.uint64))
            if len(ids) and not begun:
                begun = True
                yield np.array(self.before, dtype=np.int64)
            yield ids.astype(np.int64)
        if begun:
            yield np.array(self.after, dtype=np.int64)

    def _count(self, documents: int, characters: int, size: int, tokens: int) -> None:
        self.counts.update(documents=documents, characters=characters, bytes=size, tokens=tokens)

    def _check(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> None:
        """Compare a sample of the batch, chosen by hash, with the reference. Raises EngineMismatch."""
        ends = np.cumsum(lengths)
        for i in np.flatnonzero(hashes % CHECKED == 0):
            expected, _ = self.reference.encode([texts[i]])
            if not np.array_equal(ids[ends[i] - lengths[i] : ends[i]], expected):
                raise EngineMismatch(
                    f"its ids differ from those of tokenizers on a document that begins {texts[i][:60]!r}"
                )


def padding_id(recipe: tokenizing.Recipe) -> int:
    """What fills the end of a row that best_fit could not: pad, else eos, else 0."""
    return next((i for i in (recipe.special_ids["pad"], recipe.special_ids["eos"]) if i is not None), 0)


def _size(text: str) -> int:
    """Bytes as UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + BATCH_CHARACTERS] for start in range(0, len(text), BATCH_CHARACTERS))


def _wrap(ids: np.ndarray, lengths: np.ndarray, before: list[int], after: list[int]):
    """Put `before` and `after`, of one token or none, around each document that has tokens."""
    real = lengths > 0
    wrapped = lengths + (len(before) + len(after)) * real
    if not before + after or len(lengths) == 0:
        return ids.astype(np.int64), lengths
    out = np.empty(int(wrapped.sum()), dtype=np.int64)
    ends = np.cumsum(wrapped)
    inner = np.ones(len(out), dtype=bool)
    if before:
        starts = (ends - wrapped)[real]
        out[starts], inner[starts] = before[0], False
    if after:
        last = ends[real] - 1
        out[last], inner[last] = after[0], False
    out[inner] = ids
    return out, wrapped


def limit(bad: Counter, good: int, limit: float, source: str, at_least: int = 1) -> None:
    """Raise UserError when more than `limit` of the documents could not be used."""
    count = sum(bad.values())
    if count + good >= at_least and count > limit * (count + good):
        raise UserError(
            f"source {source}: {count:,} of {count + good:,} documents cannot be used ({dict(sorted(bad.items()))}), "
            f"more than max_bad_fraction={limit:g}; mend the input or raise the limit"
        )


def _batches(found: Iterator[documents.Document]) -> Iterator[list[str] | documents.Document]:
    """Lists of documents of some BATCH_CHARACTERS together; a long document comes alone."""
    batch, size = [], 0
    for document in found:
        alone = isinstance(document, documents.LongText) or len(document) > LONG_CHARACTERS
        if not alone:
            batch.append(document)
            size += len(document)
        if batch and (alone or size >= BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        if alone:
            yield document
    if batch:
        yield batch


class _Split:
    """The train or validation rows of one unit on their way into shard files."""

    def __init__(self, unit, name, config: PrepareConfig, shard_schema, padding: int):
        self.packer = PACKERS[config.packing](config.seq_len, padding)
        self.padding = 0  # tokens
        self._directory, self._schema = Path(config.output_dir), shard_schema
        self._stem = f"{unit.source}/{name}-{unit.index:05d}"
        width = shard_schema.field("input_ids").type.value_type.bit_width // 8
        batches = max(1, (config.shard_mb << 20) // (config.seq_len * width * shards.BATCH_ROWS))
        self._rows_per_shard = batches * shards.BATCH_ROWS
        self._writer: shards.ShardWriter | None = None
        self._finished: list[shards.Shard] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.packer.add(ids, lengths)
        self._write(self.packer.take())

    def add_long(self, parts: Iterator[np.ndarray]) -> int:
        """One document whose ids come in parts; the rows are those of `add`. Returns its tokens."""
        held, tokens = np.zeros(0, dtype=np.int64), 0
        for ids in parts:
            tokens += len(ids)
            held = np.concatenate([held, ids])
            rest = len(held) - self.packer.room
            if rest > 0:  # up to the end of a row, where a cut is none, and something for later
                whole = len(held) - rest + (rest - 1) // self.packer.seq_len * self.packer.seq_len
                self.add(held[:whole], np.array([whole]))
                held = held[whole:]
        if len(held):
            self.add(held, np.array([len(held)]))
        return tokens

    def finish(self) -> list[shards.Shard]:
        self._write(self.packer.take(last=True))
        if self._writer is not None:
            self._finished.append(self._writer.close())
            self._writer = None
        return self._finished

    def _write(self, rows) -> None:
        self.padding += rows.ids.size - int(rows.lengths.sum())
        while len(rows):
            if self._writer is None:
                file = f"{self._stem}-{len(self._finished):03d}.arrow"
                self._writer = shards.ShardWriter(self._directory, file, self._schema)
            now, rows = rows.split(self._rows_per_shard - self._writer.rows)
            self._writer.append(now)
            if self._writer.rows == self._rows_per_shard:
                self._finished.append(self._writer.close())
                self._writer = None

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
