"""Documents' ids into the shard files of one split of one unit.

In: ids and lengths of documents. Out: files, under a temporary name until they are whole, and their entries for the
manifest.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.files import force_to_disk, sha256_of

from . import shards
from .packing import PackedRows, join, make_packer
from .reading import map_file
from .shard_index import index_of


@dataclass(frozen=True)
class RowSettings:
    """What rows are made how."""

    packing: str
    seq_len: int
    dtype: str
    padding_id: int
    tokenizer_fingerprint: str
    shard_mb: int


class ShardWriter:
    """Writes one shard file under a temporary name; `close` renames it and returns its entry."""

    def __init__(self, directory: Path, file: str, shard_schema: pa.Schema):
        self.file = file
        self.schema = shard_schema
        ids_type = shard_schema.field("input_ids").type
        self.seq_len = ids_type.list_size
        self.dtype = str(ids_type.value_type)
        self.rows = 0
        self.documents = 0  # pieces of documents in them
        self._batch_rows = shards.batch_rows(self.seq_len, self.dtype)
        self._waiting: list[PackedRows] = []
        self._waiting_rows = 0
        self.path = directory / file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # no name that another process has: one that was believed dead may still write
        self._temporary = self.path.with_name(f"{self.path.name}.{platform.node()}-{os.getpid()}.tmp")
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_stream(self._sink, shard_schema)

    def append(self, rows: PackedRows) -> None:
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        self.rows += len(rows)
        if self._waiting_rows >= self._batch_rows:
            later = join(self._waiting)
            while len(later) >= self._batch_rows:
                now, later = later.split(self._batch_rows)
                self._write(now)
            self._waiting = [later]
            self._waiting_rows = len(later)

    def _write(self, rows: PackedRows) -> None:
        """Write rows as one record batch."""
        ids = pa.array(rows.ids.ravel().astype(self.dtype, copy=False))
        offsets = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int32)
        pieces = pa.array(rows.lengths.astype(np.uint32))
        columns = [
            pa.FixedSizeListArray.from_arrays(ids, self.seq_len),
            pa.ListArray.from_arrays(pa.array(offsets), pieces),
            pa.array(rows.continues),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self.documents += len(pieces)

    def close(self) -> shards.Shard:
        """Finish the file, which has at least a row; returns its entry for the manifest."""
        if self._waiting_rows:
            self._write(join(self._waiting))
        self._writer.close()
        self._sink.close()
        index, _ = index_of(map_file(self._temporary), self._batch_rows)
        with open(self._temporary, "ab") as file:
            file.write(index.to_bytes())
        force_to_disk(self._temporary)
        digest = sha256_of(self._temporary)
        size = self._temporary.stat().st_size
        os.replace(self._temporary, self.path)
        return shards.Shard(self.file, self.rows, self.rows * self.seq_len, self.documents, size, digest)

    def abandon(self) -> None:
        """Remove what was written."""
        self._sink.close()
        self._temporary.unlink(missing_ok=True)


def remove_unfinished(directory: Path) -> None:
    """Remove the temporary files of processes that were killed, once nothing is written into the corpus any more."""
    for pattern in ("*/*.arrow.*.tmp", "manifest.json.*.tmp", "inputs/*.json.*.tmp"):
        for unfinished in directory.glob(pattern):
            unfinished.unlink(missing_ok=True)


class SplitWriter:
    """Packs the documents of one split of one unit into rows and writes them to shard files.

    Ids wait in the type that is stored; at most a record batch of rows waits (shards.BATCH_BYTES), and with
    `best_fit` a window and its open rows too.
    """

    def __init__(self, directory: Path, source: str, unit: int, split: str, settings: RowSettings):
        self.packer = make_packer(settings.packing, settings.seq_len, settings.padding_id, split)
        self.padding = 0  # tokens
        self._directory = directory
        self._dtype = np.dtype(settings.dtype)
        self._schema = shards.schema(settings.seq_len, settings.dtype, settings.tokenizer_fingerprint)
        self._file_stem = f"{source}/{split}-{unit:05d}"
        batch = shards.batch_rows(settings.seq_len, settings.dtype)
        bytes_per_batch = batch * settings.seq_len * self._dtype.itemsize
        self._rows_per_shard = max(1, (settings.shard_mb << 20) // bytes_per_batch) * batch
        self._writer: ShardWriter | None = None
        self._finished: list[shards.Shard] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray, goes_on: bool = False) -> None:
        """Add documents: their ids end to end, and their lengths; with `goes_on`, the last one continues in the next.

        Raises ValueError for an id that the stored type cannot hold.
        """
        if not len(lengths):
            return
        if len(ids) and ids.dtype != self._dtype and (ids.max() > np.iinfo(self._dtype).max or ids.min() < 0):
            raise ValueError(f"{self._file_stem}: token ids from {ids.min()} to {ids.max()} do not fit {self._dtype}")
        self.packer.add(ids.astype(self._dtype, copy=False), lengths, goes_on)
        self._write(self.packer.take())

    def add_long(self, parts: Iterator[np.ndarray]) -> int:
        """Add one document whose ids come in parts; the rows are those of `add`. Returns its number of tokens."""
        held = np.zeros(0, dtype=self._dtype)  # the last part must be known to be the last
        tokens = 0
        for ids in parts:
            if len(ids) and len(held):
                self.add(held, np.array([len(held)]), goes_on=True)
            if len(ids):
                held = ids
            tokens += len(ids)
        if len(held):
            self.add(held, np.array([len(held)]))
        return tokens

    def finish(self) -> list[shards.Shard]:
        """Write the last rows; returns all shards of the split."""
        self._write(self.packer.take(last=True))
        if self._writer is not None:
            self._close_shard(self._writer)
        return self._finished

    def abandon(self) -> None:
        """Remove the unfinished shard file."""
        if self._writer is not None:
            self._writer.abandon()

    def _write(self, rows: PackedRows) -> None:
        self.padding += rows.ids.size - int(rows.lengths.sum())
        while len(rows):
            if self._writer is None:
                file = f"{self._file_stem}-{len(self._finished):03d}.arrow"
                self._writer = ShardWriter(self._directory, file, self._schema)
            now, rows = rows.split(self._rows_per_shard - self._writer.rows)
            self._writer.append(now)
            if self._writer.rows == self._rows_per_shard:
                self._close_shard(self._writer)

    def _close_shard(self, writer: ShardWriter) -> None:
        self._finished.append(writer.close())
        self._writer = None
