"""The files that a source's paths name, with their sizes and stamps.

A path is local or a URL of any file system that fsspec knows (`s3://`, `hf://datasets/...`): a file, a glob, a folder
(all files of known kinds in it, and in folders that it links to), or `@LIST`, a text file with one path a line.
What a folder holds beside its documents is counted by suffix.
"""

import glob
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from common.errors import UserError
from common.log import log

from ..config import SourceConfig
from .files import ReadFailed, file_system, open_file
from .kinds import index_of, kind, select, shorten

THREADS = 32  # that ask file systems about files
MOST_A_TASK = 256  # files that a thread asks about before it takes others
STAMPS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "Last-Modified", "created")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class InputFile:
    path: str  # or URL
    size: int  # bytes
    stamp: str  # its ETag, else the time of its last change: another one after it was written again; "": unknown


@dataclass(frozen=True)
class Listing:
    """What a source's paths name."""

    groups: list[list[InputFile]]  # of each entry of paths, in order
    ignored: dict[str, int]  # files in its folders that are no documents, by suffix or pattern


@dataclass(frozen=True)
class _Found:
    """A file before it was looked at."""

    path: str
    real: str  # the same for all names of one file: without links, a URL in its plainest form
    file: InputFile | None = None  # where the listing of its folder said enough


def look_at(path: str) -> InputFile:
    """A file with its size and stamp, asked of its file system now. The stamp covers a token file's index too.

    Raises FileNotFoundError where there is none, ReadFailed when the file system does not answer.
    """
    size, stamp = _size_and_stamp(path)
    index = index_of(path)
    if index:
        try:
            stamp = f"{stamp} {_size_and_stamp(index)[1]}"
        except FileNotFoundError:
            raise UserError(f"{path}: its index {posixpath.basename(index)} is not beside it") from None
    return InputFile(path, size, stamp)


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raise UserError, naming the file, where one is gone, or has another size or stamp than when it was listed."""
    files = list(files)
    _forget_listings(file.path for file in files)
    for file in files:
        try:
            found = look_at(file.path)
        except FileNotFoundError:
            raise UserError(f"{file.path} is gone; it was there when the work list was made") from None
        if found != file:
            raise UserError(
                f"{file.path} was written again since the work list was made ({file.size} bytes, stamp {file.stamp}; "
                f"now {found.size} bytes, stamp {found.stamp}): its corpus would mix two versions"
            )


def list_files(source: SourceConfig) -> Listing:
    """The files of a source, in the order of its paths and sorted within an entry; the order of threads is not seen.

    Raises UserError for a path that gives none, a file of unknown kind, or one that two names stand for.
    """
    try:
        _forget_listings(source.paths)
        entries = in_threads(_entry, source.paths, "list paths")
    except UserError as error:
        raise UserError(f"source {source.name}: {error}") from None
    for path, (found, ignored) in zip(source.paths, entries):
        if not found:
            others = ", ".join(f"{count} {suffix}" for suffix, count in shorten(ignored).items())
            raise UserError(
                f"source {source.name}: no file matches {path!r}" + (f" (it holds {others})" if others else "")
            )
        for file in found:
            kind(file.path)
    _check_twice(source.name, [file for found, _ in entries for file in found])

    def look(found: _Found) -> InputFile:
        try:
            return found.file or look_at(found.path)
        except FileNotFoundError:
            raise UserError(f"source {source.name}: no file matches {found.path!r}") from None

    looked = iter(in_threads(look, [file for found, _ in entries for file in found], "list files"))
    groups = [[next(looked) for _ in found] for found, _ in entries]
    unknown = sum(not file.stamp for group in groups for file in group)
    if unknown:
        log.warning(
            "source %s: of %d files there is neither ETag nor time; when one is written again with the same size, "
            "nothing will notice", source.name, unknown,
        )  # fmt: skip
    return Listing(groups, shorten(sum((ignored for _, ignored in entries), Counter())))


def in_threads(function: Callable[[Item], Result], items: list[Item], title: str) -> list[Result]:
    """The function's results, in the order of the items, under a progress bar where that takes seconds.

    Raises the error of the first item that has one.
    """
    size = max(1, min(MOST_A_TASK, len(items) // (4 * THREADS)))  # a task in a pool costs more than a local stat
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    results: list[Result] = []
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(items), desc=title, unit="file", delay=2, disable=None, dynamic_ncols=True) as bar,
    ):
        try:
            for part in pool.map(lambda part: [function(item) for item in part], parts):
                results += part
                bar.update(len(part))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _check_twice(source: str, files: list[_Found]) -> None:
    names: dict[str, str] = {}
    for file in files:
        if file.real in names:
            first = names[file.real]
            other = "" if first == file.path else f", also as {file.path}: they are one file"
            raise UserError(f"source {source}: {first} is named twice in paths{other}")
        names[file.real] = file.path


def _entry(path: str) -> tuple[list[_Found], Counter]:
    """The files of one entry of `paths`, and what was ignored; no files where it matches nothing."""
    if path.startswith("@"):
        if not os.path.isfile(path[1:]):
            raise UserError(f"no file list at {path[1:]}")
        lines = Path(path[1:]).read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        return in_threads(lambda name: _Found(name, _real(name)), names, "list files"), Counter()
    if not path:
        return [], Counter()
    return _remote(path) if _is_remote(path) else _local(path)


def _local(path: str) -> tuple[list[_Found], Counter]:
    """Of a path without or with `file://`: a relative path gives relative paths, a URL gives URLs."""
    plain, prefix = (file_system(path)[1], "file://") if "://" in path else (path, "")
    if os.path.isdir(plain):
        found, ignored = _walk(str(Path(plain)))
        kept, others = _select(list(found), lambda name: name)
        ignored.update(others.values())
    elif os.path.isfile(plain):  # also one whose name looks like a pattern; nothing, where a slash follows it
        return [_Found(path, os.path.realpath(plain))], Counter()
    else:
        # fsspec's own glob would also match hidden files, and not enter linked folders
        names = glob.glob(plain, recursive=True) if glob.has_magic(plain) else []
        found = {name: _real(name) for name in names if os.path.isfile(name)}
        kept, ignored = _of_pattern(list(found), lambda name: name)
    files: dict[str, str] = {}  # real path → the name that is no link, else the first
    for name in sorted(kept, key=lambda name: (os.path.islink(name), name)):
        files.setdefault(found[name], name)
    if len(files) < len(kept):
        ignored["link to a file that is listed already"] = len(kept) - len(files)
    return [_Found(prefix + name, found[name]) for name in sorted(files.values())], ignored


def _of_pattern(names: list[str], url: Callable[[str], str]) -> tuple[list[str], Counter]:
    """All that the pattern matched, whatever its kind, but what belongs to other files or repeats them."""
    kept, others = _select(names, url)
    repeated = {name: reason for name, reason in others.items() if name.lower().endswith(".arrow")}
    return kept + [name for name in others if name not in repeated], Counter(repeated.values())


def _select(names: list[str], url: Callable[[str], str]) -> tuple[list[str], dict[str, str]]:
    """`select` of what a folder or pattern gave. Raises UserError for a DatasetDict or half a dataset."""
    for name in sorted(names):
        folder, base = posixpath.split(name)
        if base == "dataset_dict.json":
            content = _read_json(url(name))
            splits = content.get("splits") if isinstance(content, dict) else None
            first = splits[0] if splits else "train"
            raise UserError(
                f"{url(folder) or '.'} holds a DatasetDict, of the splits {', '.join(splits or ['unknown'])}; "
                f"give the one that is meant, such as paths: [{posixpath.join(url(folder), first)}]"
            )
    return select(names, lambda folder: _listed_in_state(url(folder)))


def _remote(path: str) -> tuple[list[_Found], Counter]:
    system, plain = file_system(path)
    about = _about(system, plain)
    is_http = _is_http(system)  # where every folder is a file too, a page of links
    if about and about["type"] == "file" and not (is_http and path.endswith("/")):
        return ([] if path.endswith("/") else [_Found(path, _real(path), _input_file(path, about))]), Counter()
    if about:
        found = {name: info for name, info in system.find(plain, detail=True).items() if _is_file(system, name, info)}
        kept, others = _select(list(found), system.unstrip_protocol)
        ignored = Counter(others.values())
    else:
        matches = system.glob(plain, detail=True) if glob.has_magic(path) else {}
        found = {name: info for name, info in matches.items() if _is_file(system, name, info)}
        kept, ignored = _of_pattern(list(found), system.unstrip_protocol)
    urls = {name: system.unstrip_protocol(name) for name in sorted(kept)}
    files = [_Found(url, _real(url), _input_file(url, found[name])) for name, url in urls.items()]
    return files, ignored


def _walk(folder: str) -> tuple[dict[str, str], Counter]:
    """({path: real path} of all files below a local folder, what was ignored).

    Links are followed, but a folder is entered once. Raises ReadFailed for a folder that cannot be listed.
    """
    files: dict[str, str] = {}
    ignored: Counter = Counter()
    seen: set[str] = set()
    folders = [folder]
    linked: list[str] = []  # folders too
    while folders or linked:
        is_link = not folders
        path = linked.pop(0) if is_link else folders.pop()
        real = os.path.realpath(path)
        if real in seen:
            ignored["link to a folder that is listed already"] += is_link
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise ReadFailed(path, error) from error
        for entry in entries:
            name = os.path.join(path, entry.name) if path != "." else entry.name
            if entry.is_dir():
                (linked if entry.is_symlink() else folders).append(name)
            elif not entry.is_file():
                ignored["broken link" if entry.is_symlink() else "no regular file"] += 1
            else:
                files[name] = os.path.realpath(name) if entry.is_symlink() else os.path.join(real, entry.name)
    return files, +ignored


def _about(system: fsspec.AbstractFileSystem, plain: str) -> dict[str, Any] | None:
    """What a remote file system says of a file or folder, None where there is none. Raises ReadFailed."""
    try:
        return system.info(plain)
    except FileNotFoundError as error:
        # over HTTP, fsspec says so of whatever goes wrong
        if _is_http(system) and getattr(error.__cause__, "status", None) not in (404, 410):
            raise ReadFailed(plain, error.__cause__ or error) from error
        return None
    except OSError as error:
        raise ReadFailed(plain, error) from error


def _size_and_stamp(path: str) -> tuple[int, str]:
    if not _is_remote(path):
        plain = file_system(path)[1] if "://" in path else path
        try:
            found = os.stat(plain)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except OSError as error:
            raise ReadFailed(path, error) from error
        return found.st_size, str(found.st_mtime_ns)
    about = _about(*file_system(path))
    if about is None or about["type"] != "file":
        raise FileNotFoundError(path)
    if about["size"] is None:
        raise UserError(f"{path}: the server does not say how large it is; download it first")
    return about["size"], _stamp(about)


def _stamp(about: dict[str, Any]) -> str:
    found = next((str(about[name]) for name in STAMPS if about.get(name)), "")
    return found.removeprefix("W/").strip('"')


def _input_file(path: str, about: dict[str, Any]) -> InputFile | None:
    """What the listing of a folder says of a file, None where it does not say enough."""
    if about.get("size") is None or index_of(path):
        return None
    return InputFile(path, about["size"], _stamp(about))


def _is_file(system: fsspec.AbstractFileSystem, name: str, about: dict[str, Any]) -> bool:
    return about["type"] == "file" or (about["type"] != "directory" and system.isfile(name))


def _is_remote(path: str) -> bool:
    return "://" in path and not isinstance(file_system(path)[0], LocalFileSystem)


def _is_http(system: fsspec.AbstractFileSystem) -> bool:
    return "http" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def _real(path: str) -> str:
    """One name for all names of a file."""
    if not _is_remote(path):
        return os.path.realpath(file_system(path)[1] if "://" in path else path)
    system, plain = file_system(path)
    url = system.unstrip_protocol(plain)
    if not _is_http(system):
        return url
    parts = urlsplit(url)
    port = {"http": ":80", "https": ":443"}[parts.scheme]
    return parts._replace(
        netloc=parts.netloc.lower().removesuffix(port), path=posixpath.normpath(unquote(parts.path)), fragment=""
    ).geturl()


def _forget_listings(paths: Iterable[str]) -> None:
    """Make remote file systems answer anew: some keep the listings of folders."""
    for system in {id(system): system for system in (file_system(path)[0] for path in paths if "://" in path)}.values():
        system.invalidate_cache()


def _listed_in_state(folder: str) -> set[str] | None:
    """The data files of a saved Hugging Face dataset, None where its state.json does not list them."""
    content = _read_json(posixpath.join(folder, "state.json"))
    files = content.get("_data_files") if isinstance(content, dict) else None
    return {file["filename"] for file in files} if isinstance(files, list) else None


def _read_json(path: str) -> Any:
    """The content of a small file, None where it is not JSON."""
    try:
        with open_file(path) as file:
            return json.load(file)
    except ValueError:
        return None
    except OSError as error:
        raise ReadFailed(path, error) from error
