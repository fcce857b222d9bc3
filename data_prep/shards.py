"""The shard format: its only home. Writer, memory-mapped reader, manifest, verification.

A corpus is a folder:

    DIR/manifest.json            what is there, made how, with every file's size and sha256
    DIR/<source>/train-00000-000.arrow         Arrow IPC streams, one row of `seq_len` tokens a record
    DIR/<source>/validation-00000-000.arrow

Columns: `input_ids` fixed_size_list<uint16 or uint32>[seq_len]; `document_lengths` list<uint32>, the
lengths of the pieces of documents in the row; where they sum to less than seq_len, the rest is padding.
Any Arrow tool reads them. They are streams, not Arrow files, because `datasets.Dataset.from_file`
memory-maps streams.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import force_to_disk, sha256_of, write_atomically

from .packing import PackedRows

FORMAT = "diffullama-shards"
VERSION = 2
READABLE = (1, 2)  # versions: the first has no last_continues, no index at a shard's end
BATCH_ROWS = 1024  # rows per record batch, all but a shard's last: so a row's batch is a division
SPLITS = ("train", "validation")
MORE_VALIDATION = "a larger validation_fraction, a smaller seq_len or more documents"  # what gives validation rows


@dataclass
class Shard:
    file: str  # relative to the corpus folder
    rows: int
    tokens: int
    documents: int  # pieces of documents in its rows
    bytes: int
    sha256: str


@dataclass
class Part:
    """What one `prepare` or `append` made of a corpus."""

    corpus_hash: str = field(metadata={"json": "recipe"})  # of the settings and inputs that decide its bytes
    inputs: str  # the file with its work list, relative to the corpus folder
    units: dict[str, int]  # of each of its sources


@dataclass
class SourceEntry:
    """One source of the manifest: what was read, and the shards made of it."""

    name: str
    weight: float
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # of text, as UTF-8
    bad: dict[str, int] = field(default_factory=dict)  # unusable documents, by reason
    filtered: dict[str, int] = field(default_factory=dict)  # documents that were not wanted, by reason
    damaged: list[str] = field(default_factory=list)  # files that could not be read to their end
    ignored: dict[str, int] = field(default_factory=dict)  # files in its folders that are no documents, by suffix
    special_tokens: dict[str, int] = field(default_factory=dict)  # documents whose text has a special token, by token
    not_read_bytes: int = 0  # of files, beyond max_tokens
    max_epochs: float = 0  # training repeats no row more often; 0: no limit
    tokens: int = 0  # with BOS and EOS; = places in rows - padding + dropped tokens
    dropped_tokens: int = field(default=0, metadata={"json": "remainder"})  # at the ends of units, filled no row
    padding: int = 0  # places in rows that hold no document
    train: list[Shard] = field(default_factory=list)
    validation: list[Shard] = field(default_factory=list)

    def token_mismatch(self) -> str | None:
        """A description of the difference when the tokens read are not the tokens in rows and the dropped ones."""
        in_rows = sum(shard.tokens for shard in self.train + self.validation)
        if self.tokens + self.padding == in_rows + self.dropped_tokens:
            return None
        return (
            f"source {self.name}: {self.tokens} tokens + {self.padding} padding, but {in_rows} in rows + "
            f"{self.dropped_tokens} dropped"
        )


@dataclass
class Manifest:
    """What a corpus folder holds and how it was made."""

    seq_len: int
    dtype: str
    packing: str
    tokenizer: dict  # name, fingerprint, vocab_size, add_bos, add_eos, special_ids, engine
    corpus_hash: str = field(metadata={"json": "recipe"})  # of the settings and inputs that decide the bytes
    sources: list[SourceEntry]
    parts: list[Part] = field(default_factory=list)
    format: str = FORMAT
    version: int = VERSION

    def save(self, directory: Path) -> None:
        write_atomically(directory / "manifest.json", json.dumps(_to_json(self), indent=1).encode() + b"\n")

    @property
    def fingerprint(self) -> str:
        """Hash of what a training run draws its rows from: the content of every shard, in order, and the weights."""
        sources = [
            [source.name, source.weight, [[shard.sha256 for shard in getattr(source, split)] for split in SPLITS]]
            for source in self.sources
        ]
        content = json.dumps([self.seq_len, self.tokenizer["fingerprint"], sources])
        return hashlib.sha256(content.encode()).hexdigest()

    def without_validation(self) -> list[SourceEntry]:
        """The sources that have no validation row."""
        return [source for source in self.sources if not source.validation]

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Raises UserError where there is no manifest, or one of another format."""
        path = Path(directory) / "manifest.json"
        if not path.is_file():
            raise UserError(f"{path} not found: make the corpus with `python -m data_prep prepare CONFIG.yaml`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); prepare the corpus again") from None
        if content.get("format") != FORMAT or content.get("version") not in READABLE:
            found = f"{content.get('format')!r} version {content.get('version')!r}"
            raise UserError(f"{path}: found format {found}, expected {FORMAT!r} version {VERSION}")
        content["parts"] = [_from_json(Part, part) for part in content.get("parts", [])]
        for source in content["sources"]:
            for split in SPLITS:
                source[split] = [_from_json(Shard, shard) for shard in source[split]]
        content["sources"] = [_from_json(SourceEntry, source) for source in content["sources"]]
        return _from_json(cls, content)


def _to_json(value: Any) -> Any:
    """A dataclass as a dict. A field with the metadata `json` has that name there, which older files use."""
    if is_dataclass(value):
        return {f.metadata.get("json", f.name): _to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list):
        return [_to_json(element) for element in value]
    return value


def _from_json(cls: type, content: dict) -> Any:
    names: dict[str, str] = {f.metadata.get("json", f.name): f.name for f in fields(cls)}
    values: Any = {names.get(key, key): value for key, value in content.items()}
    return cls(**values)


def dtype_for(vocab_size: int) -> str:
    """The smallest type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def schema(seq_len: int, dtype: str, tokenizer_fingerprint: str) -> pa.Schema:
    about = {"format": FORMAT, "version": str(VERSION), "tokenizer": tokenizer_fingerprint}
    ids = pa.list_(getattr(pa, dtype)(), seq_len)
    fields = [pa.field("input_ids", ids, nullable=False), pa.field("document_lengths", pa.list_(pa.uint32()))]
    return pa.schema(fields, metadata=about)


class ShardWriter:
    """Writes one shard file under a temporary name; `close` renames it and returns its entry."""

    def __init__(self, directory: Path, file: str, shard_schema: pa.Schema):
        self.file = file
        self.schema = shard_schema
        self.seq_len = shard_schema.field("input_ids").type.list_size
        self.rows = 0
        self.documents = 0  # pieces of documents in them
        self._waiting: list[PackedRows] = []
        self._waiting_rows = 0
        self.path = directory / file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_stream(self._sink, shard_schema)

    def append(self, rows: PackedRows) -> None:
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        self.rows += len(rows)
        while self._waiting_rows >= BATCH_ROWS:
            self._flush(BATCH_ROWS)

    def _flush(self, count: int) -> None:
        """Write `count` of the waiting rows as one record batch."""
        waiting = PackedRows(
            np.concatenate([rows.ids for rows in self._waiting]),
            np.concatenate([rows.lengths for rows in self._waiting]),
            np.concatenate([rows.counts for rows in self._waiting]),
        )
        rows, later = waiting.split(count)
        self._waiting = [later]
        self._waiting_rows = len(later)
        id_type, length_type = self.schema.types
        flat = pa.array(rows.ids.ravel().astype(id_type.value_type.to_pandas_dtype()))
        offsets = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int32)
        pieces = pa.array(rows.lengths.astype(length_type.value_type.to_pandas_dtype()))
        columns = [
            pa.FixedSizeListArray.from_arrays(flat, self.seq_len),
            pa.ListArray.from_arrays(pa.array(offsets), pieces),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self.documents += len(pieces)

    def close(self) -> Shard:
        """Finish the file; returns its entry for the manifest."""
        if self._waiting_rows:
            self._flush(self._waiting_rows)
        self._writer.close()
        self._sink.close()
        force_to_disk(self._temporary)
        digest = sha256_of(self._temporary)
        size = self._temporary.stat().st_size
        os.replace(self._temporary, self.path)
        return Shard(self.file, self.rows, self.rows * self.seq_len, self.documents, size, digest)

    def abandon(self) -> None:
        """Remove what was written."""
        self._sink.close()
        self._temporary.unlink(missing_ok=True)


class ShardReader:
    """One memory-mapped shard: the arrays of its record batches are views of the file.

    Raises UserError when the file is not a readable Arrow file.
    """

    def __init__(self, path: str | Path):
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            batches = list(reader)  # the batches' headers; their rows stay on disk until read
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path} is not a complete Arrow stream ({str(error).splitlines()[0]}); "
                "run `python -m data_prep verify` on its corpus, then prepare it again"
            ) from None
        self.schema = reader.schema
        self.seq_len = self.schema.field("input_ids").type.list_size
        self.rows = sum(batch.num_rows for batch in batches)
        # one array per record batch
        self.ids = [batch.column(0).flatten().to_numpy() for batch in batches]  # (rows * seq_len,)
        self.lengths = [batch.column(1).values.to_numpy() for batch in batches]  # (pieces,) of all rows
        self.offsets = [batch.column(1).offsets.to_numpy() for batch in batches]  # (rows + 1,) into lengths


class ShardedRows:
    """The rows of one split of one source, over all its shards, which are opened when first read."""

    def __init__(self, directory: Path, shards: list[Shard]):
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._paths = [directory / shard.file for shard in shards]
        self._open = lru_cache(maxsize=512)(lambda i: ShardReader(self._paths[i]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids (seq_len,), document_lengths (documents,)) as views of the file."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self._open(number)
        batch, i = divmod(index - int(self._starts[number]), BATCH_ROWS)
        offsets = shard.offsets[batch]
        ids = shard.ids[batch][i * shard.seq_len : (i + 1) * shard.seq_len]
        return ids, shard.lengths[batch][offsets[i] : offsets[i + 1]]
