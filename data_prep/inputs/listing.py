"""The files that a source's paths name.

A path is local or a URL of any file system that fsspec knows (`s3://`, `hf://datasets/...`): a file, a
glob, a folder (all files of known kinds in it), or `@LIST`, a text file with one path a line.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from common.errors import UserError

from ..config import SourceConfig
from .files import file_system

KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
NOT_DOCUMENTS = ("dataset_info.json", "state.json")  # what a saved Hugging Face dataset holds beside its data


def kind(path: str) -> str:
    """'jsonl', 'txt', 'parquet' or 'arrow', by the file's name without .gz or .zst. Raises UserError for others."""
    plain = path.removesuffix(".gz").removesuffix(".zst")
    found = KINDS.get(os.path.splitext(plain)[1])
    if found is None:
        raise UserError(f"{path}: unknown kind of file; expected {' '.join(KINDS)}, text kinds also with .gz or .zst")
    if found in ("parquet", "arrow") and plain != path:
        raise UserError(f"{path}: {found} files compress inside; decompress it first")
    return found


@dataclass(frozen=True)
class InputFile:
    path: str  # or URL
    size: int  # bytes
    stamp: str  # its ETag, else the time of its last change: another one after it was written again


def look_at(path: str) -> InputFile:
    """A file with its size and stamp."""
    system, plain = file_system(path)
    about = system.info(plain)
    stamp = about.get("ETag") or about.get("etag")
    if not stamp and isinstance(system, LocalFileSystem):
        stamp = os.stat(plain).st_mtime_ns
    return InputFile(path, about["size"], str(stamp or about.get("mtime") or about.get("LastModified") or ""))


def _is_file(path: str) -> bool:
    system, plain = file_system(path)
    return not path.endswith("/") and system.isfile(plain)


def expand(source: SourceConfig) -> list[list[str]]:
    """The files of each entry of a source's paths, in order.

    Raises UserError for a path that gives none, or a file named twice.
    """
    files: list[list[str]] = []
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
        files.append(found)
    twice = [path for path, count in Counter(chain(*files)).items() if count > 1]
    if twice:
        raise UserError(f"source {source.name}: {twice[0]} is named twice in paths")
    return files


def _matches(path: str) -> list[str]:
    """The files that a path names, sorted. A relative path gives relative paths, a URL gives URLs."""
    system, plain = file_system(path)
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


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raise UserError, naming the file, where one has another size or stamp than when it was listed."""
    for file in files:
        found = look_at(file.path)
        if found != file:
            raise UserError(
                f"{file.path} was written again since the work list was made ({file.size} bytes, stamp {file.stamp}; "
                f"now {found.size} bytes, stamp {found.stamp}): its corpus would mix two versions"
            )
