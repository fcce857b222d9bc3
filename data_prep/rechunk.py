"""Rows of another length from the shards of a `concat` corpus, without its texts.

In: a corpus folder. Out: another one, with the rows that `prepare` would have made with that seq_len, except for the
training tokens that filled no row at the ends of units: they are not in the shards any more. Unit by unit the documents
are put together again from the rows and packed anew. The same command continues where it was stopped.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_atomically
from common.log import log

from . import shards, verify
from .locks import lock
from .packing import padding_id
from .pool import run_units, worker_count
from .reading import map_file
from .shard_index import index_of
from .work_list import Unit
from .worker import record_path
from .writing import RowSettings, SplitWriter, remove_unfinished


def rechunk(
    directory: str | Path,
    seq_len: int,
    output_dir: str | Path,
    num_workers: int = 0,
    shard_mb: int = 1024,
    progress: bool = True,
) -> shards.Manifest:
    """Make the corpus of `directory` again in `output_dir`, in rows of `seq_len` tokens, or finish doing so.

    Every shard is verified as it is read. Raises UserError, before writing, for a corpus that was made with best_fit or
    by an earlier version and for an output_dir that holds another corpus; later for a damaged shard, and for a source
    that fills no row for training.
    """
    old = shards.Manifest.load(directory)
    folder = Path(output_dir)
    _check(old, Path(directory), seq_len, shard_mb, folder)
    recipe = json.dumps([old.corpus_hash, old.fingerprint, seq_len, shard_mb])
    corpus_hash = hashlib.sha256(recipe.encode()).hexdigest()
    if (folder / "manifest.json").exists():
        finished = shards.Manifest.load(folder)
        if finished.corpus_hash != corpus_hash:
            raise UserError(f"{folder} holds another corpus; choose another --output_dir, or delete that folder first")
        return finished
    settings = RowSettings(
        old.packing, seq_len, old.dtype, padding_id(old.tokenizer["special_ids"]),
        old.tokenizer["fingerprint"], shard_mb,
    )  # fmt: skip
    parts = parts_of(old)
    with lock(folder, 0, 1):
        begun = folder / ".work" / "recipe"
        if begun.exists() and begun.read_text() != corpus_hash:
            raise UserError(
                f"{folder} holds another, unfinished corpus; choose another --output_dir, or delete it first"
            )
        write_atomically(begun, corpus_hash.encode())
        todo = [unit for unit in parts if not record_path(folder, unit).exists()]
        about = replace(old, sources=[], parts=[])  # each worker is sent it

        def job(unit: Unit) -> tuple:
            return rechunk_unit, unit, parts[unit], Path(directory), folder, about, settings

        title = f"pack {len(todo)} of {len(parts)} units anew"
        run_units(todo, job, worker_count(num_workers, len(todo)), title, progress)
        return _finish(old, corpus_hash, folder, list(parts), seq_len)


def _check(old: shards.Manifest, directory: Path, seq_len: int, shard_mb: int, folder: Path) -> None:
    if seq_len < 2 or shard_mb < 1:
        raise UserError(f"--seq_len is {seq_len} and --shard_mb {shard_mb}, expected at least 2 and 1")
    if folder.resolve() == directory.resolve():
        raise UserError(f"--output_dir is the corpus itself, {folder}; choose another folder")
    if old.packing != "concat":
        raise UserError(f"{directory} was packed with {old.packing}, only concat can be rechunked; prepare it again")
    if old.version < 2:
        raise UserError(
            f"{directory} was made by an earlier version and does not tell which documents go on in the next row; "
            "prepare it again"
        )


def parts_of(manifest: shards.Manifest) -> dict[Unit, list[verify.Task]]:
    """The shards of every unit, in order, with what is known of them."""
    found: dict[Unit, list[verify.Task]] = {}
    tasks = verify.tasks_of(manifest)
    tasks.sort(key=lambda task: (task.source, shards.unit_of(task.shard.file)))  # stable: their order stays
    for (source, index), group in groupby(tasks, lambda task: (task.source, shards.unit_of(task.shard.file))):
        part = list(group)
        found[Unit(source, index, (), 0, 0, sum(task.shard.bytes for task in part))] = part
    return found


def rechunk_unit(
    unit: Unit, tasks: list[verify.Task], directory: Path, folder: Path, manifest: shards.Manifest,
    settings: RowSettings,
) -> dict:  # fmt: skip
    """Write the unit's new shards, then its record; returns the record. Raises UserError for a damaged shard."""
    for task in tasks:
        problems = verify.check_shard(directory, manifest, task, hashes=True, contents=True).problems
        if problems:
            raise UserError(f"{problems[0]}; run `python -m data_prep repair CONFIG` for that corpus")
    writers = {split: SplitWriter(folder, unit.source, unit.index, split, settings) for split in shards.SPLITS}
    tokens = 0
    try:
        for task in tasks:
            writer = writers["validation" if task.is_validation else "train"]
            for ids, lengths, goes_on in documents_in(directory / task.shard.file, manifest):
                writer.add(ids, lengths, goes_on)
                tokens += len(ids)
        made = {split: [asdict(shard) for shard in writer.finish()] for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    record = {
        **made,
        "tokens": tokens,
        "remainder": sum(writer.packer.pending_tokens for writer in writers.values()),
        "padding": sum(writer.padding for writer in writers.values()),
    }
    write_atomically(record_path(folder, unit), json.dumps(record).encode())
    return record


def documents_in(path: Path, manifest: shards.Manifest) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """(ids, lengths, whether the last goes on in the next) of a verified shard's documents, for each record batch."""
    _, batches = index_of(map_file(path), shards.batch_rows(manifest.seq_len, manifest.dtype))
    for batch in batches:
        ids, lengths, offsets, continues = shards.columns(batch)
        ends = np.cumsum(lengths, dtype=np.int64)
        is_end = np.ones(len(ends), dtype=bool)
        is_end[offsets[1:] - 1] = ~continues
        is_end[-1] = True
        # padding is only at the end of the last row
        yield ids[: ends[-1]], np.diff(ends[is_end], prepend=0), bool(continues[-1])


def _finish(old: shards.Manifest, corpus_hash: str, folder: Path, units: list[Unit], seq_len: int) -> shards.Manifest:
    """Write the manifest of all records. Raises UserError for a source without a row for training."""
    entries = {
        entry.name: replace(entry, padding=0, train=[], validation=[]) for entry in old.sources
    }  # what was dropped stays dropped
    for unit in units:
        record = json.loads(record_path(folder, unit).read_text())
        entry = entries[unit.source]
        entry.dropped_tokens += record["remainder"]
        entry.padding += record["padding"]
        for split in shards.SPLITS:
            getattr(entry, split).extend(shards.Shard(**shard) for shard in record[split])
    for entry in entries.values():
        if not entry.train:
            raise UserError(f"source {entry.name} fills no training row of {seq_len} tokens; use a smaller --seq_len")
        problem = entry.token_mismatch()
        if problem:
            raise RuntimeError(problem)
    manifest = replace(
        old, seq_len=seq_len, corpus_hash=corpus_hash, sources=list(entries.values()), parts=[], version=shards.VERSION
    )
    remove_unfinished(folder)
    manifest.save(folder)
    already = sum(entry.dropped_tokens for entry in old.sources)
    dropped = sum(entry.dropped_tokens for entry in manifest.sources)
    log.info(
        "%s tokens at the ends of units are in no row: %s were in none of the old ones, %s fill no new one",
        f"{dropped:,}", f"{already:,}", f"{dropped - already:,}",
    )  # fmt: skip
    return manifest
