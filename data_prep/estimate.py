"""The dry run: what `prepare` would do, estimated from the first unit of each source."""

import time
from dataclasses import replace

from . import documents, work_list
from .config import PrepareConfig, SourceConfig
from .engines import Engine
from .inputs.document import LongText, Tally, text_of
from .inputs.kinds import is_compressed, kind
from .job import Job, load_job, select_engine
from .pool import worker_count
from .work_list import Unit

ESTIMATE_BYTES = 8 << 20  # of text of each source that `estimate` tokenizes
SAMPLE_BYTES = 64 << 20  # of a unit's files that it reads; more of a file that must be read whole


def estimate(config: PrepareConfig) -> str:
    """What `prepare` would do: files, bytes, tokens and time, estimated from a sample. Writes nothing."""
    job = load_job(config, save=False)
    engine, reason = select_engine(job)
    lines = [f"engine         {engine.name} {engine.version}: {reason}"]
    total_tokens = 0.0
    total_seconds = 0.0
    for source, listed in zip(config.sources, job.work.sources):
        units = listed.units
        tokens, seconds = _estimate_source(job, source, units, engine)
        total_tokens += tokens
        total_seconds += seconds
        files = len(listed.files())
        size = sum(unit.size for unit in units)
        lines.append(
            f"{source.name:<14} {files:,} files, {size / 1e6:,.1f} MB, {len(units):,} units; about "
            f"{tokens / 1e6:,.1f}M tokens = {tokens / config.seq_len:,.0f} rows"
            + (f"; max_tokens {source.max_tokens:,}" if source.max_tokens else "")
        )
        if listed.ignored:
            lines.append(f"{'':<14} left out, as no documents: {work_list.ignored_text(listed.ignored)}")
    workers = worker_count(config.num_workers, len(job.units))
    lines.append(
        f"total          about {total_tokens / 1e6:,.1f}M tokens, {total_seconds / workers / 60:,.1f} minutes "
        f"with {workers} process(es), estimated from the first unit of each source"
    )
    return "\n".join(lines)


def _estimate_source(job: Job, source: SourceConfig, units: list[Unit], engine: Engine) -> tuple[float, float]:
    """(tokens, seconds of one process) of a source: the beginning of its first unit is read, and less tokenized."""
    config = job.config
    sample = _beginning(units[0])
    began = time.perf_counter()
    texts = []
    text_bytes = 0  # of the sample
    sampled_bytes = 0
    for document in documents.of_unit(sample, config, job.tokenizer, Tally()):
        text = text_of(document)
        size = len(text.encode("utf-8", "replace"))
        text_bytes += document.utf8_bytes if isinstance(document, LongText) else size
        if sampled_bytes < ESTIMATE_BYTES:
            texts.append(text)
            sampled_bytes += size
    reading = time.perf_counter() - began
    began = time.perf_counter()
    tokens = len(engine.encode(texts)[0]) + len(texts) * (config.add_bos + config.add_eos)
    tokenizing = time.perf_counter() - began
    on_disk = sum(unit.size for unit in units)
    all_bytes = on_disk / max(1, sample.size) * text_bytes
    seconds_per_byte = reading / max(1, text_bytes) + tokenizing / max(1, sampled_bytes)
    all_tokens = all_bytes * tokens / max(1, sampled_bytes)
    share = min(1.0, source.max_tokens / all_tokens) if source.max_tokens and all_tokens else 1.0
    return share * all_tokens, share * all_bytes * seconds_per_byte


def _beginning(unit: Unit) -> Unit:
    """About SAMPLE_BYTES of a unit: fewer bytes of plain JSONL, fewer of several files."""
    if unit.size <= SAMPLE_BYTES:
        return unit
    first = unit.files[0]
    if len(unit.files) == 1:
        if kind(first.path) != "jsonl" or is_compressed(first.path):
            return unit
        return replace(unit, end=unit.start + SAMPLE_BYTES, size=SAMPLE_BYTES)
    count = 1
    while sum(file.size for file in unit.files[: count + 1]) <= SAMPLE_BYTES:
        count += 1
    return replace(unit, files=unit.files[:count], size=sum(file.size for file in unit.files[:count]))
