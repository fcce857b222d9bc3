"""Documents out of files: the work list, and the texts of one unit of work.

In: the configuration's sources. Out: `units(...)`, a list that depends on the files alone, and
`read(unit, ...)`, the texts of one unit in file order. What cannot be used is counted by reason.

Plain JSONL is cut into byte ranges, so one large file is many units; a line belongs to the unit in
which it starts. A compressed file or a Parquet file is one unit. Text files are one document each.
"""

import glob
import gzip
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from .config import SourceConfig, UserError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".parquet")


@dataclass(frozen=True)
class Unit:
    """One piece of work: `files` of one source, or the byte range [start, end) of a single plain JSONL file."""

    source: str
    index: int  # position in the source's work list; names the shards
    text_field: str
    files: tuple[str, ...]
    start: int  # bytes
    end: int  # bytes; -1: to the end
    size: int  # bytes on disk, for the progress bar
    fingerprint: str  # of the files' names, sizes, first and last 64 KiB


def kind(path: str) -> str:
    """'jsonl', 'txt' or 'parquet' of a file name, looking through .gz and .zst. Raises UserError for others."""
    plain = path.removesuffix(".gz").removesuffix(".zst")
    for suffix in SUFFIXES:
        if plain.endswith(suffix):
            if suffix == ".parquet" and plain != path:
                raise UserError(f"{path}: Parquet compresses inside the file; decompress it first")
            return {".txt": "txt", ".parquet": "parquet"}.get(suffix, "jsonl")
    raise UserError(f"{path}: unknown kind of file; expected {' '.join(SUFFIXES)}, text kinds also with .gz or .zst")


def units(source: SourceConfig, unit_bytes: int) -> list[Unit]:
    """The work list of one source: a function of its files and `unit_bytes` alone.

    Raises UserError when a path matches nothing or is of an unknown kind.
    """
    files: list[str] = []
    for pattern in source.paths:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            raise UserError(f"source {source.name}: no file matches {pattern!r}")
        files += found
    if len(set(files)) != len(files):
        raise UserError(f"source {source.name}: a file is named twice in paths")
    pieces: list[tuple[tuple[str, ...], int, int, int]] = []  # files, start, end, bytes
    for path in files:
        size = os.path.getsize(path)
        if kind(path) == "txt":  # many small files share a unit
            if pieces and kind(pieces[-1][0][0]) == "txt" and pieces[-1][3] + size <= unit_bytes:
                names, start, end, total = pieces[-1]
                pieces[-1] = ((*names, path), start, end, total + size)
            else:
                pieces.append(((path,), 0, -1, size))
        elif kind(path) == "jsonl" and path.endswith((".jsonl", ".json", ".ndjson")) and size > unit_bytes:
            starts = range(0, size, unit_bytes)
            pieces += [
                ((path,), start, min(start + unit_bytes, size), min(unit_bytes, size - start)) for start in starts
            ]
        else:
            pieces.append(((path,), 0, -1, size))
    fingerprints = {path: _file_fingerprint(path) for path in files}
    return [
        Unit(
            source.name,
            index,
            source.text_field,
            names,
            start,
            end,
            size,
            hashlib.sha256("".join(fingerprints[name] for name in names).encode()).hexdigest(),
        )
        for index, (names, start, end, size) in enumerate(pieces)
    ]


def _file_fingerprint(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        tail = file.read()
    name = os.path.basename(path)
    return hashlib.sha256(f"{name}\0{size}\0".encode() + head + tail).hexdigest()


def recipe(unit: Unit) -> dict:
    """What identifies the unit's input, without the folder it lies in."""
    return {**asdict(unit), "files": [os.path.basename(name) for name in unit.files]}


def read(unit: Unit, skipped: Counter) -> Iterator[str]:
    """Yield the unit's documents in order; count what is unusable in `skipped` by reason.

    Raises UserError for a file that cannot be decompressed or is no Parquet.
    """
    for path in unit.files:
        try:
            records = {"jsonl": _jsonl, "txt": _txt, "parquet": _parquet}[kind(path)](path, unit, skipped)
            for text in records:
                if not isinstance(text, str):
                    skipped["text is not a string"] += 1
                elif not text.strip():
                    skipped["empty"] += 1
                else:
                    yield text
        except (EOFError, OSError, ValueError) as error:  # truncated or damaged archives end here
            raise UserError(f"{path}: cannot be read to its end ({error}); replace or remove the file") from error


def _open(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import zstandard

        return io.BufferedReader(_WholeZstd(open(path, "rb"), zstandard))
    return open(path, "rb")


class _WholeZstd(io.RawIOBase):
    """A .zst file as bytes; unlike zstandard's own reader, a file cut in the middle of a frame is an error."""

    def __init__(self, file, zstandard):
        self.file, self.new_frame = file, zstandard.ZstdDecompressor().decompressobj
        self.frame, self.pending = None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.pending:
            chunk = b""
            if self.frame is not None and self.frame.eof:
                chunk, self.frame = self.frame.unused_data, None
            chunk = chunk or self.file.read(1 << 18)
            if not chunk:
                if self.frame is not None:
                    raise EOFError("the zstd frame is cut off")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.pending = self.frame.decompress(chunk)
            except Exception as error:  # zstandard.ZstdError has no common base with OSError
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self.pending))
        buffer[:size], self.pending = self.pending[:size], self.pending[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def _jsonl(path: str, unit: Unit, skipped: Counter) -> Iterator[object]:
    with _open(path) as file:
        position = unit.start
        if unit.start > 0:  # the line that runs into this range belongs to the unit before
            file.seek(unit.start - 1)
            position += len(file.readline()) - 1
        for line in file:
            if 0 <= unit.end <= position:
                return
            position += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
                continue
            except json.JSONDecodeError:
                skipped["not JSON"] += 1
                continue
            if not isinstance(record, dict) or unit.text_field not in record:
                skipped[f"no field {unit.text_field!r}"] += 1
                continue
            yield record[unit.text_field]


def _txt(path: str, unit: Unit, skipped: Counter) -> Iterator[object]:
    with _open(path) as file:
        content = file.read()
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1


def _parquet(path: str, unit: Unit, skipped: Counter) -> Iterator[object]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if unit.text_field not in file.schema_arrow.names:
        raise UserError(f"{path}: no column {unit.text_field!r}; it has {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(batch_size=1024, columns=[unit.text_field]):
        for value in batch.column(0):
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
