"""The pipeline: configuration → work list → tokenized, packed shards → manifest.

Each unit of work writes its own shards and then a small record in DIR/.work; a unit with a record is
done. So a run that was killed continues where it stopped, and the bytes do not depend on the number of
processes or machines, nor on interruptions. On a cluster, each of `num_tasks` tasks makes every
num_tasks-th unit, and `merge` writes the manifest.
"""

import json
import shutil
from collections import Counter

from common.errors import UserError
from common.files import write_atomically
from common.log import log

from . import deduplication, shards, tokenizing, verify, worker
from .config import PrepareConfig
from .job import Job, load_finished, load_job, lock, select_engine, warn_without_validation
from .pool import run_units, worker_count
from .work_list import Unit
from .writing import remove_unfinished


def prepare(config: PrepareConfig, progress: bool = True, task: int = 0, num_tasks: int = 1) -> shards.Manifest | None:
    """Make the corpus of `config` in its output_dir, or finish one that was interrupted.

    With `num_tasks` > 1 only this task's share is made, without a manifest: returns None. Raises UserError
    before writing for bad settings, missing files, or a folder that holds another corpus; after reading for
    an empty corpus or too many unusable documents. Warns of every source that gets no validation row.
    """
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of num_tasks {num_tasks}, expected 0 to {num_tasks - 1}")
    job = load_job(config)
    manifest = load_finished(job)
    if manifest is not None:
        return manifest
    with lock(job.directory, task, num_tasks):
        if config.deduplicate == "exact":
            _deduplicate(job, num_tasks, progress)
        engine, reason = select_engine(job)
        log.info("tokenizing with %s %s: %s", engine.name, engine.version, reason)
        _make_units(job, job.units[task::num_tasks], engine.name, progress)
        return _merge(job) if num_tasks == 1 else None


def merge(config: PrepareConfig) -> shards.Manifest:
    """Write the manifest when all tasks are done. Raises UserError naming how many units are missing."""
    job = load_job(config)
    manifest = load_finished(job)
    if manifest is not None:
        return manifest
    with lock(job.directory, 0, 1):
        missing = [unit for unit in job.units if not worker.record_path(job.directory, unit).exists()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(job.units)} units are not made yet, first {missing[0].source} "
                f"{missing[0].index}; run the missing tasks again, then merge"
            )
        return _merge(job)


def deduplicate(config: PrepareConfig, progress: bool = True) -> None:
    """Find the duplicates of `deduplicate: exact`, before the tasks of a cluster; nothing to do for `none`."""
    if config.deduplicate == "none":
        return
    job = load_job(config)
    if load_finished(job) is None:
        with lock(job.directory, 0, 1):
            _deduplicate(job, 1, progress)


def _deduplicate(job: Job, num_tasks: int, progress: bool) -> None:
    done = job.directory / ".work" / "unique"
    if done.exists():
        return
    if num_tasks > 1:
        raise UserError(
            "deduplicate needs all documents: run `python -m data_prep deduplicate CONFIG` before the tasks"
        )
    todo = [unit for unit in job.units if not deduplication.hashes_path(job.directory, unit).exists()]
    workers = worker_count(job.config.num_workers, len(todo))
    run_units(todo, lambda unit: (deduplication.write_hashes, unit, job.config), workers, "hash documents", progress)
    dropped = deduplication.select_kept(job.units, job.directory)
    for unit in job.units:
        deduplication.hashes_path(job.directory, unit).unlink()
    write_atomically(done, str(dropped).encode())


def _make_units(job: Job, units: list[Unit], engine: str, progress: bool) -> None:
    """Make every unit that has no record yet."""
    todo = [unit for unit in units if not worker.record_path(job.directory, unit).exists()]
    workers = worker_count(job.config.num_workers, len(todo))
    parallel = workers == 1  # then the tokenizer may use threads
    current = engine

    def task(unit: Unit) -> tuple:
        return worker.process_unit, unit, job.config, job.tokenizer, current, parallel

    def done(unit: Unit, record: dict) -> None:
        nonlocal current
        if record["engine_problem"] and current != tokenizing.Reference.name:
            current = tokenizing.Reference.name
            log.warning(
                "%s is not used any more: %s; %s unit %d was made again with tokenizers, and the following units are",
                engine, record["engine_problem"], unit.source, unit.index,
            )  # fmt: skip

    title = f"tokenize and pack {len(todo)} of {len(units)} units"
    run_units(todo, task, workers, title, progress, done)


def _merge(job: Job) -> shards.Manifest:
    """Write the manifest of all records, in the order of the work list; this finishes the corpus.

    Raises UserError for a source without rows or with too many unusable documents, and for a missing or short shard.
    """
    config = job.config
    entries = {source.name: shards.SourceEntry(source.name, source.weight) for source in config.sources}
    for source in job.work.sources:
        entries[source.name].ignored = source.ignored
        entries[source.name].max_epochs = next(s.max_epochs for s in config.sources if s.name == source.name)
    engines: Counter = Counter()
    for unit in job.units:
        record = json.loads(worker.record_path(job.directory, unit).read_text())
        _add_record(entries[unit.source], record)
        engines[record["engine"]] += 1
    for entry in entries.values():
        worker.check_reject_rate(Counter(entry.bad), entry.documents, config.max_bad_fraction, entry.name)
        if not entry.train:
            raise UserError(
                f"source {entry.name} gives no row of {config.seq_len} tokens for training: {entry.documents} "
                f"documents, {entry.tokens} tokens, left out {entry.bad | entry.filtered or 'none'}; "
                "check paths, text_field, filters and seq_len"
            )
        problem = entry.token_mismatch()
        if problem:
            raise RuntimeError(problem)
    verify.check_sizes(job.directory, entries.values())
    about = {
        "name": config.tokenizer,
        "fingerprint": job.tokenizer.fingerprint,
        "vocab_size": job.tokenizer.size,
        "add_bos": config.add_bos,
        "add_eos": config.add_eos,
        "special_ids": job.tokenizer.special_ids,
        "engine": ", ".join(sorted(engines)),
    }
    manifest = shards.Manifest(
        seq_len=config.seq_len,
        dtype=shards.dtype_for(job.tokenizer.size),
        packing=config.packing,
        tokenizer=about,
        corpus_hash=job.corpus_hash,
        sources=list(entries.values()),
        parts=[shards.Part(job.corpus_hash, "inputs/000.json", {s.name: len(s.units) for s in job.work.sources})],
    )
    job.work.save(job.directory / "inputs" / "000.json")
    remove_unfinished(job.directory)
    manifest.save(job.directory)
    shutil.rmtree(job.directory / ".work")
    warn_without_validation(config, manifest)
    return manifest


def _add_record(entry: shards.SourceEntry, record: dict) -> None:
    """Add a unit's record to the entry of its source."""
    for name in ("documents", "characters", "bytes", "tokens", "padding"):
        setattr(entry, name, getattr(entry, name) + record[name])
    entry.dropped_tokens += record["remainder"]
    for name in ("bad", "filtered"):
        setattr(entry, name, dict(sorted((Counter(getattr(entry, name)) + Counter(record[name])).items())))
    entry.damaged += record["damaged"]
    for split in shards.SPLITS:
        getattr(entry, split).extend(shards.Shard(**shard) for shard in record[split])
