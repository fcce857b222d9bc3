"""Sources to units of work: which files there are, and how they are cut into pieces for the workers.

In: the configuration's sources. Out: `units(...)`, a list that depends on the files and `unit_mb` alone.

Plain JSONL is cut into byte ranges, so that one large file becomes many units; a line belongs to the unit in which it
starts. Other files are read whole, and small ones share a unit.
"""

import os
from dataclasses import asdict, dataclass

from .config import SourceConfig
from .inputs.listing import InputFile, expand, kind, look_at

AUTOMATIC_UNITS = 256  # a source has about so many units with unit_mb=0 ...
SMALLEST_UNIT, LARGEST_UNIT = 16 << 20, 1 << 30  # ... within these bytes


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


def unit_key(unit: Unit) -> dict:
    """What identifies the unit's input; the folder that it lies in may change, and so may its files' times."""
    return {**asdict(unit), "files": [[os.path.basename(file.path), file.size] for file in unit.files]}


def units(source: SourceConfig, unit_bytes: int) -> list[Unit]:
    """The work list of one source; `unit_bytes` 0 chooses a size.

    Small files that one entry of `paths` names share a unit. Every entry begins a new one, so that more entries
    leave the units of the others as they are. Raises UserError when a path matches nothing or is of an unknown kind.
    """
    groups = [[look_at(path) for path in paths] for paths in expand(source)]
    total = sum(file.size for group in groups for file in group)
    unit_bytes = unit_bytes or min(LARGEST_UNIT, max(SMALLEST_UNIT, total // AUTOMATIC_UNITS))
    pieces: list[tuple[list[InputFile], int, int, int]] = []  # files, start, end, bytes
    for group in groups:
        first = len(pieces)
        for file in group:
            if kind(file.path) == "jsonl" and not file.path.endswith((".gz", ".zst")) and file.size > unit_bytes:
                for start in range(0, file.size, unit_bytes):
                    end = min(start + unit_bytes, file.size)
                    pieces.append(([file], start, end, end - start))
            elif len(pieces) > first and pieces[-1][2] == -1 and pieces[-1][3] + file.size <= unit_bytes:
                files, _, _, size = pieces[-1]
                pieces[-1] = ([*files, file], 0, -1, size + file.size)
            else:
                pieces.append(([file], 0, -1, file.size))
    return [
        Unit(source.name, index, tuple(files), start, end, size)
        for index, (files, start, end, size) in enumerate(pieces)
    ]
