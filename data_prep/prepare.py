"""The pipeline: configuration → work list → tokenised, packed shards → manifest.

Each unit of work writes its own shards and then a small record in DIR/.work; a unit with a record of
the same recipe is done. So a run that was killed continues where it was, and neither the number of
processes nor an interruption changes a byte.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import documents, shards, tokenizing
from .config import PrepareConfig, UserError, check_prepare
from .packing import Packer

BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once


def prepare(config: PrepareConfig, progress: bool = True) -> shards.Manifest:
    """Make the corpus of `config` in its output_dir, or finish one that was interrupted.

    Raises UserError before writing for bad settings, missing files, or a folder that holds another
    corpus; after reading for an empty corpus.
    """
    check_prepare(config)
    tokenizer = tokenizing.load_tokenizer(config.tokenizer, config.tokenizer_revision)
    for wanted, name in ((config.add_bos, "bos_token"), (config.add_eos, "eos_token")):
        if wanted and getattr(tokenizer, f"{name}_id") is None:
            raise UserError(f"add_{name[:3]} is true, but tokenizer {config.tokenizer!r} has no {name}")
    work = [unit for source in config.sources for unit in documents.units(source, config.unit_mb << 20)]
    settings = _settings(config, tokenizing.fingerprint(tokenizer))
    recipe = _hash([settings, [documents.recipe(unit) for unit in work]])

    directory = Path(config.output_dir)
    if (directory / "manifest.json").exists():
        manifest = shards.Manifest.load(directory)
        if manifest.recipe != recipe:
            raise UserError(
                f"{directory} holds a corpus made from other settings or files; "
                "choose another output_dir, or delete that folder first"
            )
        weights = {source.name: source.weight for source in config.sources}
        if weights != {source.name: source.weight for source in manifest.sources}:  # not part of the bytes
            for entry in manifest.sources:
                entry.weight = weights[entry.name]
            manifest.save(directory)
        return manifest
    with _lock(directory):
        records = _run(config, work, settings, progress)
        manifest = _merge(config, tokenizer, settings, recipe, work, records)
        manifest.save(directory)
        shutil.rmtree(directory / ".work")
    return manifest


def _settings(config: PrepareConfig, fingerprint: str) -> dict:
    names = ("seq_len", "add_bos", "add_eos", "validation_fraction", "unit_mb", "shard_mb")
    return {
        "version": shards.VERSION,
        "tokenizer": fingerprint,
        "packing": "concat",
        **{name: getattr(config, name) for name in names},
    }


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def _lock(directory: Path):
    """Two processes never write the same corpus."""
    (directory / ".work").mkdir(parents=True, exist_ok=True)
    with open(directory / ".work" / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {directory}; wait for it, or stop it") from None
        yield


def _record_path(directory: Path, unit: documents.Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.json"


def _run(config: PrepareConfig, work: list[documents.Unit], settings: dict, progress: bool) -> dict[tuple, dict]:
    """The record of every unit, made now or found finished."""
    directory = Path(config.output_dir)
    records, todo = {}, []
    for unit in work:
        path = _record_path(directory, unit)
        record = json.loads(path.read_text()) if path.exists() else None
        if record and record["recipe"] == _hash([settings, documents.recipe(unit)]):
            records[unit.source, unit.index] = record
        else:
            todo.append(unit)
    workers = min(config.num_workers or os.cpu_count() or 1, len(todo))
    bar = tqdm(
        total=sum(unit.size for unit in work),
        initial=sum(unit.size for unit in work if (unit.source, unit.index) in records),
        unit="B",
        unit_scale=True,
        desc="tokenize and pack",
        disable=not progress,
    )
    with bar:
        if workers <= 1:  # the tokenizer's own threads do the work
            for unit in todo:
                records[unit.source, unit.index] = process_unit(unit, config, settings)
                bar.update(unit.size)
            return records
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
        try:
            futures = {pool.submit(process_unit, unit, config, settings): unit for unit in todo}
            for future in as_completed(futures):
                unit = futures[future]
                records[unit.source, unit.index] = future.result()
                bar.update(unit.size)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); the finished units are kept: "
                "run the same command again, with a smaller num_workers if memory was short"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return records


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes already use every core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


@lru_cache(maxsize=1)
def _tokenizer(name: str, revision: str):
    return tokenizing.load_tokenizer(name, revision)


def is_validation(text: str, fraction: float) -> bool:
    """Held out by a hash of the text: the same document goes the same way in any corpus."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def process_unit(unit: documents.Unit, config: PrepareConfig, settings: dict) -> dict:
    """Tokenise and pack one unit, write its shards, then its record; returns the record."""
    directory = Path(config.output_dir)
    tokenizer = _tokenizer(config.tokenizer, config.tokenizer_revision)
    shard_schema = shards.schema(config.seq_len, shards.dtype_for(len(tokenizer)), settings["tokenizer"])
    prefix = [tokenizer.bos_token_id] if config.add_bos else []
    suffix = [tokenizer.eos_token_id] if config.add_eos else []
    splits = {
        split: _Split(directory, unit, split, shard_schema, config.shard_mb << 20, config.seq_len)
        for split in shards.SPLITS
    }
    counts: Counter = Counter()
    skipped: Counter = Counter()
    try:
        for texts in _batches(documents.read(unit, skipped)):
            for text, ids in zip(texts, tokenizing.encode_batch(tokenizer, texts)):
                ids = np.concatenate([prefix, ids, suffix]).astype(np.int64)
                if len(ids) == 0:  # a text that the normaliser empties
                    skipped["no tokens"] += 1
                    continue
                split = "validation" if is_validation(text, config.validation_fraction) else "train"
                splits[split].packer.add(ids)
                counts["documents"] += 1
                counts["characters"] += len(text)
                counts["tokens"] += len(ids)
            for split in splits.values():
                split.write_full_rows()
        record = {
            "recipe": _hash([settings, documents.recipe(unit)]),
            **{name: counts[name] for name in ("documents", "characters", "tokens")},
            "skipped": dict(sorted(skipped.items())),
            "remainder": sum(split.packer.remainder for split in splits.values()),
            **{name: [asdict(shard) for shard in split.finish()] for name, split in splits.items()},
        }
    except BaseException:
        for split in splits.values():
            split.abandon()
        raise
    shards.write_atomically(_record_path(directory, unit), json.dumps(record).encode())
    return record


def _batches(texts):
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Split:
    """The train or validation rows of one unit on their way into shard files."""

    def __init__(self, directory, unit, name, shard_schema, shard_bytes, seq_len):
        self.packer = Packer(seq_len)
        self._directory, self._schema = directory, shard_schema
        self._stem = f"{unit.source}/{name}-{unit.index:05d}"
        width = shard_schema.field("input_ids").type.value_type.bit_width // 8
        batches = max(1, shard_bytes // (seq_len * width * shards.BATCH_ROWS))
        self._rows_per_shard = batches * shards.BATCH_ROWS
        self._writer: shards.ShardWriter | None = None
        self._finished: list[shards.Shard] = []

    def write_full_rows(self) -> None:
        ids, lengths = self.packer.take()
        while len(ids):
            if self._writer is None:
                file = f"{self._stem}-{len(self._finished):03d}.arrow"
                self._writer = shards.ShardWriter(self._directory, file, self._schema)
            fits = self._rows_per_shard - self._writer.rows
            self._writer.append(ids[:fits], lengths[:fits])
            ids, lengths = ids[fits:], lengths[fits:]
            if self._writer.rows == self._rows_per_shard:
                self._finished.append(self._writer.close())
                self._writer = None

    def finish(self) -> list[shards.Shard]:
        if self._writer is not None:
            self._finished.append(self._writer.close())
            self._writer = None
        return self._finished

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()


def _merge(config, tokenizer, settings, recipe, work, records) -> shards.Manifest:
    """One manifest of all records, in the order of the work list. Raises UserError for an empty corpus."""
    entries = {source.name: shards.SourceEntry(source.name, source.weight) for source in config.sources}
    for unit in work:
        record, entry = records[unit.source, unit.index], entries[unit.source]
        for name in ("documents", "characters", "tokens", "remainder"):
            setattr(entry, name, getattr(entry, name) + record[name])
        entry.skipped = dict(sorted((Counter(entry.skipped) + Counter(record["skipped"])).items()))
        for split in shards.SPLITS:
            getattr(entry, split).extend(shards.Shard(**shard) for shard in record[split])
    for entry in entries.values():
        if not entry.train:
            raise UserError(
                f"source {entry.name} gives no row of {config.seq_len} tokens for training: {entry.documents} "
                f"documents, {entry.tokens} tokens, skipped {entry.skipped or 'none'}; "
                "check paths, text_field and seq_len"
            )
        in_rows = sum(shard.tokens for split in shards.SPLITS for shard in getattr(entry, split))
        if entry.tokens != in_rows + entry.remainder:
            raise RuntimeError(f"{entry.name}: {entry.tokens} tokens in, {in_rows} + {entry.remainder} out")
    about = {
        "name": config.tokenizer,
        "fingerprint": settings["tokenizer"],
        "vocab_size": len(tokenizer),
        "add_bos": config.add_bos,
        "add_eos": config.add_eos,
        "special_ids": tokenizing.special_ids(tokenizer),
    }
    dtype = shards.dtype_for(len(tokenizer))
    return shards.Manifest(config.seq_len, dtype, about, recipe, list(entries.values()))
