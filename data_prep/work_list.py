"""Sources to units of work: which files there are, and how they are cut into pieces for the workers.

In: the configuration's sources. Out: `units(...)`, a list that depends on the files and `unit_mb` alone.

A path is local or a URL of any file system that fsspec knows (`s3://`, `hf://datasets/...`): a file, a
glob, a folder (all files of known kinds in it), or `@LIST`, a text file with one path a line. Plain JSONL
is cut into byte ranges, so that one large file becomes many units; a line belongs to the unit in which it
starts. Other files are read whole, and small ones share a unit.
"""

import glob
import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from common.errors import UserError

from .config import SourceConfig

KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
NOT_DOCUMENTS = ("dataset_info.json", "state.json")  # what a saved Hugging Face dataset holds beside its data
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
    sizes = {path: _size_of(path) for path in files}
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


def kind(path: str) -> str:
    """'jsonl', 'txt', 'parquet' or 'arrow', by the file's name without .gz or .zst. Raises UserError for others."""
    plain = path.removesuffix(".gz").removesuffix(".zst")
    found = KINDS.get(os.path.splitext(plain)[1])
    if found is None:
        raise UserError(f"{path}: unknown kind of file; expected {' '.join(KINDS)}, text kinds also with .gz or .zst")
    if found in ("parquet", "arrow") and plain != path:
        raise UserError(f"{path}: {found} files compress inside; decompress it first")
    return found


def open_file(path: str) -> BinaryIO:
    """A seekable binary file, local or remote."""
    system, plain = _file_system(path)
    return system.open(plain, "rb")


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path on it."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise UserError(f"{path}: {error}") from None


def _size_of(path: str) -> int:
    system, plain = _file_system(path)
    return system.size(plain)


def _is_file(path: str) -> bool:
    system, plain = _file_system(path)
    return not path.endswith("/") and system.isfile(plain)


def expand(source: SourceConfig) -> list[str]:
    """The files of a source, in order. Raises UserError for a path that gives none, or a file named twice."""
    files: list[str] = []
    for path in source.paths:
        if path.startswith("@"):
            if not os.path.isfile(path[1:]):
                raise UserError(f"source {source.name}: no file list at {path[1:]}")
            lines = Path(path[1:]).read_text(encoding="utf-8").splitlines()
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            missing = next((name for name in found if not _is_file(name)), None)
        else:
            found = _matches(path)
            missing = None
        if missing or not found:
            raise UserError(f"source {source.name}: no file matches {missing or path!r}")
        files += found
    if len(set(files)) != len(files):
        twice = next(p for p in files if files.count(p) > 1)
        raise UserError(f"source {source.name}: {twice} is named twice in paths")
    return files


def _matches(path: str) -> list[str]:
    """The files that a path names, sorted. A relative path gives relative paths, a URL gives URLs."""
    system, plain = _file_system(path)
    is_url = "://" in path
    if is_url and glob.has_magic(path):
        found = _files(system, system.glob(plain, detail=True))
    elif path and system.isdir(plain):
        found = [name for name in _files(system, system.find(plain, detail=True)) if _is_known(name)]
        if not is_url:
            found = [str(Path(path, name.removeprefix(plain).lstrip("/"))) for name in found]
    elif glob.has_magic(path):
        # fsspec's own glob would also match hidden files, and not enter linked folders
        found = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    else:
        found = [plain if is_url else path] if path and _is_file(path) else []
    return sorted(system.unstrip_protocol(name) if is_url else name for name in found)


def _files(system: fsspec.AbstractFileSystem, listing: dict[str, dict]) -> list[str]:
    """What is a file in a listing with details, or a link to one; asks the file system again only about links."""
    return [name for name, about in listing.items() if about["type"] == "file" or system.isfile(name)]


def _is_known(path: str) -> bool:
    plain = path.removesuffix(".gz").removesuffix(".zst")
    return os.path.splitext(plain)[1] in KINDS and os.path.basename(path) not in NOT_DOCUMENTS


def _fingerprint(path: str, size: int) -> str:
    with open_file(path) as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return _sha(f"{os.path.basename(path)}\0{size}\0".encode() + head + file.read())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
