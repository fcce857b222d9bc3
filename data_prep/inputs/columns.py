"""The documents of Parquet and Arrow files: one a row."""

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError

from ..config import SourceConfig
from ..work_list import Unit
from .document import Found, Tally
from .files import open_file


def read_parquet(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with open_file(path) as opened:
        file = pq.ParquetFile(opened)
        columns = _columns(path, file.schema_arrow.names, source)
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from _rows_of(batch, source, tally)


def read_arrow(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
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
