"""Writers of others' token files, written from their layouts alone: what tests compare our readers with."""

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MEGATRON_CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}


def write_megatron(folder: Path, documents: list[list[int]], dtype: str = "u2", sentences: int = 1) -> Path:
    """X.bin and X.idx; each document as `sentences` sequences."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [np.array_split(np.array(ids, dtype), sentences) for ids in documents]
    sequences = [part for document in parts for part in document]
    sizes = [len(part) for part in sequences]
    pointers = [sum(sizes[:i]) * np.dtype(dtype).itemsize for i in range(len(sizes))]
    ends = [i * sentences for i in range(len(documents) + 1)]
    (folder / "x.bin").write_bytes(b"".join(part.tobytes() for part in sequences))
    (folder / "x.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(sizes), len(ends))
        + struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
        + struct.pack(f"<{len(ends)}q", *ends)
    )  # fmt: skip
    return folder / "x.bin"


def write_datatrove(folder: Path, documents: list[list[int]], dtype: str = "u2") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "000_x.ds").write_bytes(b"".join(np.array(ids, dtype).tobytes() for ids in documents))
    ends = np.cumsum([len(ids) for ids in documents])
    (folder / "000_x.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    (folder / "000_x.ds.metadata").write_text(f"gpt2|{np.dtype(dtype).itemsize}\n{ends[-1]}\n0.0 B")
    return folder / "000_x.ds"


def write_mds(folder: Path, documents: list[list[int]], encoding: str = "ndarray:uint16", suffix: str = "") -> Path:
    """index.json and one shard, with a column of text beside the ids."""
    import gzip

    import zstandard

    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number, ids in enumerate(documents):
        if encoding == "bytes":
            cell = np.array(ids, "<i8").tobytes()
        else:
            dynamic = encoding == "ndarray"
            dtype = "<i4" if dynamic else encoding.split(":")[1]
            shape = bytes([(1 << 2) | 1]) + struct.pack("<H", len(ids))
            cell = bytes([33]) * dynamic + shape + np.array(ids, dtype).tobytes()
        name = f"document {number}".encode()
        samples.append(struct.pack("<II", len(name), len(cell)) + name + cell)
    about = json.dumps({"compression": None}).encode()
    first = 4 * (len(samples) + 2) + len(about)
    offsets = np.cumsum([first, *map(len, samples)]).astype("<u4")
    content = struct.pack("<I", len(samples)) + offsets.tobytes() + about + b"".join(samples)
    compress = {"": bytes, ".gz": gzip.compress, ".zstd": zstandard.ZstdCompressor().compress}
    (folder / f"shard.00000.mds{suffix}").write_bytes(compress[suffix](content))
    shard = {
        "version": 2, "format": "mds", "column_names": ["about", "tokens"], "column_encodings": ["str", encoding],
        "column_sizes": [None, None], "samples": len(samples), "compression": None,
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(content), "hashes": {}},
        "zip_data": {"basename": f"shard.00000.mds{suffix}", "bytes": 0, "hashes": {}} if suffix else None,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    return folder


def write_columns(folder: Path, documents: list[list[int]], kind: str = "parquet") -> Path:
    """A column `input_ids` beside a column `n`: Parquet of several row groups, Arrow, JSONL or a saved dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"input_ids": pa.array(documents, pa.list_(pa.int32())), "n": list(range(len(documents)))})
    if kind == "parquet":
        pq.write_table(table, folder / "x.parquet", row_group_size=7)
    elif kind == "arrow":
        with pa.ipc.new_stream(str(folder / "x.arrow"), table.schema) as writer:
            writer.write_table(table)
    elif kind == "jsonl":
        (folder / "x.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    else:
        import datasets

        datasets.Dataset.from_dict({"input_ids": documents}).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    return folder / f"x.{kind}"
