"""Where the rows of a shard lie in its file: a table that is stored behind the Arrow stream, or read off the stream.

Arrow readers stop at the stream's end marker. Behind it: `INDEXED` for each record batch, then a `TRAILER`.
All integers are little-endian.
"""

from dataclasses import dataclass
from struct import Struct

import numpy as np
import pyarrow as pa

INDEXED = Struct("<4q")  # file offsets of a batch's ids, offsets of its lengths, lengths, and bits of last_continues
TRAILER = Struct("<5q8s")  # batches, rows, rows of a batch, seq_len, bytes of an id; then MAGIC
MAGIC = b"dl-shard"


@dataclass
class Index:
    """Where the rows of a shard lie in its file."""

    batches: int
    rows: int
    batch_rows: int
    seq_len: int
    id_bytes: int
    table: np.ndarray  # (bytes,) uint8, an INDEXED for each batch

    @property
    def size(self) -> int:
        """Bytes behind the stream."""
        return self.batches * INDEXED.size + TRAILER.size

    def to_bytes(self) -> bytes:
        """What follows the stream."""
        numbers = (self.batches, self.rows, self.batch_rows, self.seq_len, self.id_bytes)
        return self.table.tobytes() + TRAILER.pack(*numbers, MAGIC)

    def check(self, end: int) -> None:
        """Raise ValueError unless all that a row is read from lies before `end`, the stream's."""
        rows = self.batch_rows
        for number, (ids, offsets, lengths, _) in enumerate(INDEXED.iter_unpack(self.table.data), 1):
            if number == self.batches:
                rows = self.rows - (self.batches - 1) * self.batch_rows
            furthest = max(ids + rows * self.seq_len * self.id_bytes, offsets + 4 * (rows + 1), lengths + 4 * rows)
            if min(ids, offsets, lengths) < 0 or furthest > end or (ids | offsets | lengths) % 4:
                raise ValueError("its index points outside of it")


def stored_index(content: np.ndarray) -> Index | None:
    """The index at the end of a shard's bytes; None where there is none, as in version 1, or it cannot be."""
    if len(content) < TRAILER.size:
        return None
    *numbers, magic = TRAILER.unpack_from(content.data, len(content) - TRAILER.size)
    batches, rows, batch_rows, seq_len, id_bytes = numbers
    begin = len(content) - TRAILER.size - batches * INDEXED.size
    if magic != MAGIC or min(numbers) <= 0 or begin < 0 or batches != -(-rows // batch_rows) or id_bytes not in (2, 4):
        return None
    return Index(batches, rows, batch_rows, seq_len, id_bytes, content[begin : len(content) - TRAILER.size])


def index_of(content: np.ndarray, batch_rows: int) -> tuple[Index, list[pa.RecordBatch]]:
    """The index of the stream that a shard's bytes begin with, and the stream's batches of `batch_rows` rows.

    Raises pa.ArrowInvalid for what is no whole stream of such rows.
    """
    buffer = pa.py_buffer(content)
    reader = pa.ipc.open_stream(buffer)
    batches = list(reader)
    if reader.schema.names[:2] != ["input_ids", "document_lengths"]:
        raise pa.ArrowInvalid(f"columns {reader.schema.names}")
    table = []
    for batch in batches:
        ids, pieces, *others = (column.buffers() for column in batch.columns)
        wanted = [ids[-1], pieces[1], pieces[-1], others[0][-1] if others else None]
        table.append([part.address - buffer.address if part is not None else -1 for part in wanted])
    ids_type = reader.schema.field("input_ids").type
    if any(len(batch) != batch_rows for batch in batches[:-1]) or not batches or len(batches[-1]) > batch_rows:
        raise pa.ArrowInvalid(f"batches of other than {batch_rows} rows")
    rows = sum(map(len, batches))
    places = np.array(table, dtype="<i8").reshape(-1, 4).view(np.uint8).ravel()
    id_bytes = ids_type.value_type.bit_width // 8
    return Index(len(batches), rows, batch_rows, ids_type.list_size, id_bytes, places), batches
