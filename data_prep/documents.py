"""The documents of one unit of work.

In: a unit of the work list. Out: `read(unit, ...)`, the texts in file order. A line of JSONL, a row of
Parquet or Arrow, or a whole text file is one document. What cannot be used is counted by reason.
"""

import codecs
import gzip
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError

from .config import SourceConfig
from .work_list import Unit, kind, open_file

BLOCK_BYTES = 1 << 22  # of a long text file that are in memory at once
LONG_FILE_BYTES = 1 << 24  # larger text files are never in memory as a whole


@dataclass(frozen=True)
class LongText:
    """A document too long to hold: its length and hash are known, its text is read again in blocks."""

    path: str
    characters: int
    utf8_bytes: int
    digest: bytes  # as `digest` gives it

    def __len__(self) -> int:
        return self.characters

    def blocks(self) -> Iterator[str]:
        """Its text, a few MB at a time."""
        decode = codecs.getincrementaldecoder("utf-8")().decode
        with _open_decompressed(self.path) as file:
            while content := file.read(BLOCK_BYTES):
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

    bad: Counter = field(default_factory=Counter)  # unusable documents; config.max_bad_fraction limits these
    filtered: Counter = field(default_factory=Counter)  # documents that the configuration does not want
    damaged: list[str] = field(default_factory=list)  # files that could not be read to their end


def read(unit: Unit, source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """Yield the unit's documents that pass the source's filters, in order; count the others.

    A file that is cut off or damaged gives what could be read, and is named in `tally.damaged`.
    """
    readers = {"jsonl": _read_jsonl, "txt": _read_txt, "parquet": _read_parquet, "arrow": _read_arrow}
    for path in unit.files:
        try:
            for text, record in readers[kind(path)](path, unit, source, tally):
                if _is_wanted(text, record, source, tally):
                    yield text
        except FileNotFoundError:
            raise UserError(f"{path} is gone; it was there when the work list was made") from None
        except (EOFError, OSError, ValueError) as error:
            tally.bad["file damaged or cut off"] += 1
            tally.damaged.append(f"{path}: {str(error).splitlines()[0]}")


def _is_wanted(text: Any, record: dict, source: SourceConfig, tally: Tally) -> bool:
    """Whether this is a usable text that passes the source's filters; if not, the reason is counted."""
    if not isinstance(text, str | LongText):
        tally.bad["text is not a string"] += 1
        return False
    if not len(text) or (isinstance(text, str) and text.isspace()):
        tally.bad["empty"] += 1
        return False
    if len(text) < source.min_characters:
        tally.filtered[f"shorter than {source.min_characters} characters"] += 1
        return False
    for key, allowed in source.filters.items():
        if _value_at(record, key) not in allowed:
            tally.filtered[f"{key} is not wanted"] += 1
            return False
    return True


def _value_at(record: dict, key: str) -> Any:
    """The value of a key such as `meta.licence`, where dots descend into nested records."""
    found: Any = record
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


Found = Iterator[tuple[Any, dict]]  # what should be the text, and the record that filters look at


def _read_jsonl(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with _open_decompressed(path) as file:
        position = unit.start
        if unit.start > 0:  # the unit before has the line that runs into this range
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


def _read_txt(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with _open_decompressed(path) as file:
        content = file.read(LONG_FILE_BYTES + 1)
        try:
            if len(content) > LONG_FILE_BYTES:
                yield _scan_long_text(path, content, file), {}
            else:
                yield content.decode("utf-8"), {}
        except UnicodeDecodeError:
            tally.bad["not UTF-8"] += 1


def _scan_long_text(path: str, block: bytes, file: BinaryIO) -> LongText:
    """Read `file`, whose first bytes are `block`, to its end for length and hash. Raises UnicodeDecodeError."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    hashed = hashlib.blake2b(digest_size=16)
    characters = 0
    size = 0
    while block:
        hashed.update(block)
        characters += len(decode(block))
        size += len(block)
        block = file.read(BLOCK_BYTES)
    decode(b"", final=True)
    return LongText(path, characters, size, hashed.digest())


def _read_parquet(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with open_file(path) as opened:
        file = pq.ParquetFile(opened)
        columns = _columns(path, file.schema_arrow.names, source)
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from _rows_of(batch, source, tally)


def _read_arrow(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    """Arrow IPC, as streams (what `datasets` writes) or files."""
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
            yield from _rows_of(batch.select(columns), source, tally)


def _columns(path: str, names: list[str], source: SourceConfig) -> list[str]:
    """The columns to read: the text, and those that filters look at. Raises UserError for one that is not there."""
    wanted = list(dict.fromkeys([source.text_field, *(key.split(".")[0] for key in source.filters)]))
    for name in wanted:
        if name not in names:
            raise UserError(f"{path}: no column {name!r}; it has {', '.join(names)}")
    return wanted


def _rows_of(batch: pa.RecordBatch, source: SourceConfig, tally: Tally) -> Found:
    others = [name for name in batch.schema.names if name != source.text_field]
    texts = batch.column(source.text_field)
    records = batch.select(others).to_pylist() if others else [{}] * len(texts)
    for text, record in zip(texts, records):
        try:
            yield text.as_py(), record
        except UnicodeDecodeError:
            tally.bad["not UTF-8"] += 1


def _open_decompressed(path: str) -> BinaryIO:
    """The file's bytes, decompressed. Reading a .gz or .zst file that is cut off raises EOFError or OSError."""
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(open_file(path), "rb"))
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(open_file(path)), 1 << 20)
    return open_file(path)


class _ZstdReader(io.RawIOBase):
    """A .zst file of one or more frames as bytes.

    zstandard's own reader, which fsspec uses too, takes a file that ends in the middle of a frame for whole.
    """

    def __init__(self, file: BinaryIO):
        import zstandard

        self.file = file
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.error = zstandard.ZstdError
        self.frame: Any = None
        self.pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.pending:
            chunk = b""
            if self.frame is not None and self.frame.eof:
                chunk = self.frame.unused_data
                self.frame = None
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
        buffer[:size] = self.pending[:size]
        self.pending = self.pending[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()
