"""One unit of work: read → tokenize → pack → write shards, then a record of what was made.

Runs in a worker process; what it writes depends on the unit and the settings alone.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically

from . import deduplication, documents, tokenizing
from .config import PrepareConfig
from .inputs.document import Tally, TokenizedText
from .tokenizing import Engine, TokenizerSpec
from .unit_builder import EngineMismatch, UnitBuilder, batches, engine_of
from .work_list import Unit

MIN_DOCUMENTS_TO_REJECT = 1000  # a unit with fewer documents is not rejected by itself


def record_path(directory: Path, unit: Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.json"


def process_unit(unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec, engine: str, parallel: bool) -> dict:
    """Write the unit's shards, then its record; returns the record.

    If the engine differs from the reference on a checked document, the unit is made again with the
    reference, and the record's `engine_problem` says why.
    """
    problem = None
    try:
        record = _make_shards(unit, config, tokenizer, engine_of(engine, tokenizer, parallel))
    except EngineMismatch as mismatch:
        problem = str(mismatch)
        record = _make_shards(unit, config, tokenizer, engine_of(tokenizing.Reference.name, tokenizer))
    record["engine_problem"] = problem
    write_atomically(record_path(Path(config.output_dir), unit), json.dumps(record).encode())
    return record


def _make_shards(unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec, engine: Engine) -> dict:
    """Write the unit's shards; returns its record."""
    directory = Path(config.output_dir)
    builder = UnitBuilder(unit, config, tokenizer, engine)
    tally = Tally()
    found = documents.of_unit(unit, config, tokenizer, tally)
    if config.deduplicate == "exact":
        found = deduplication.drop_duplicates(found, directory, unit, tally)
    counts = builder.counts
    try:
        for batch in batches(found):
            if not isinstance(batch, list):
                builder.add_long(batch)
            elif isinstance(batch[0], TokenizedText):
                builder.add_tokens(batch)
            else:
                builder.add_batch(batch)
        if counts["documents"] + tally.bad.total() >= MIN_DOCUMENTS_TO_REJECT:
            check_reject_rate(tally.bad, counts["documents"], config.max_bad_fraction, unit.source)
        written = {name: [asdict(shard) for shard in split.finish()] for name, split in builder.splits.items()}
    except BaseException:
        for split in builder.splits.values():
            split.abandon()
        raise
    if counts["no tokens"]:
        tally.filtered["no tokens"] += counts["no tokens"]
    return {
        **{name: counts[name] for name in ("documents", "characters", "bytes", "tokens")},
        "bad": dict(sorted(tally.bad.items())),
        "filtered": dict(sorted(tally.filtered.items())),
        "damaged": tally.damaged,
        "remainder": sum(split.packer.pending_tokens for split in builder.splits.values()),  # dropped
        "padding": sum(split.padding for split in builder.splits.values()),
        "engine": "imported" if documents.has_ids(unit, config) else f"{engine.name} {engine.version}",
        **written,
    }


def check_reject_rate(bad: Counter, good: int, max_bad_fraction: float, source: str) -> None:
    """Raise UserError if too large a share of the documents is unusable."""
    count = bad.total()
    if count > max_bad_fraction * (count + good):
        raise UserError(
            f"source {source}: {count:,} of {count + good:,} documents cannot be used ({dict(sorted(bad.items()))}), "
            f"more than max_bad_fraction={max_bad_fraction:g}; repair the input or raise max_bad_fraction"
        )
