"""The documents of Parquet and Arrow files: one a row.

Memory: of a Parquet row group, however large, one page of each column and one batch of BATCH_BYTES: 44 MB for a row
group of 1 GB. A single value larger than a page takes about four times its size, whether it is kept or not. Of Arrow,
one record batch as it was written (`datasets` writes 1,000 rows) is in memory.
"""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError

from ..config import SourceConfig
from ..work_list import Unit
from .document import TOO_LONG, Found, Tally
from .files import open_file
from .filters import value_at

BATCH_BYTES = 1 << 22  # of rows that become Python objects at once ...
BATCH_ROWS = 256  # ... and how many at most
PAGE_BYTES = 1 << 18  # of a Parquet column, read at once


def read_parquet(path: str, unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int) -> Found:
    """The rows of the unit's row groups, of all with `unit.end` -1."""
    with open_file(path) as opened:
        file = pq.ParquetFile(opened, pre_buffer=False, buffer_size=PAGE_BYTES, page_checksum_verification=True)
        columns = _columns(path, file.schema_arrow, source)
        end = unit.end if unit.end >= 0 else file.num_row_groups
        for group in range(unit.start, end):
            rows = _rows_a_batch(file.metadata.row_group(group), columns)
            batches = file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)
            for batch in batches:
                yield from _rows_of(batch, source, tally, max_bytes)


def _rows_a_batch(group: pq.RowGroupMetaData, columns: list[str] | None) -> int:
    """So many rows of a row group have about BATCH_BYTES in these columns."""
    leaves = [group.column(i) for i in range(group.num_columns)]
    if columns is not None:
        leaves = [leaf for leaf in leaves if any(f"{leaf.path_in_schema}.".startswith(f"{c}.") for c in columns)]
    size = sum(leaf.total_uncompressed_size for leaf in leaves)
    return min(BATCH_ROWS, max(1, BATCH_BYTES * group.num_rows // max(1, size)))


class _Stream:
    """A file for Arrow's stream reader: asks for no more bytes than there are, and knows whether one found none."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        self.at_end = False
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        left = self.size - self.file.tell()
        content = self.file.read(min(size, left) if size >= 0 else left)  # a length may be damaged: 2**60
        self.at_end = size != 0 and not content
        return content

    def tell(self) -> int:
        return self.file.tell()


def read_arrow(path: str, unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int) -> Found:
    """Arrow IPC, as streams (what `datasets` writes) or files. A stream without its end marker raises EOFError."""
    with open_file(path) as opened:
        if opened.peek(6)[:6] == b"ARROW1":
            file = pa.ipc.open_file(opened)
            batches = map(file.get_batch, range(file.num_record_batches))
            yield from _rows_of_batches(path, batches, file.schema, source, tally, max_bytes)
            return
        watched = _Stream(opened)
        stream = pa.ipc.open_stream(watched)
        yield from _rows_of_batches(path, stream, stream.schema, source, tally, max_bytes)
        if watched.at_end:
            raise EOFError("it ends without the marker of an Arrow stream's end")


def _rows_of_batches(
    path: str, batches: Iterator[pa.RecordBatch], schema: pa.Schema, source: SourceConfig, tally: Tally, max_bytes: int
) -> Found:
    columns = _columns(path, schema, source)
    names = schema.names if columns is None else list(dict.fromkeys(_top(schema, name) for name in columns))
    for batch in batches:
        batch = batch.select(names)
        _validate(batch)
        rows = min(BATCH_ROWS, max(1, BATCH_BYTES * len(batch) // max(1, batch.nbytes)))
        for start in range(0, len(batch), rows):
            yield from _rows_of(batch.slice(start, rows), source, tally, max_bytes)


def _validate(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid where offsets point out of the data, which Arrow would follow."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):  # such rows are counted one by one
                raise


def _columns(path: str, schema: pa.Schema, source: SourceConfig) -> list[str] | None:
    """The columns to read, dots descending: the text, and those that filters look at; None for all, if a hook does.

    Raises UserError for one that is not there.
    """
    wanted = list(dict.fromkeys([source.text_field, *source.filters]))
    for name in wanted:
        if not _has(schema, name):
            raise UserError(f"{path}: no column {name!r}; it has {', '.join(_names(schema))}")
    return None if source.filter else wanted


def _top(schema: pa.Schema, name: str) -> str:
    """The column itself that holds a nested one."""
    return name if name in schema.names else name.split(".")[0]


def _has(schema: pa.Schema, name: str) -> bool:
    if name in schema.names:
        return True
    fields = list(schema)
    for part in name.split("."):
        field = next((field for field in fields if field.name == part), None)
        if field is None:
            return False
        fields = list(field.type) if pa.types.is_struct(field.type) else []
    return True


def _names(fields: Any, prefix: str = "") -> Iterator[str]:
    for field in fields:
        if pa.types.is_struct(field.type):
            yield from _names(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _rows_of(batch: pa.RecordBatch, source: SourceConfig, tally: Tally, max_bytes: int) -> Found:
    """Text and record of each row; rows that are not UTF-8, or whose text exceeds `max_bytes`, are counted as bad."""
    try:
        records = batch.to_pylist() if batch.nbytes <= max_bytes else None
    except UnicodeDecodeError:
        records = None
    if records is not None:
        for record in records:
            yield value_at(record, source.text_field), record
        return
    for row in (batch.slice(i, 1) for i in range(len(batch))):
        if _text_bytes(row, source.text_field) > max_bytes:
            tally.bad[TOO_LONG] += 1
            continue
        try:
            record = row.to_pylist()[0]
        except UnicodeDecodeError:
            tally.bad["not UTF-8"] += 1
            continue
        yield value_at(record, source.text_field), record


def _text_bytes(row: pa.RecordBatch, field: str) -> int:
    """Of one row's text, without making it a Python object."""
    path = [field] if field in row.schema.names else field.split(".")
    value: Any = row.column(path[0])[0]
    for part in path[1:]:
        value = value[part]
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    buffer = value.as_buffer() if isinstance(value, pa.BinaryScalar) else None
    return buffer.size if buffer is not None else 0
