"""The records of files that hold token ids: Megatron-LM's, datatrove's, MosaicML's, and columns of ids.

In: a file and a range of its records. Out: the ids of one record after another.

Layouts: Megatron-LM core/datasets/indexed_dataset.py (`X.bin` beside `X.idx`), datatrove
pipeline/tokens/tokenizer.py (`X.ds` beside `X.ds.index`), MosaicML streaming/base/format/mds (mds.py here).

Memory: BLOCK_BYTES of ids, or one record if it is longer, and the index of the unit's own records. With boundaries
`record`, a document of a .bin or .ds that exceeds max_bytes is not read.
"""

import struct
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError

from ..config import SourceConfig
from ..work_list import Unit
from .columns import read_arrow, read_parquet
from .document import Found, Tally
from .files import open_file
from .kinds import index_of, kind
from .mds import read_mds
from .text import read_jsonl

UNLIMITED = sys.maxsize
BLOCK_BYTES = 1 << 23  # of ids, read at once
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the ids, sequences, document indices
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
TOKEN_KINDS = ("megatron", "datatrove", "mds")
TOO_LONG_RECORD = object()  # in place of the ids of a document that is not read


def is_tokenized(source: SourceConfig, path: str) -> bool:
    """Whether a file of the source gives token ids and not texts."""
    return bool(source.tokens_field) or kind(path) in TOKEN_KINDS


def read_tokens(path: str, unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int) -> Found:
    """(ids (tokens,) int64, record) of each record of the unit's part of a file.

    What stands in a column in place of ids is given as it is, TOO_LONG_RECORD for a document that is not read. Raises
    EOFError for a file that does not fit its index, and UserError for one whose index is not there, or is none.
    """
    found = kind(path)
    if found in ("megatron", "datatrove"):
        limit = max_bytes if source.boundaries == "record" else UNLIMITED  # a block may hold many documents
        for ids in _read_indexed(path, unit.start, unit.end, limit):
            yield ids, {}
        return
    if found == "mds":
        for ids in read_mds(path, source.tokens_field):
            yield ids, {}
        return
    columns = {"jsonl": read_jsonl, "parquet": read_parquet, "arrow": read_arrow}
    if found not in columns:
        raise UserError(f"{path}: a {found} file has no column of ids; tokens_field is for {', '.join(columns)}")
    for value, record in columns[found](path, unit, _of_ids(source), tally, max_bytes):
        yield _as_ids(value), record


def _of_ids(source: SourceConfig) -> SourceConfig:
    """The source, its column of ids in the place of the texts'."""
    return SourceConfig(
        source.name, source.paths, text_field=source.tokens_field, filters=source.filters, filter=source.filter
    )


def _as_ids(value: Any) -> Any:
    """A list of whole numbers as (tokens,) int64; anything else unchanged."""
    if not isinstance(value, list):
        return value
    try:
        ids = np.array(value) if value else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        return value
    return ids.astype(np.int64) if ids.ndim == 1 and ids.dtype.kind in "iu" else value


def documents_in(path: str) -> np.ndarray:
    """(documents,) tokens of each document of a Megatron or datatrove file, by its index. Raises UserError."""
    return np.diff(_extents(path, 0, -1)[1])


def token_bytes(path: str) -> int:
    """Bytes of a token in a Megatron or datatrove file. Raises UserError."""
    return _extents(path, 0, 0)[0].itemsize


def _read_indexed(path: str, start: int, end: int, max_tokens: int = UNLIMITED) -> Iterator[Any]:
    """The ids of documents [start, end) of a Megatron or datatrove file, of all from `start` on with `end` -1.

    TOO_LONG_RECORD for one of more than `max_tokens`. Raises EOFError for a file that does not fit its index.
    """
    dtype, ends, total = _extents(path, start, end)
    width = dtype.itemsize
    with open_file(path) as file:
        size = file.seek(0, 2)
        first = 0
        while first < len(ends) - 1:
            last = int(np.searchsorted(ends, ends[first] + BLOCK_BYTES // width, side="right")) - 1
            last = max(first + 1, last)
            if ends[first + 1] - ends[first] > max_tokens and int(ends[first + 1]) * width <= size:
                yield TOO_LONG_RECORD
                first += 1
                continue
            begin = min(int(ends[first]) * width, size)  # a damaged index may ask for 2**60 bytes
            file.seek(begin)
            content = file.read(min(int(ends[last]) * width, size) - begin)
            whole = np.frombuffer(content[: len(content) // width * width], dtype).astype(np.int64)
            for begin, stop in zip(ends[first:last] - ends[first], ends[first + 1 : last + 1] - ends[first]):
                if stop > len(whole):
                    raise EOFError(f"it ends before token {int(ends[first]) + int(stop):,}, which its index has")
                yield whole[begin:stop] if stop - begin <= max_tokens else TOO_LONG_RECORD
            first = last
        if int(ends[-1]) == total and size > total * width:  # said once, by the unit that has the end
            raise EOFError(f"it has {size - total * width:,} bytes after the last document of its index")


def _extents(path: str, start: int, end: int) -> tuple[np.dtype, np.ndarray, int]:
    """(type of the ids, ends, tokens of the whole file) by the index.

    ends: (documents + 1,) the tokens before each of the documents [start, end), and after the last.
    """
    return _megatron_extents(path, start, end) if kind(path) == "megatron" else _datatrove_extents(path, start, end)


def _open_index(path: str) -> BinaryIO:
    index = index_of(path)
    try:
        return open_file(str(index))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {index}, which says where its documents are") from None


def _read_array(file: BinaryIO, offset: int, dtype: str, count: int, path: str) -> np.ndarray:
    file.seek(offset)
    size = count * np.dtype(dtype).itemsize
    content = file.read(size)
    if len(content) < size:
        raise UserError(f"{index_of(path)} is cut off: it has fewer entries than its header says")
    return np.frombuffer(content, dtype).astype(np.int64)


def _megatron_extents(path: str, start: int, end: int) -> tuple[np.dtype, np.ndarray, int]:
    with _open_index(path) as file:
        header = file.read(MEGATRON_HEADER.size)
        if len(header) < MEGATRON_HEADER.size or not header.startswith(MEGATRON_MAGIC):
            raise UserError(f"{index_of(path)} is no index of Megatron-LM: it does not begin with {MEGATRON_MAGIC!r}")
        _, version, code, sequences, indices = MEGATRON_HEADER.unpack(header)
        if version != 1 or code not in MEGATRON_TYPES:
            raise UserError(
                f"{index_of(path)}: found version {version} and type {code}, expected version 1 and a type of whole "
                f"numbers ({', '.join(map(str, MEGATRON_TYPES))})"
            )
        dtype = np.dtype(MEGATRON_TYPES[code])
        size = file.seek(0, 2)
        if size < MEGATRON_HEADER.size + 12 * sequences + 8 * indices or indices < 1:
            raise UserError(f"{index_of(path)} is cut off: it has fewer entries than its header says")
        lengths_at = MEGATRON_HEADER.size
        pointers_at = lengths_at + 4 * sequences
        documents_at = pointers_at + 8 * sequences
        end = indices - 1 if end < 0 else end
        of_sequence = _read_array(file, documents_at + 8 * start, "<i8", end - start + 1, path)
        first, last = int(of_sequence[0]), int(of_sequence[-1])
        if first < 0 or last > sequences or (np.diff(of_sequence) < 0).any():
            raise UserError(f"{index_of(path)} is damaged: its documents are not in the order of its sequences")
        bounds = [int(_read_array(file, documents_at + 8 * i, "<i8", 1, path)[0]) for i in (0, indices - 1)]
        if bounds != [0, sequences]:
            raise UserError(
                f"{index_of(path)}: its documents are sequences {bounds[0]:,} to {bounds[1]:,} of {sequences:,}; the "
                "others are in no document: end a document after the last sequence when you write it"
            )
        total = 0
        if sequences:
            total = int(_read_array(file, pointers_at + 8 * (sequences - 1), "<i8", 1, path)[0]) // dtype.itemsize
            total += int(_read_array(file, lengths_at + 4 * (sequences - 1), "<i4", 1, path)[0])
        if first == last:
            return dtype, np.zeros(len(of_sequence), np.int64), total
        lengths = _read_array(file, lengths_at + 4 * first, "<i4", last - first, path)
        pointers = _read_array(file, pointers_at + 8 * first, "<i8", last - first, path)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or (pointers != pointers[0] + ends[:-1] * dtype.itemsize).any():
        raise UserError(f"{index_of(path)} is damaged: its sequences do not follow one another")
    if pointers[0] < 0 or pointers[0] % dtype.itemsize:
        raise UserError(f"{index_of(path)} is damaged: a sequence begins at byte {pointers[0]}")
    return dtype, pointers[0] // dtype.itemsize + ends[of_sequence - first], total


def _datatrove_extents(path: str, start: int, end: int) -> tuple[np.dtype, np.ndarray, int]:
    with _open_index(path) as file:
        size = file.seek(0, 2)
        count = size // 8
        if size % 8:
            raise UserError(f"{index_of(path)} is cut off: it has {size} bytes, expected 8 for each document")
        end = count if end < 0 else end
        before = max(0, start - 1)
        ends = _read_array(file, 8 * before, "<u8", max(end, min(1, count)) - before, path)
        total = int(_read_array(file, size - 8, "<u8", 1, path)[0]) if count else 0
    ends = ends if start else np.concatenate([np.zeros(1, np.int64), ends])
    ends = ends[: end - start + 1]
    if (np.diff(ends) < 0).any() or ends[0] < 0 or total < ends[-1]:
        raise UserError(f"{index_of(path)} is damaged: the ends of its documents are not in order")
    return np.dtype(f"<u{_datatrove_token_bytes(path, total)}"), ends, total


def _datatrove_token_bytes(path: str, total: int) -> int:
    """2 or 4: as the file's .metadata says, else by its size.

    The size alone may deceive: half a file of 4 bytes a token is a whole one of 2.
    """
    try:
        with open_file(path + ".metadata") as file:
            first = file.readline().decode("utf-8", "replace").strip()
        if first.rpartition("|")[2] in ("2", "4"):
            return int(first[-1])
    except FileNotFoundError:
        pass
    with open_file(path) as file:
        size = file.seek(0, 2)
    if size == 0 == total:  # of a task that had no documents
        return 2
    if total and size in (2 * total, 4 * total):
        return size // total
    raise UserError(
        f"{path} has {size:,} bytes, expected 2 or 4 for each of the {total:,} tokens that its index has; it is cut "
        "off, or has another index"
    )


def split_at(records: Found, ends: frozenset[int]) -> Found:
    """Records that run on in one another, cut after every id of `ends`: (ids, {}) of each document.

    What is no record of ids stands between two documents.
    """
    held: list[np.ndarray] = []
    for ids, record in records:
        if not isinstance(ids, np.ndarray):
            if held:
                yield np.concatenate(held), {}
                held = []
            yield ids, record
            continue
        start = 0
        for stop in np.flatnonzero(np.isin(ids, list(ends))) + 1:
            yield np.concatenate([*held, ids[start:stop]]), {}
            held = []
            start = stop
        if start < len(ids):
            held.append(ids[start:])
    if held:
        yield np.concatenate(held), {}
