"""Documents out of files: the work list, and the texts of one unit of work.

In: the configuration's sources. Out: `units(...)`, a list that depends on the files alone, and
`read(unit, ...)`, the texts of one unit in file order. What cannot be used is counted by reason.

Paths are local or of any file system that fsspec knows (`s3://`, `hf://datasets/...`): a file, a glob,
a folder (all files of known kinds in it), or `@LIST`, a text file of paths. Plain JSONL is cut into
byte ranges, so one large file is many units; a line belongs to the unit in which it starts. Other
files are read whole, small ones several a unit. Text files are one document each.
"""

import codecs
import glob
import gzip
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

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


BLOCK = 1 << 22  # bytes of a long text file that are held at once
LONG = 1 << 24  # bytes; larger text files are not held whole


@dataclass(frozen=True)
class LongText:
    """A document too long to hold: its length and hash are known, its text is read again in blocks."""

    path: str
    characters: int
    bytes: int  # as UTF-8
    digest: bytes  # as `digest` gives it

    def __len__(self) -> int:
        return self.characters

    def blocks(self) -> Iterator[str]:
        """Its text, a few MB at a time."""
        decode = codecs.getincrementaldecoder("utf-8")().decode
        with _open(self.path) as file:
            while content := file.read(BLOCK):
                yield decode(content)


Document = str | LongText


def digest(document: Document) -> bytes:
    """16 bytes that stand for a document's text: they decide its split and find its duplicates."""
    if isinstance(document, LongText):
        return document.digest
    return hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass
class Tally:
    """What was left out of a unit, by reason."""

    bad: Counter = field(default_factory=Counter)  # could not be used; config.max_bad_fraction limits these
    filtered: Counter = field(default_factory=Counter)  # not wanted
    damaged: list[str] = field(default_factory=list)  # files that could not be read to their end


def kind(path: str) -> str:
    """'jsonl', 'txt', 'parquet' or 'arrow' of a file name, through .gz and .zst. Raises UserError for others."""
    plain = path.removesuffix(".gz").removesuffix(".zst")
    found = KINDS.get(os.path.splitext(plain)[1])
    if found is None:
        raise UserError(f"{path}: unknown kind of file; expected {' '.join(KINDS)}, text kinds also with .gz or .zst")
    if found in ("parquet", "arrow") and plain != path:
        raise UserError(f"{path}: {found} files compress inside; decompress it first")
    return found


def _remote(path: str) -> bool:
    return "://" in path


def _filesystem(path: str):
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def size_of(path: str) -> int:
    return _filesystem(path).size(path) if _remote(path) else os.path.getsize(path)


def open_file(path: str):
    """A seekable binary file, local or through fsspec."""
    return _filesystem(path).open(path, "rb") if _remote(path) else open(path, "rb")


def expand(source: SourceConfig) -> list[str]:
    """The files of a source, in order. Raises UserError for a path that gives none, or a file named twice."""
    files: list[str] = []
    for path in source.paths:
        if path.startswith("@"):
            if not os.path.isfile(path[1:]):
                raise UserError(f"source {source.name}: no file list at {path[1:]}")
            lines = Path(path[1:]).read_text(encoding="utf-8").splitlines()
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        elif _remote(path):
            found = _expand_remote(path)
        elif os.path.isdir(path):
            found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and _known(str(p)))
        elif glob.has_magic(path):
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        else:
            found = [path]
        missing = [p for p in found if not _remote(p) and not os.path.isfile(p)]
        if missing or not found:
            raise UserError(f"source {source.name}: no file matches {(missing or [path])[0]!r}")
        files += found
    if len(set(files)) != len(files):
        twice = next(p for p in files if files.count(p) > 1)
        raise UserError(f"source {source.name}: {twice} is named twice in paths")
    return files


def _known(path: str) -> bool:
    plain = path.removesuffix(".gz").removesuffix(".zst")
    # a Hugging Face dataset folder also holds dataset_info.json and state.json
    return os.path.splitext(plain)[1] in KINDS and os.path.basename(path) not in ("dataset_info.json", "state.json")


def _expand_remote(path: str) -> list[str]:
    system = _filesystem(path)
    if glob.has_magic(path):
        found = system.glob(path)
    elif system.isdir(path):
        found = [p for p in system.find(path) if _known(p)]
    else:
        found = [path] if system.exists(path) else []
    return sorted(system.unstrip_protocol(p) for p in found)


def units(source: SourceConfig, unit_bytes: int) -> list[Unit]:
    """The work list of one source: a function of its files and `unit_bytes` alone.

    Raises UserError when a path matches nothing or is of an unknown kind.
    """
    pieces: list[tuple[list[str], int, int, int]] = []  # files, start, end, bytes
    files = expand(source)
    sizes = {path: size_of(path) for path in files}
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
        head = file.read(1 << 16)
        file.seek(max(0, size - (1 << 16)))
        return _sha(f"{os.path.basename(path)}\0{size}\0".encode() + head + file.read())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def recipe(unit: Unit) -> dict:
    """What identifies the unit's input, without the folder it lies in."""
    return {**asdict(unit), "files": [os.path.basename(name) for name in unit.files]}


def read(unit: Unit, source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """Yield the unit's documents that pass the source's filters, in order; count the others.

    A file that cannot be read to its end gives what could be read, and is named in `tally.damaged`.
    """
    readers = {"jsonl": _jsonl, "txt": _txt, "parquet": _parquet, "arrow": _arrow}
    for path in unit.files:
        try:
            for text, record in readers[kind(path)](path, unit, source, tally):
                if not isinstance(text, str | LongText):
                    tally.bad["text is not a string"] += 1
                elif not len(text) or (isinstance(text, str) and text.isspace()):
                    tally.bad["empty"] += 1
                elif len(text) < source.min_characters:
                    tally.filtered[f"shorter than {source.min_characters} characters"] += 1
                else:
                    reason = next(
                        (key for key, allowed in source.filters.items() if _get(record, key) not in allowed), None
                    )
                    if reason is None:
                        yield text
                    else:
                        tally.filtered[f"{reason} is not wanted"] += 1
        except (EOFError, OSError, ValueError) as error:  # a truncated or damaged archive ends here
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{path} is gone; it was there when the work list was made") from None
            tally.bad["file damaged or cut off"] += 1
            tally.damaged.append(f"{path}: {str(error).splitlines()[0]}")


def _get(record: dict, key: str):
    """A value by its path, dots descending."""
    for part in key.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _open(path: str):
    if path.endswith(".gz"):
        return gzip.open(open_file(path), "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_WholeZstd(open_file(path)), 1 << 20)
    return open_file(path)


class _WholeZstd(io.RawIOBase):
    """A .zst file as bytes; unlike zstandard's own reader, a file cut in the middle of a frame is an error."""

    def __init__(self, file):
        import zstandard

        self.file, self.new_frame = file, zstandard.ZstdDecompressor().decompressobj
        self.error = zstandard.ZstdError
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
            except self.error as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self.pending))
        buffer[:size], self.pending = self.pending[:size], self.pending[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


Found = Iterator[tuple[object, dict]]  # text, and the record that filters look at


def _jsonl(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with _open(path) as file:
        position = unit.start
        if unit.start > 0:  # the line that runs into this range belongs to the unit before
            file.seek(unit.start - 1)
            position += len(file.readline()) - 1
        for line in file:
            if 0 <= unit.end <= position:
                return
            position += len(line)
            if line.isspace():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                tally.bad["not JSON" if _is_utf8(line) else "not UTF-8"] += 1
                continue
            if not isinstance(record, dict) or source.text_field not in record:
                tally.bad[f"no field {source.text_field!r}"] += 1
                continue
            yield record[source.text_field], record


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _txt(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with _open(path) as file:
        content = file.read(LONG + 1)
        try:
            yield (_long(path, content, file) if len(content) > LONG else content.decode("utf-8")), {}
        except UnicodeDecodeError:
            tally.bad["not UTF-8"] += 1


def _long(path: str, block: bytes, file) -> LongText:
    """Read to the end for the length and the hash. Raises UnicodeDecodeError."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    found, characters, size = hashlib.blake2b(digest_size=16), 0, 0
    while block:
        found.update(block)
        characters += len(decode(block))
        size += len(block)
        block = file.read(BLOCK)
    decode(b"", final=True)
    return LongText(path, characters, size, found.digest())


def _columns(path: str, names: list[str], source: SourceConfig) -> list[str]:
    """The columns to read: the text, and those that filters look at. Raises UserError for one that is not there."""
    wanted = list(dict.fromkeys([source.text_field, *(key.split(".")[0] for key in source.filters)]))
    for name in wanted:
        if name not in names:
            raise UserError(f"{path}: no column {name!r}; it has {', '.join(names)}")
    return wanted


def _parquet(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    import pyarrow.parquet

    with open_file(path) as opened:
        file = pyarrow.parquet.ParquetFile(opened)
        columns = _columns(path, file.schema_arrow.names, source)
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from _rows(batch, source, tally)


def _arrow(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    """Arrow IPC, as streams (what `datasets` writes) or files."""
    import pyarrow as pa

    with open_file(path) as opened:
        is_file = opened.read(6) == b"ARROW1"
        opened.seek(0)
        if is_file:
            reader = pa.ipc.open_file(opened)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(opened)
        columns = _columns(path, reader.schema.names, source)
        for batch in batches:
            yield from _rows(batch.select(columns), source, tally)


def _rows(batch, source: SourceConfig, tally: Tally) -> Found:
    others = [name for name in batch.schema.names if name != source.text_field]
    texts = batch.column(source.text_field)
    records = batch.select(others).to_pylist() if others else [{}] * len(texts)
    for text, record in zip(texts, records):
        try:
            yield text.as_py(), record
        except UnicodeDecodeError:
            tally.bad["not UTF-8"] += 1
