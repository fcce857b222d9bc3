"""Sources to units of work: which files there are, and how they are cut into pieces for the workers.

In: the configuration's sources. Out: `units(...)`, a list that depends on the files and `unit_mb` alone.

Plain JSONL is cut into byte ranges, so that one large file becomes many units; a line belongs to the unit in which it
starts. Other files are read whole, and small ones share a unit.
"""

import hashlib
import os
from dataclasses import asdict, dataclass

from .config import SourceConfig
from .inputs.files import open_file
from .inputs.listing import expand, kind, size_of

FINGERPRINT_BYTES = 1 << 16  # read at each end of a file


@dataclass(frozen=True)
class Unit:
    """One piece of work: `files` of one source, or the byte range [start, end) of a single plain JSONL file."""

    source: str
    index: int  # position in the source's work list; names the shards
    files: tuple[str, ...]
    start: int  # bytes
    end: int  # bytes; -1: to the end
    size: int  # bytes on disk, for the progress bar
    fingerprint: str  # of the files' names, sizes, first and last 64 KiB


def unit_key(unit: Unit) -> dict:
    """What identifies the unit's input; the folder that it lies in may change."""
    return {**asdict(unit), "files": [os.path.basename(name) for name in unit.files]}


def units(source: SourceConfig, unit_bytes: int) -> list[Unit]:
    """The work list of one source.

    Raises UserError when a path matches nothing or is of an unknown kind.
    """
    files = expand(source)
    sizes = {path: size_of(path) for path in files}
    pieces: list[tuple[list[str], int, int, int]] = []  # files, start, end, bytes
    for path in files:
        size = sizes[path]
        if kind(path) == "jsonl" and not path.endswith((".gz", ".zst")) and size > unit_bytes:
            for start in range(0, size, unit_bytes):
                end = min(start + unit_bytes, size)
                pieces.append(([path], start, end, end - start))
        elif pieces and pieces[-1][2] == -1 and pieces[-1][3] + size <= unit_bytes:
            names, _, _, total = pieces[-1]
            pieces[-1] = ([*names, path], 0, -1, total + size)
        else:
            pieces.append(([path], 0, -1, size))
    prints = {path: _fingerprint(path, sizes[path]) for path in files}
    return [
        Unit(source.name, index, tuple(names), start, end, size, _sha("".join(prints[name] for name in names).encode()))
        for index, (names, start, end, size) in enumerate(pieces)
    ]


def _fingerprint(path: str, size: int) -> str:
    with open_file(path) as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return _sha(f"{os.path.basename(path)}\0{size}\0".encode() + head + file.read())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
