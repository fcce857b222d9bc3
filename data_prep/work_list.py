"""Sources to units of work: which files there are, and how they are cut into pieces for the workers.

In: the configuration's sources. Out: a `WorkList`, whose units depend on the files and `unit_mb` alone. It is made once
for a corpus and saved, so that every task has the same units and starts without listing the files again.

Large files that can be read from the middle are cut, so that one becomes many units: plain JSONL into byte ranges (a
line belongs to the unit in which it starts), Parquet into ranges of row groups, token files into ranges of documents.
Other files are read whole, and small ones share a unit.
"""

import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import write_atomically

from .config import SourceConfig
from .inputs.files import ReadFailed, file_system
from .inputs.kinds import is_compressed, kind
from .inputs.listing import InputFile, Listing, in_threads, list_files

AUTOMATIC_UNITS = 256  # a source has about so many units with unit_mb=0 ...
SMALLEST_UNIT, LARGEST_UNIT = 16 << 20, 1 << 30  # ... within these bytes
FORMAT = "diffullama-work-list"
VERSION = 1
FOOTER_BYTES = 1 << 16  # of a Parquet file's end, read first: mostly they hold its footer


@dataclass(frozen=True)
class Unit:
    """One piece of work: `files` of one source, or the part [start, end) of a single file.

    A part is a range of bytes of plain JSONL, of row groups of Parquet, of documents of a token file.
    """

    source: str
    index: int  # position in the source's work list; names the shards
    files: tuple[InputFile, ...]
    start: int
    end: int  # -1: to the end
    size: int  # bytes on disk, for the progress bar


@dataclass(frozen=True)
class SourceList:
    """The units of one source, and from what they were made."""

    name: str
    paths: list[str]  # as the configuration gives them
    settings: dict[str, Any]  # that decide what is read
    ignored: dict[str, int]  # files in its folders that are no documents, by suffix
    units: list[Unit]

    def files(self) -> list[InputFile]:
        """Each once, in order."""
        return list(dict.fromkeys(file for unit in self.units for file in unit.files))


@dataclass(frozen=True)
class WorkList:
    """The units of all sources."""

    settings: dict[str, Any]  # of the configuration, that decide the bytes of the corpus
    sources: list[SourceList]

    @property
    def units(self) -> list[Unit]:
        return [unit for source in self.sources for unit in source.units]

    def corpus_hash(self) -> str:
        """Of all that decides the corpus: the settings, and the names and sizes of the files. No times, no folder."""
        sources = [[s.name, s.settings, [unit_key(unit) for unit in s.units]] for s in self.sources]
        content = json.dumps([self.settings, sources], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: Path) -> None:
        sources = [
            {
                "name": source.name,
                "paths": source.paths,
                "settings": source.settings,
                "ignored": source.ignored,
                "first": source.units[0].index if source.units else 0,
                "units": [
                    [unit.start, unit.end, unit.size, [[file.path, file.size, file.stamp] for file in unit.files]]
                    for unit in source.units
                ],
            }
            for source in self.sources
        ]
        content = {"format": FORMAT, "version": VERSION, "settings": self.settings, "sources": sources}
        path.parent.mkdir(parents=True, exist_ok=True)
        # not with orjson, which refuses names of files that are not UTF-8
        write_atomically(path, json.dumps(content, separators=(",", ":")).encode())


def load(path: Path, cure: str = "delete it, and the next run makes it again") -> WorkList:
    """A saved work list. Raises UserError, which ends with the cure, where there is none."""
    try:
        content = json.loads(path.read_bytes())
        found = content["format"], content["version"]
        if found != (FORMAT, VERSION):
            raise UserError(f"{path}: found format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} {VERSION}")
        sources = []
        for source in content["sources"]:
            first = source.pop("first")
            units = [
                Unit(source["name"], index, tuple(InputFile(*file) for file in files), start, end, size)
                for index, (start, end, size, files) in enumerate(source["units"], first)
            ]
            sources.append(SourceList(**{**source, "units": units}))
        return WorkList(content["settings"], sources)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {cure}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no work list ({error}); {cure}") from None


def limited_last(work: WorkList) -> WorkList:
    """The sources with max_tokens behind the others, for the choice of duplicates.

    Of equal documents the first stays, and one beyond its source's max_tokens must not drop another source's.
    """
    return replace(work, sources=sorted(work.sources, key=lambda source: bool(source.settings["max_tokens"])))


def join(parts: list[WorkList]) -> WorkList:
    """The list of a corpus that was made in parts. A source that a later part adds to has the units of both, and the
    paths and ignored files of the later one, which were listed as a whole again."""
    sources: dict[str, SourceList] = {}
    for source in (source for part in parts for source in part.sources):
        if source.name in sources:
            source = replace(source, units=sources[source.name].units + source.units)
        sources[source.name] = source
    return WorkList(parts[0].settings, list(sources.values()))


def ignored_text(ignored: dict[str, int]) -> str:
    """How many files of which suffix: `3 .md, 1 .csv`."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.items())


def first_change(then: list[InputFile], now: list[InputFile]) -> tuple[str, InputFile] | None:
    """The first file that 'was written again', 'was removed' or 'was added', in this order of weight; None if all are
    the same. Files are the same by name, size and stamp, in whatever folder."""
    removed = Counter(map(_identity, then)) - Counter(map(_identity, now))
    added = Counter(map(_identity, now)) - Counter(map(_identity, then))
    names = {name for name, _, _ in added}
    gone = [file for file in then if _identity(file) in removed]
    for file in gone:
        if os.path.basename(file.path) in names:
            return "was written again", file
    if gone:
        return "was removed", gone[0]
    return next((("was added", file) for file in now if _identity(file) in added), None)


def without(listing: Listing, known: list[InputFile]) -> Listing:
    """The files of a listing that are not among the known ones."""
    left = Counter(map(_identity, known))
    groups = []
    for group in listing.groups:
        groups.append([])
        for file in group:
            if left[_identity(file)]:
                left[_identity(file)] -= 1
            else:
                groups[-1].append(file)
    return Listing(groups, listing.ignored)


def _identity(file: InputFile) -> tuple[str, int, str]:
    return os.path.basename(file.path), file.size, file.stamp


def unit_key(unit: Unit) -> list[Any]:
    """What identifies the unit's input; the folder that it lies in may change, and so may its files' times."""
    files = [[os.path.basename(file.path), file.size] for file in unit.files]
    return [unit.source, unit.index, files, unit.start, unit.end, unit.size]


def units(source: SourceConfig, unit_bytes: int, listing: Listing | None = None, first: int = 0) -> list[Unit]:
    """The units of one source, numbered from `first`; `unit_bytes` 0 chooses a size. Lists its files if not given.

    Small files that one entry of `paths` names share a unit. Every entry begins a new one, so that more entries
    leave the units of the others as they are. Raises UserError when a path matches nothing or is of an unknown kind.
    """
    groups = (listing or list_files(source)).groups
    unit_bytes = unit_bytes or _automatic(sum(file.size for group in groups for file in group))
    large = [file for group in groups for file in group if file.size > unit_bytes]
    ranges = dict(zip(large, in_threads(partial(_ranges, unit_bytes=unit_bytes), large, "cut large files")))
    pieces: list[tuple[list[InputFile], int, int, int]] = []  # files, start, end, bytes
    for group in groups:
        begin = len(pieces)
        for file in group:
            if file in ranges:
                pieces += [([file], *part) for part in ranges[file]]
            elif len(pieces) > begin and pieces[-1][2] == -1 and pieces[-1][3] + file.size <= unit_bytes:
                files, _, _, size = pieces[-1]
                files.append(file)
                pieces[-1] = (files, 0, -1, size + file.size)
            else:
                pieces.append(([file], 0, -1, file.size))
    return [
        Unit(source.name, index, tuple(files), start, end, size)
        for index, (files, start, end, size) in enumerate(pieces, first)
    ]


def _automatic(total: int) -> int:
    return min(LARGEST_UNIT, max(SMALLEST_UNIT, total // AUTOMATIC_UNITS))


def _ranges(file: InputFile, unit_bytes: int) -> list[tuple[int, int, int]]:
    """The (start, end, bytes) into which a file of more than `unit_bytes` is cut; (0, -1, its size) is all of it."""
    whole = [(0, -1, file.size)]
    found = kind(file.path)
    if found == "jsonl" and not is_compressed(file.path):
        starts = range(0, file.size, unit_bytes)
        return [(start, min(start + unit_bytes, file.size), min(unit_bytes, file.size - start)) for start in starts]
    if found == "parquet":
        sizes = _row_group_bytes(file)
    elif found in ("megatron", "datatrove"):
        from .inputs import tokens  # which reads units, as all readers do

        sizes = tokens.documents_in(file.path).astype(np.int64) * tokens.token_bytes(file.path)
    else:
        return whole
    parts = _cut(sizes, unit_bytes)
    return parts if len(parts) > 1 else whole


def _cut(sizes: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """Neighbours of the given sizes together, as many as stay within the limit: (start, end, sum). One is not cut."""
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    parts = []
    start = 0
    while start < len(sizes):
        end = max(start + 1, int(np.searchsorted(ends, ends[start] + limit, side="right")) - 1)
        parts.append((start, end, int(ends[end] - ends[start])))
        start = end
    return parts


def _row_group_bytes(file: InputFile) -> np.ndarray:
    """(row groups,) bytes on disk; none for a file whose footer is damaged: its reader will say so.

    Only the footer is read: fsspec would read 5 MB ahead. Raises ReadFailed.
    """
    system, plain = file_system(file.path)
    try:
        content = system.cat_file(plain, start=max(0, file.size - FOOTER_BYTES), end=file.size)
        needed = 8 + int.from_bytes(content[-8:-4], "little")
        if len(content) < needed <= file.size:
            content = system.cat_file(plain, start=file.size - needed, end=file.size)
    except OSError as error:
        raise ReadFailed(file.path, error) from error
    try:
        footer = pq.read_metadata(io.BytesIO(b"PAR1" + content))
    except (pa.ArrowException, OSError):  # of the content: it is in memory
        return np.zeros(0, np.int64)
    groups = (footer.row_group(i) for i in range(footer.num_row_groups))
    return np.array([sum(g.column(i).total_compressed_size for i in range(g.num_columns)) for g in groups], np.int64)
