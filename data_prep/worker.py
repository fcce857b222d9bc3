"""One unit of work: read → tokenize → pack → write shards, then a record of what was made.

Runs in a worker process; what it writes depends on the unit and the settings alone. While it makes a unit it holds the
unit's lock. Its files in DIR/.work are SOURCE-INDEX.json (the record), SOURCE-INDEX.lock, and for all units together
`reference_only`: why the fast engine is not used any more.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError, without_passwords
from common.files import write_atomically

from . import deduplication, documents, engines, shards, tokenizing
from .config import PrepareConfig
from .engines import Engine
from .inputs.document import Document, Tally, TokenizedText
from .inputs.listing import check_unchanged
from .locks import unit_lock
from .pool import end_if_orphan
from .retrying import with_retries
from .tokenizing import TokenizerSpec
from .unit_builder import NO_CUT, EngineMismatch, UnitBuilder, batches, engine_of
from .work_list import Unit


def record_path(directory: Path, unit: Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.json"


def read_record(directory: Path, unit: Unit) -> dict | None:
    """What was made of the unit, None where it is not made yet."""
    try:
        return json.loads(record_path(directory, unit).read_bytes())
    except FileNotFoundError:
        return None


def reference_only(directory: Path) -> str | None:
    """Why the fast engine is not used any more, in none of the tasks; None where nothing is against it."""
    try:
        return (directory / ".work" / "reference_only").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def is_made(directory: Path, unit: Unit) -> bool:
    """Whether the unit has a record that stays: not one of an engine that gave wrong ids elsewhere."""
    if reference_only(directory) is None:
        return record_path(directory, unit).exists()
    record = read_record(directory, unit)
    return record is not None and _is_exact(record)


def _is_exact(record: dict) -> bool:
    """Whether its ids are the reference's whatever the fast engine does elsewhere."""
    return record["engine"].split()[0] != engines.Gigatoken.name


def fits(record: dict, max_tokens: int) -> bool:
    """Whether a unit that may have `max_tokens` (0: any number) would be made just as it is."""
    if record["cut"]:
        return record["max_tokens"] == max_tokens
    return not max_tokens or record["tokens"] <= max_tokens


def process_unit(
    unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec, engine: str, parallel: bool, max_tokens: int = 0
) -> dict:
    """Write the unit's shards, then its record; returns the record, also one that another process made meanwhile.

    Documents are read until one does not fit `max_tokens` (0: all). If the fast engine differs from the reference on a
    checked document, that is noted for all tasks, and the unit is made with the reference. Raises ReadFailed for files
    that cannot be read, after config.read_retries more attempts, and UserError for files that are gone, changed or,
    more of them than max_damaged_files, damaged; nothing of the unit stays then.
    """
    directory = Path(config.output_dir)
    with unit_lock(directory, unit) as has_begun:
        end_if_orphan()
        record = read_record(directory, unit)
        use_reference = reference_only(directory) is not None
        if record and fits(record, max_tokens) and (_is_exact(record) or not use_reference):
            return record
        if has_begun:
            remove_shards(directory, unit)
        name = tokenizing.Reference.name if use_reference else engine

        def make() -> dict:
            return _make_shards(unit, config, tokenizer, engine_of(name, tokenizer, parallel), max_tokens)

        what = f"making {unit.source} unit {unit.index}"
        try:
            record = with_retries(make, config.read_retries, what)
        except EngineMismatch as mismatch:
            reason = f"{mismatch} ({unit.source} unit {unit.index})"
            write_atomically(directory / ".work" / "reference_only", reason.encode())
            name = tokenizing.Reference.name
            record = with_retries(make, config.read_retries, what)
        write_atomically(record_path(directory, unit), json.dumps(record).encode())
        return record


def _make_shards(unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec, engine: Engine, max_tokens: int) -> dict:
    """Write the unit's shards; returns its record."""
    directory = Path(config.output_dir)
    check_unchanged(unit.files)
    builder = UnitBuilder(unit, config, tokenizer, engine, max_tokens)
    tally = Tally()
    found = documents.of_unit(unit, config, tokenizer, tally)
    if config.deduplicate == "exact":
        found = deduplication.drop_duplicates(found, directory, unit, tally)
    marks: list[Tally] = []
    if max_tokens:
        found = _marked(found, tally, marks)
    counts = builder.counts
    try:
        for batch in batches(found):
            if not isinstance(batch, list):
                builder.add_long(batch)
            elif isinstance(batch[0], TokenizedText):
                builder.add_tokens(batch)
            else:
                builder.add_batch(batch)
            if builder.is_full:
                tally = marks[builder.taken]
                break
            _check_damaged(unit, tally, config)
        _check_damaged(unit, tally, config)
        check_unchanged(unit.files)  # while they were read, too
        written = {name: [asdict(shard) for shard in split.finish()] for name, split in builder.splits.items()}
    except BaseException:
        for split in builder.splits.values():
            split.abandon()
        remove_shards(directory, unit)
        raise
    if counts[NO_CUT]:
        tally.bad[NO_CUT] += counts[NO_CUT]
    if counts["no tokens"]:
        tally.filtered["no tokens"] += counts["no tokens"]
    return {
        **{name: counts[name] for name in ("documents", "characters", "bytes", "tokens")},
        "bad": dict(sorted(tally.bad.items())),
        "filtered": dict(sorted(tally.filtered.items())),
        "damaged": tally.damaged,
        "special_tokens": dict(sorted(builder.special_tokens.items())),
        "remainder": sum(split.packer.pending_tokens for split in builder.splits.values()),  # dropped
        "padding": sum(split.padding for split in builder.splits.values()),
        "engine": "imported" if documents.has_ids(unit, config) else f"{engine.name} {engine.version}",
        "max_tokens": max_tokens,
        "cut": builder.is_full,
        **written,
    }


def _marked(found: Iterator[Document], tally: Tally, marks: list[Tally]) -> Iterator[Document]:
    """The documents; `marks` gets the tally as it stands at each, as they are read ahead of a limit."""
    now: tuple = ()
    for document in found:
        before, now = now, (tally.bad.total(), tally.filtered.total(), len(tally.damaged))
        marks.append(marks[-1] if before == now else deepcopy(tally))
        yield document


def remove_shards(directory: Path, unit: Unit) -> None:
    """Remove all shard files of the unit, also unfinished ones."""
    for split in shards.SPLITS:
        for path in (directory / unit.source).glob(f"{split}-{unit.index:05d}-*.arrow*"):
            path.unlink(missing_ok=True)


def _check_damaged(unit: Unit, tally: Tally, config: PrepareConfig) -> None:
    if len(tally.damaged) > config.max_damaged_files:
        check_unchanged(unit.files)  # a file that is being written looks damaged
        raise too_many_damaged(unit.source, tally.damaged, config.max_damaged_files)


def too_many_damaged(source: str, damaged: list[str], limit: int) -> UserError:
    """The error for a source with more damaged files than max_damaged_files."""
    return UserError(
        f"source {source}: {len(damaged)} damaged or cut off, more than max_damaged_files={limit}: {damaged[0]}; "
        "get whole files and another output_dir, or raise max_damaged_files to use what can be read"
    )


def damaged_files(unit: Unit, damaged: list[str]) -> dict[str, str]:
    """The damaged files of a unit's record: path and the line that names it and the reason."""
    names = sorted({without_passwords(file.path) for file in unit.files}, key=len, reverse=True)
    return {next((name for name in names if line.startswith(f"{name}: ")), line): line for line in damaged}
