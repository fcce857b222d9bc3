"""The dry run: what `prepare` would do, estimated from the first unit of each source."""

import time

from . import documents
from .config import PrepareConfig, SourceConfig
from .inputs.document import Tally
from .job import load_job, select_engine
from .pool import worker_count
from .tokenizing import Engine
from .work_list import Unit

ESTIMATE_BYTES = 8 << 20  # of text of each source that `estimate` tokenizes


def estimate(config: PrepareConfig) -> str:
    """What `prepare` would do: files, bytes, tokens and time, estimated from a sample. Writes nothing."""
    job = load_job(config)
    engine, reason = select_engine(job)
    lines = [f"engine         {engine.name} {engine.version}: {reason}"]
    total_tokens = 0.0
    total_seconds = 0.0
    for source in config.sources:
        units = [unit for unit in job.units if unit.source == source.name]
        tokens, seconds = _estimate_source(config, source, units, engine)
        total_tokens += tokens
        total_seconds += seconds
        files = len({file for unit in units for file in unit.files})
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
    for document in documents.read(units[0], source, Tally()):
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
