"""The pipeline: configuration → work list → tokenized, packed shards → manifest.

Each unit of work writes its own shards and then a small record in DIR/.work; a unit with a record is
done. So a run that was killed continues where it stopped, and the bytes do not depend on the number of
processes or machines, nor on interruptions. On a cluster, each of `num_tasks` tasks makes every
num_tasks-th unit, and `merge` writes the manifest.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically
from common.log import log

from . import deduplication, documents, shards, tokenizing, work_list, worker
from .config import PrepareConfig, SourceConfig, check_prepare
from .pool import run_units, worker_count
from .tokenizing import Engine, TokenizerSpec
from .work_list import Unit

# All that decides the bytes of a corpus, beside its tokenizer, its sources and its files
HASHED = ("seq_len", "packing", "add_bos", "add_eos", "validation_fraction", "deduplicate", "unit_mb", "shard_mb")
SAMPLE_DOCUMENTS = 200  # of the first unit, on which the fast engine is compared with the reference
SAMPLE_CHARACTERS = 20_000  # of each of them
ESTIMATE_BYTES = 8 << 20  # of text of each source that `estimate` tokenizes


@dataclass
class Job:
    """A checked configuration and what follows from it."""

    config: PrepareConfig
    tokenizer: TokenizerSpec
    units: list[Unit]  # of all sources
    corpus_hash: str

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)


def prepare(config: PrepareConfig, progress: bool = True, task: int = 0, num_tasks: int = 1) -> shards.Manifest | None:
    """Make the corpus of `config` in its output_dir, or finish one that was interrupted.

    With `num_tasks` > 1 only this task's share is made, without a manifest: returns None. Raises UserError
    before writing for bad settings, missing files, or a folder that holds another corpus; after reading for
    an empty corpus or too many unusable documents. Warns of every source that gets no validation row.
    """
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of num_tasks {num_tasks}, expected 0 to {num_tasks - 1}")
    job = _load(config)
    manifest = _load_finished(job)
    if manifest is not None:
        return manifest
    with _lock(job.directory, task, num_tasks):
        _check_unfinished(job)
        if config.deduplicate == "exact":
            _deduplicate(job, num_tasks, progress)
        engine, reason = _select_engine(job)
        log.info("tokenizing with %s %s: %s", engine.name, engine.version, reason)
        _make_units(job, job.units[task::num_tasks], engine.name, progress)
        return _merge(job) if num_tasks == 1 else None


def merge(config: PrepareConfig) -> shards.Manifest:
    """Write the manifest when all tasks are done. Raises UserError naming how many units are missing."""
    job = _load(config)
    manifest = _load_finished(job)
    if manifest is not None:
        return manifest
    with _lock(job.directory, 0, 1):
        _check_unfinished(job)
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
    job = _load(config)
    if _load_finished(job) is None:
        with _lock(job.directory, 0, 1):
            _check_unfinished(job)
            _deduplicate(job, 1, progress)


def estimate(config: PrepareConfig) -> str:
    """What `prepare` would do: files, bytes, tokens and time, estimated from a sample. Writes nothing."""
    job = _load(config)
    engine, reason = _select_engine(job)
    lines = [f"engine         {engine.name} {engine.version}: {reason}"]
    total_tokens = 0.0
    total_seconds = 0.0
    for source in config.sources:
        units = [unit for unit in job.units if unit.source == source.name]
        tokens, seconds = _estimate_source(config, source, units, engine)
        total_tokens += tokens
        total_seconds += seconds
        files = len({name for unit in units for name in unit.files})
        size = sum(unit.size for unit in units)
        lines.append(
            f"{source.name:<14} {files:,} files, {size / 1e6:,.1f} MB, {len(units):,} units; about "
            f"{tokens / 1e6:,.1f}M tokens = {tokens / config.seq_len:,.0f} rows"
        )
    workers = worker_count(config.num_workers, len(job.units))
    lines.append(
        f"total          about {total_tokens / 1e6:,.1f}M tokens, {total_seconds / workers / 60:,.1f} minutes "
        f"with {workers} process(es), estimated from the first unit of each source"
    )
    return "\n".join(lines)


def _estimate_source(
    config: PrepareConfig, source: SourceConfig, units: list[Unit], engine: Engine
) -> tuple[float, float]:
    """(tokens, seconds of one process) of a source: its first unit is read, and the beginning tokenized."""
    began = time.perf_counter()
    texts = []
    text_bytes = 0  # of the first unit
    sampled_bytes = 0
    for document in documents.read(units[0], source, documents.Tally()):
        text = document if isinstance(document, str) else next(document.blocks())
        size = len(text.encode("utf-8", "replace"))
        text_bytes += size if isinstance(document, str) else document.utf8_bytes
        if sampled_bytes < ESTIMATE_BYTES:
            texts.append(text)
            sampled_bytes += size
    reading = time.perf_counter() - began
    began = time.perf_counter()
    tokens = len(engine.encode(texts)[0]) + len(texts) * (config.add_bos + config.add_eos)
    tokenizing = time.perf_counter() - began
    on_disk = sum(unit.size for unit in units)
    all_bytes = on_disk / max(1, units[0].size) * text_bytes
    seconds_per_byte = reading / max(1, text_bytes) + tokenizing / max(1, sampled_bytes)
    return all_bytes * tokens / max(1, sampled_bytes), all_bytes * seconds_per_byte


def _load(config: PrepareConfig) -> Job:
    """Check the configuration, load its tokenizer and list its units."""
    check_prepare(config)
    tokenizer = tokenizing.load_tokenizer(config.tokenizer, config.tokenizer_revision)
    for wanted, name in ((config.add_bos, "bos_token"), (config.add_eos, "eos_token")):
        if wanted and getattr(tokenizer, f"{name}_id") is None:
            raise UserError(f"add_{name[:3]} is true, but tokenizer {config.tokenizer!r} has no {name}")
    spec = tokenizing.spec_of(tokenizer, config.tokenizer, config.tokenizer_revision)
    units = [unit for source in config.sources for unit in work_list.units(source, int(config.unit_mb * 2**20))]
    return Job(config, spec, units, _corpus_hash(config, spec, units))


def _corpus_hash(config: PrepareConfig, tokenizer: TokenizerSpec, units: list[Unit]) -> str:
    """Hash of everything that decides the corpus: settings, and the files' names, sizes and ends."""
    settings = {
        "version": shards.VERSION,
        "tokenizer": tokenizer.fingerprint,
        **{name: getattr(config, name) for name in HASHED},
        "sources": {s.name: [s.text_field, s.min_characters, s.filters] for s in config.sources},
    }
    content = json.dumps([settings, [work_list.unit_key(unit) for unit in units]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _load_finished(job: Job) -> shards.Manifest | None:
    """The manifest of a corpus that is already made, or None. New mixture weights are written into it."""
    if not (job.directory / "manifest.json").exists():
        return None
    manifest = shards.Manifest.load(job.directory)
    if manifest.corpus_hash != job.corpus_hash:
        raise UserError(
            f"{job.directory} holds a corpus made from other settings or files; "
            "choose another output_dir, or delete that folder first"
        )
    weights = {source.name: source.weight for source in job.config.sources}
    if weights != {source.name: source.weight for source in manifest.sources}:  # they do not change the shards
        for entry in manifest.sources:
            entry.weight = weights[entry.name]
        manifest.save(job.directory)
    _warn_without_validation(job.config, manifest)
    return manifest


def _check_unfinished(job: Job) -> None:
    """An unfinished corpus is continued only with the settings and files that began it."""
    path = job.directory / ".work" / "recipe"
    if path.exists() and path.read_text() != job.corpus_hash:
        raise UserError(
            f"{job.directory} holds an unfinished corpus made from other settings or files; "
            "choose another output_dir, or delete that folder first"
        )
    if not path.exists():
        write_atomically(path, job.corpus_hash.encode())


@contextmanager
def _lock(directory: Path, task: int, num_tasks: int) -> Iterator[None]:
    """Keep two processes from writing the same units: tasks share the folder, but no task runs twice at a time."""
    work = directory / ".work"
    work.mkdir(parents=True, exist_ok=True)
    mode = fcntl.LOCK_SH if num_tasks > 1 else fcntl.LOCK_EX
    with open(work / "lock", "w") as whole, open(work / f"lock-{task}-of-{num_tasks}", "w") as part:
        try:
            fcntl.flock(whole, mode | fcntl.LOCK_NB)
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {directory}; wait for it, or stop it") from None
        yield


def _select_engine(job: Job) -> tuple[Engine, str]:
    """(engine, the reason in one line), after a comparison on the first documents."""
    unit = job.units[0]
    source = next(source for source in job.config.sources if source.name == unit.source)
    found = islice(documents.read(unit, source, documents.Tally()), SAMPLE_DOCUMENTS)
    texts = [text if isinstance(text, str) else next(text.blocks()) for text in found]
    return tokenizing.select_engine(job.tokenizer, job.config.engine, [text[:SAMPLE_CHARACTERS] for text in texts])


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

    Raises UserError for a source without rows or with too many unusable documents.
    """
    config = job.config
    entries = {source.name: shards.SourceEntry(source.name, source.weight) for source in config.sources}
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
    )
    for unfinished in job.directory.glob("manifest.json.*.tmp"):  # of a process that was killed here
        unfinished.unlink()
    manifest.save(job.directory)
    shutil.rmtree(job.directory / ".work")
    _warn_without_validation(config, manifest)
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


def _warn_without_validation(config: PrepareConfig, manifest: shards.Manifest) -> None:
    for source in manifest.without_validation() if config.validation_fraction else []:
        log.warning(
            "source %s has %s documents (%s tokens) but gets no validation row: with validation_fraction=%g "
            "too little is held out to fill a row of %d tokens; use %s",
            source.name, f"{source.documents:,}", f"{source.tokens:,}",
            config.validation_fraction, config.seq_len, shards.MORE_VALIDATION,
        )  # fmt: skip
