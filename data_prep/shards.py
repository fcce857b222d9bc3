"""The shard format: its only home. Layout, memory-mapped reader, manifest; writing.py writes it.

A corpus is a folder:

    DIR/manifest.json            what is there, made how, with every file's size and sha256
    DIR/<source>/train-00000-000.arrow         Arrow IPC streams, one row of `seq_len` tokens a record
    DIR/<source>/validation-00000-000.arrow

Columns: `input_ids` fixed_size_list<uint16 or uint32>[seq_len]; `document_lengths` list<uint32>, the
lengths of the pieces of documents in the row; where they sum to less than seq_len, the rest is padding;
`last_continues` bool, whether the row's last document goes on after the row: in the next one, or among the
tokens dropped at the end of a unit. Only `concat` sets it: with `best_fit` no row continues the one before.
Any Arrow tool reads them. They are streams, not Arrow files, because `datasets.Dataset.from_file`
memory-maps streams.

Behind the stream's end marker, where Arrow readers stop, lies an index (shard_index.py). With it a row is
found without parsing the headers before it. Version 1 has no index and no last_continues.
"""

import hashlib
import json
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import write_atomically

from .reading import FileRegion, most_mappings
from .shard_index import INDEXED, index_of, stored_index

FORMAT = "diffullama-shards"
VERSION = 2
READABLE = (1, 2)  # versions: the first has no last_continues, no index at a shard's end
BATCH_ROWS = 1024  # rows per record batch, all but a shard's last: so a row's batch is a division
BATCH_BYTES = 1 << 24  # of ids; long rows have fewer a batch, so that a writer holds no more
SPLITS = ("train", "validation")
MORE_VALIDATION = "a larger validation_fraction or more documents"  # what gives validation rows


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
    cut: dict[str, list[int]] = field(default_factory=dict)  # of sources that max_tokens ended: last unit, its tokens


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
            if content.get("format") != FORMAT or content.get("version") not in READABLE:
                found = f"{content.get('format')!r} version {content.get('version')!r}"
                raise UserError(f"{path}: found format {found}, expected {FORMAT!r} version {VERSION}")
            content["parts"] = [_from_json(Part, part) for part in content.get("parts", [])]
            for source in content["sources"]:
                for split in SPLITS:
                    source[split] = [_from_json(Shard, shard) for shard in source[split]]
            content["sources"] = [_from_json(SourceEntry, source) for source in content["sources"]]
            return _from_json(cls, content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); restore it from a copy, or make the corpus again in another folder"
            ) from None


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


def unit_of(file: str) -> int:
    """The number of the unit that a shard file was made of: 12 of source/train-00012-003.arrow."""
    return int(file.rsplit("-", 2)[1])


def dtype_for(vocab_size: int) -> str:
    """The smallest type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def batch_rows(seq_len: int, dtype: str) -> int:
    """Rows of each record batch but the last."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // (seq_len * np.dtype(dtype).itemsize)))


def schema(seq_len: int, dtype: str, tokenizer_fingerprint: str, version: int = VERSION) -> pa.Schema:
    about = {"format": FORMAT, "version": str(version), "tokenizer": tokenizer_fingerprint}
    ids = pa.list_(getattr(pa, dtype)(), seq_len)
    columns = [pa.field("input_ids", ids, nullable=False), pa.field("document_lengths", pa.list_(pa.uint32()))]
    if version > 1:
        columns.append(pa.field("last_continues", pa.bool_(), nullable=False))
    return pa.schema(columns, metadata=about)


def columns(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A record batch as arrays: (ids (rows * seq_len,), document_lengths of all rows, their offsets (rows + 1,),
    last_continues (rows,)).
    """
    ids, lengths = batch.column(0), batch.column(1)
    if batch.num_columns > 2:
        continues = batch.column(2).to_numpy(zero_copy_only=False)
    else:
        continues = np.zeros(len(batch), dtype=bool)
    return ids.values.to_numpy(), lengths.values.to_numpy(), lengths.offsets.to_numpy(), continues


class ShardedRows:
    """The rows of one split of one source, over all its shards.

    A shard is mapped when it is first read, and stays so without a file descriptor. All shards lie in one region of
    addresses, so that a row is found by numbers alone: objects of 20,000 shards would not stay in the CPU's caches.
    Beyond as many shards as the kernel lets a process map, a shard is mapped anew for each row.
    """

    _mapped = 0  # mappings of all instances
    _most_mapped = most_mappings()
    _own = 0  # mappings of this one

    def __init__(self, directory: Path, shards: list[Shard]):
        self._directory = directory
        self._shards = shards
        self._starts = array("q", [0, *accumulate(shard.rows for shard in shards)])
        try:
            self._region = FileRegion([shard.bytes for shard in shards])
        except OSError:  # the process may not have so many addresses
            if len(shards) == 1:
                raise
            self._region = FileRegion([])
            self._most_mapped = 0
        self._places = array("q", self._region.places)
        self._indices = array("q", bytes(8 * len(shards)))  # where each shard's index lies in the region; 0: not mapped
        self._computed: dict[int, bytes] = {}  # the index of each shard that has none itself, those of version 1
        self._bytes = np.asarray(self._region)
        self._memory = self._bytes.data
        self._lengths = self._bytes.view("<u4")
        self._layout: tuple[int, int, int] | None = None  # rows of a batch, seq_len, bytes of an id

    def __del__(self) -> None:
        ShardedRows._mapped -= self._own

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids (seq_len,), document_lengths (documents,)) as views of the file. Raises UserError for a bad shard."""
        number = bisect_right(self._starts, index) - 1
        index -= self._starts[number]
        table = self._indices[number]
        if not table:
            if ShardedRows._mapped >= self._most_mapped and len(self._shards) > 1:
                return ShardedRows(self._directory, self._shards[number : number + 1]).row(index)
            table = self._map(number)
        batch, i = divmod(index, self._batch_rows)
        if self._computed and number in self._computed:
            ids, offsets, lengths, _ = INDEXED.unpack_from(self._computed[number], batch * INDEXED.size)
        else:
            ids, offsets, lengths, _ = INDEXED.unpack_from(self._memory, table + batch * INDEXED.size)
        place = self._places[number]
        begin, end = _TWO.unpack_from(self._memory, place + offsets + 4 * i)
        lengths = (place + lengths) // 4
        if not 0 <= begin < end <= table // 4 - lengths:  # beyond it, there may be no memory
            raise self._bad(number, f"the lengths of row {index} lie outside of it")
        first = (place + ids) // self._id_bytes + i * self._seq_len
        return self._ids[first : first + self._seq_len], self._lengths[lengths + begin : lengths + end]

    def _map(self, number: int) -> int:
        """Map a shard; returns where its index lies in the region, or its end where it has none."""
        shard = self._shards[number]
        place = self._places[number]
        try:
            self._region.add(number, self._path(number))
            content = self._bytes[place : place + shard.bytes]
            index = stored_index(content)
            if index is None:
                index = index_of(content, BATCH_ROWS)[0]
                self._computed[number] = index.table.tobytes()
                end = place + shard.bytes
            else:
                end = place + shard.bytes - index.size
            index.check(end - place)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._bad(number, str(error).splitlines()[0]) from None
        if (index.rows, index.rows * index.seq_len) != (shard.rows, shard.tokens):
            raise self._bad(number, f"{index.rows} rows of {index.seq_len} tokens, the manifest says {shard.rows} rows")
        layout = (index.batch_rows, index.seq_len, index.id_bytes)
        if self._layout is None:
            self._batch_rows, self._seq_len, self._id_bytes = self._layout = layout
            self._ids = self._bytes.view(f"<u{index.id_bytes}")
        if layout != self._layout:
            raise self._bad(number, "its rows are laid out otherwise than those of the shards before")
        # two more parts of the region, unless a neighbour is mapped already
        new = 2 - sum(
            bool(self._indices[other]) for other in (number - 1, number + 1) if 0 <= other < len(self._shards)
        )
        ShardedRows._mapped += new
        self._own += new
        self._indices[number] = end
        return end

    def _bad(self, number: int, what: str) -> UserError:
        advice = "run `python -m data_prep repair CONFIG`, with the configuration of its corpus"
        return UserError(f"{self._path(number)} is not a complete shard ({what}); {advice}")

    def _path(self, number: int) -> str:
        return f"{self._directory}/{self._shards[number].file}"  # joining paths takes longer than opening a file


_TWO = Struct("<2i")  # where the lengths of a row begin and end
