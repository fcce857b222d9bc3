"""One unit of work: read → tokenise → pack → shards, then a record of what was made.

Runs in a worker process; what it writes depends on the unit and the settings alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import documents, shards, tokenizing
from .config import PrepareConfig, UserError
from .packing import PACKERS

BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once
CHECKED = 512  # one document in so many is compared with the reference tokenizer
ENOUGH = 1000  # documents of a unit from which on max_bad_fraction is applied to it


class EngineMismatch(Exception):
    """The fast engine gave other ids than the reference on a document of the run."""


@lru_cache(maxsize=2)
def _engine(name: str, recipe: tokenizing.Recipe, parallel: bool = True):
    return tokenizing.Gigatoken(recipe, parallel) if name == "gigatoken" else tokenizing.Reference(recipe)


def record_path(directory: Path, unit: documents.Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.json"


def digest(text: str) -> int:
    """64 bits of a document's text: they decide its split, and whether it is checked."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def is_validation(text: str, fraction: float) -> bool:
    """Held out by a hash of the text: the same document goes the same way in any corpus."""
    return digest(text) < fraction * 2**64


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
    shards.write_atomically(record_path(Path(config.output_dir), unit), json.dumps(record).encode())
    return record


def _make(unit: documents.Unit, config: PrepareConfig, recipe: tokenizing.Recipe, engine) -> dict:
    directory = Path(config.output_dir)
    source = next(source for source in config.sources if source.name == unit.source)
    reference = _engine("tokenizers", recipe)
    shard_schema = shards.schema(config.seq_len, shards.dtype_for(recipe.size), recipe.fingerprint)
    bos, eos = recipe.special_ids["bos"], recipe.special_ids["eos"]
    before, after = int(config.add_bos), int(config.add_eos)
    threshold = config.validation_fraction * 2**64
    splits = {name: _Split(unit, name, config, shard_schema, padding_id(recipe)) for name in shards.SPLITS}
    counts, tally = Counter(), documents.Tally()
    keep = _kept(directory, unit) if config.deduplicate == "exact" else None
    try:
        for texts in _batches(_unique(documents.read(unit, source, tally), keep, tally)):
            ids, lengths = engine.encode(texts)
            hashes = np.array([digest(text) for text in texts], dtype=np.uint64)
            if not isinstance(engine, tokenizing.Reference):
                _check(texts, ids, lengths, hashes, reference)
            counts["no tokens"] += int((lengths == 0).sum())
            ids, lengths = _wrap(ids, lengths, bos, eos, before, after)
            held_out = hashes < threshold if threshold else np.zeros(len(texts), dtype=bool)
            in_validation = np.repeat(held_out, lengths)
            splits["train"].add(ids[~in_validation], lengths[~held_out & (lengths > 0)])
            if held_out.any():
                splits["validation"].add(ids[in_validation], lengths[held_out & (lengths > 0)])
            counts["documents"] += len(texts)
            counts["characters"] += sum(map(len, texts))
            counts["bytes"] += sum(
                len(text) if text.isascii() else len(text.encode("utf-8", "replace")) for text in texts
            )
            counts["tokens"] += len(ids)
        limit(tally.bad, counts["documents"], config.max_bad_fraction, unit.source, at_least=ENOUGH)
        written = {name: [asdict(shard) for shard in split.finish()] for name, split in splits.items()}
    except BaseException:
        for split in splits.values():
            split.abandon()
        raise
    if counts["no tokens"]:
        tally.filtered["no tokens"] += counts["no tokens"]
    return {
        **{name: counts[name] for name in ("documents", "characters", "bytes", "tokens")},
        "bad": dict(sorted(tally.bad.items())),
        "filtered": dict(sorted(tally.filtered.items())),
        "damaged": tally.damaged,
        "remainder": sum(split.packer.left_over for split in splits.values()),
        "padding": sum(split.padding for split in splits.values()),
        "engine": f"{engine.name} {engine.version}",
        **written,
    }


def padding_id(recipe: tokenizing.Recipe) -> int:
    """What fills the end of a row that best_fit could not: pad, else eos, else 0."""
    return next((i for i in (recipe.special_ids["pad"], recipe.special_ids["eos"]) if i is not None), 0)


def _wrap(ids, lengths, bos: int, eos: int, before: int, after: int):
    """Put BOS and EOS around each document that has tokens."""
    real = lengths > 0
    wrapped = lengths + (before + after) * real
    if before + after == 0 or len(lengths) == 0:
        return ids.astype(np.int64), lengths
    out = np.empty(int(wrapped.sum()), dtype=np.int64)
    ends = np.cumsum(wrapped)
    inner = np.ones(len(out), dtype=bool)
    if before:
        starts = (ends - wrapped)[real]
        out[starts], inner[starts] = bos, False
    if after:
        last = ends[real] - 1
        out[last], inner[last] = eos, False
    out[inner] = ids
    return out, wrapped


def _check(texts, ids, lengths, hashes, reference) -> None:
    """Compare a sample of the batch, chosen by the documents' hashes. Raises EngineMismatch."""
    ends = np.cumsum(lengths)
    for i in np.flatnonzero(hashes % CHECKED == 0):
        expected, _ = reference.encode([texts[i]])
        if not np.array_equal(ids[ends[i] - lengths[i] : ends[i]], expected):
            raise EngineMismatch(f"its ids differ from those of tokenizers on a document that begins {texts[i][:60]!r}")


def limit(bad: Counter, good: int, limit: float, source: str, at_least: int = 1) -> None:
    """Raise UserError when more than `limit` of the documents could not be used."""
    count = sum(bad.values())
    if count + good >= at_least and count > limit * (count + good):
        raise UserError(
            f"source {source}: {count:,} of {count + good:,} documents cannot be used ({dict(sorted(bad.items()))}), "
            f"more than max_bad_fraction={limit:g}; mend the input or raise the limit"
        )


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Exact de-duplication: every unit's document hashes first, then which documents each unit keeps.


def hashes_path(directory: Path, unit: documents.Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.hashes.npy"


def write_hashes(unit: documents.Unit, config: PrepareConfig) -> None:
    """128-bit hashes of the unit's documents, in order; (documents, 2) uint64."""
    source = next(source for source in config.sources if source.name == unit.source)
    found = [
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for text in documents.read(unit, source, documents.Tally())
    ]
    path = hashes_path(Path(config.output_dir), unit)
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.save(file, np.frombuffer(b"".join(found), dtype="<u8").reshape(-1, 2))
    path.with_suffix(".tmp").replace(path)


def choose_unique(work: list[documents.Unit], directory: Path, buckets: int = 64) -> int:
    """Of equal documents keep the first of the work list; writes each unit's choice, returns how many go.

    A bucket of hashes at a time, so that memory holds a part of them.
    """
    hashes = [np.load(hashes_path(directory, unit), mmap_mode="r") for unit in work]
    kept = [np.zeros(len(h), dtype=bool) for h in hashes]
    for bucket in range(buckets):
        places = [np.flatnonzero(h[:, 0] % buckets == bucket) for h in hashes]
        values = np.concatenate([h[place] for h, place in zip(hashes, places)])
        if not len(values):
            continue
        _, first = np.unique(values, axis=0, return_index=True)  # the first of the work list, as np.unique is stable
        is_first = np.zeros(len(values), dtype=bool)
        is_first[first] = True
        for keep, place, part in zip(kept, places, np.split(is_first, np.cumsum([len(p) for p in places])[:-1])):
            keep[place] = part
    for unit, keep in zip(work, kept):
        np.save(_keep_path(directory, unit), keep)
    return sum(int((~keep).sum()) for keep in kept)


def _keep_path(directory: Path, unit: documents.Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.keep.npy"


def _kept(directory: Path, unit: documents.Unit) -> np.ndarray:
    return np.load(_keep_path(directory, unit))


def _unique(texts: Iterator[str], keep: np.ndarray | None, tally: documents.Tally) -> Iterator[str]:
    for i, text in enumerate(texts):
        if keep is None or keep[i]:
            yield text
        else:
            tally.filtered["duplicate"] += 1


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
