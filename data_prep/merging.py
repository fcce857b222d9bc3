"""The records of all units to the manifest, which finishes a corpus.

Before, units that may not stay as they are are made again: those of an engine that gave wrong ids, and the one in which
a source comes to its max_tokens; what is beyond is deleted. All of it may be interrupted and done again: a unit is made
again before its record is replaced, and the manifest comes last.
"""

import hashlib
import re
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

from . import shards, tokenizing, verify, worker
from .config import PrepareConfig, SourceConfig
from .job import Job, warn_without_validation, work_list_path
from .making import engine_of_job, make_units
from .work_list import Unit
from .writing import remove_unfinished

SHARD_NAME = re.compile(rf"({'|'.join(shards.SPLITS)})-\d{{5,}}-\d{{3,}}\.arrow")


@dataclass
class Kept:
    """A unit that is part of the corpus, and its record."""

    unit: Unit
    record: dict


def finish(job: Job, progress: bool, before: shards.Manifest | None = None) -> shards.Manifest:
    """Write the manifest of all records, in the order of the work list, behind those of `before`; this finishes it.

    Raises UserError for units that are not made, missing or short shards, a source without rows, with too many unusable
    documents or too many damaged files. Then everything that is made stays.
    """
    config = job.config
    kept = _settle(job, progress)
    entries = _entries(job, kept, before)
    verify.check_sizes(job.directory, entries)
    for entry in entries:
        _check_entry(entry, config)
    manifest = shards.Manifest(
        seq_len=config.seq_len,
        dtype=shards.dtype_for(job.tokenizer.size),
        packing=config.packing,
        tokenizer={
            "name": config.tokenizer,
            "fingerprint": job.tokenizer.fingerprint,
            "vocab_size": job.tokenizer.size,
            "add_bos": config.add_bos,
            "add_eos": config.add_eos,
            "special_ids": job.tokenizer.special_ids,
            "separator": job.tokenizer.separator,
            "revision": config.tokenizer_revision,
            "engine": ", ".join(sorted({one.record["engine"] for one in kept}.union(_engines(before)))),
        },
        corpus_hash=_joined_hash(before, job.corpus_hash),
        sources=entries,
        parts=[*(before.parts if before else []), _part(job, kept, len(before.parts) if before else 0)],
    )
    job.work.save(job.directory / manifest.parts[-1].inputs)
    remove_unfinished(job.directory)
    _remove_other_shards(job.directory, manifest)
    manifest.save(job.directory)
    work_list_path(job.directory).unlink(missing_ok=True)  # the rest of .work goes when it is unlocked
    warn_without_validation(config, manifest)
    return manifest


def _settle(job: Job, progress: bool) -> list[Kept]:
    """Every unit of the corpus with its record, after those were made again that do not stay."""
    problem = worker.reference_only(job.directory)
    if problem is not None:
        made = [unit for unit in job.units if worker.record_path(job.directory, unit).exists()]
        make_units(job, made, tokenizing.Reference.name, progress)
    kept: list[Kept] = []
    missing: list[Unit] = []
    for source in job.config.sources:
        _up_to_limit(job, source, kept, missing)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(job.units)} units are not made yet, first {missing[0].source} {missing[0].index}; "
            "run the missing tasks again, then merge"
        )
    if problem is None and worker.reference_only(job.directory) is not None:  # seen when a unit was made again
        return _settle(job, progress)
    return kept


def _up_to_limit(job: Job, source: SourceConfig, kept: list[Kept], missing: list[Unit]) -> None:
    """Add the units of a source until its max_tokens are reached, or those of them that are missing."""
    is_complete = True
    left = source.max_tokens
    for unit in (unit for unit in job.units if unit.source == source.name):
        record = worker.read_record(job.directory, unit)
        if record is None:
            missing.append(unit)
            is_complete = False
        elif is_complete:
            if not (worker.fits(record, left) and worker.is_made(job.directory, unit)):
                engine = engine_of_job(job)
                record = worker.process_unit(unit, job.config, job.tokenizer, engine, True, left)
            kept.append(Kept(unit, record))
            left -= min(left, record["tokens"])
            if source.max_tokens and (record["cut"] or not left):
                return


def _engines(before: shards.Manifest | None) -> list[str]:
    return before.tokenizer["engine"].split(", ") if before else []


def _joined_hash(before: shards.Manifest | None, added: str) -> str:
    """The hash of a corpus to which a part was added."""
    return hashlib.sha256(f"{before.corpus_hash} {added}".encode()).hexdigest() if before else added


def _entries(job: Job, kept: list[Kept], before: shards.Manifest | None) -> list[shards.SourceEntry]:
    """The manifest's entry of every source."""
    entries = {entry.name: entry for entry in deepcopy(before.sources)} if before else {}
    for source in job.config.sources:
        entry = entries.setdefault(source.name, shards.SourceEntry(source.name, source.weight))
        entry.weight, entry.max_epochs = source.weight, source.max_epochs
    for source in job.work.sources:
        entries[source.name].ignored = source.ignored  # of all its paths, which were listed again
    for one in kept:
        _add_record(entries[one.unit.source], one.record)
    for entry in entries.values():
        size = sum(unit.size for unit in job.units if unit.source == entry.name)
        entry.not_read_bytes += size - sum(one.unit.size for one in kept if one.unit.source == entry.name)
        entry.damaged += _damaged(entry.name, kept).values()
    return list(entries.values())


def _add_record(entry: shards.SourceEntry, record: dict) -> None:
    """Add a unit's record to the entry of its source."""
    for name in ("documents", "characters", "bytes", "tokens", "padding"):
        setattr(entry, name, getattr(entry, name) + record[name])
    entry.dropped_tokens += record["remainder"]
    for name in ("bad", "filtered", "special_tokens"):
        counts = Counter(getattr(entry, name)) + Counter(record.get(name, {}))
        setattr(entry, name, dict(sorted(counts.items())))
    for split in shards.SPLITS:
        getattr(entry, split).extend(shards.Shard(**shard) for shard in record[split])


def _damaged(source: str, kept: list[Kept]) -> dict[str, str]:
    """The damaged files of a source, each once, though several units may have read it."""
    found: dict[str, str] = {}
    for one in kept:
        if one.unit.source == source and one.record["damaged"]:
            found = worker.damaged_files(one.unit, one.record["damaged"]) | found
    return dict(sorted(found.items()))


def _check_entry(entry: shards.SourceEntry, config: PrepareConfig) -> None:
    """Raise UserError for a source that may not be part of a corpus."""
    if len(entry.damaged) > config.max_damaged_files:
        raise worker.too_many_damaged(entry.name, entry.damaged, config.max_damaged_files)
    bad = sum(entry.bad.values())
    if bad > config.max_bad_fraction * (bad + entry.documents):
        raise UserError(
            f"source {entry.name}: {bad:,} of {bad + entry.documents:,} documents cannot be used ({entry.bad}), more "
            f"than max_bad_fraction={config.max_bad_fraction:g}; repair the input or raise max_bad_fraction"
        )
    if not entry.train:
        raise UserError(
            f"source {entry.name} gives no row of {config.seq_len} tokens for training: {entry.documents} "
            f"documents, {entry.tokens} tokens, left out {entry.bad | entry.filtered or 'none'}; "
            "check paths, text_field, filters, max_tokens and seq_len"
        )
    problem = entry.token_mismatch()
    if problem:
        raise RuntimeError(problem)


def _part(job: Job, kept: list[Kept], number: int) -> shards.Part:
    units = {source.name: len(source.units) for source in job.work.sources}
    cut = {one.unit.source: [one.unit.index, one.record["max_tokens"]] for one in kept if one.record["cut"]}
    return shards.Part(job.corpus_hash, f"inputs/{number:03d}.json", units, cut)


def _remove_other_shards(directory: Path, manifest: shards.Manifest) -> None:
    """Remove the shards that are not in the manifest: those beyond max_tokens, and what a killed process left."""
    for source in manifest.sources:
        files = {shard.file for shard in source.train + source.validation}
        for path in (directory / source.name).iterdir():
            if SHARD_NAME.fullmatch(path.name) and f"{source.name}/{path.name}" not in files:
                path.unlink()
