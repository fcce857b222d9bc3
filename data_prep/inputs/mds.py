"""The records of MosaicML's MDS shards, format 2: ids in a column of encoding `ndarray` or `bytes`.

A shard: uint32 samples, uint32 offset of each sample and of the end, a description, the samples. A sample: the uint32
sizes of its columns of variable size, then the columns in the order of index.json.
"""

import json
import posixpath
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.errors import UserError

from .files import open_decompressed, open_file

COLUMNS = ("input_ids", "tokens")  # looked for where tokens_field is not given
VALUE_TYPES = {8: "<u1", 9: "<i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
SHAPE_TYPES = ("<u1", "<u2", "<u4", "<u8")


def read_mds(path: str, column: str) -> Iterator[np.ndarray]:
    """(tokens,) int64 of each sample of a shard. Raises EOFError where it is cut off, UserError without an index."""
    names, encodings, sizes = _columns(path)
    chosen = column or next((name for name in COLUMNS if name in names), "")
    if chosen not in names:
        raise UserError(f"{path}: no column {column or ' or '.join(COLUMNS)!r}; it has {', '.join(names)}")
    at = names.index(chosen)
    variable = [i for i, size in enumerate(sizes) if not size]
    with open_decompressed(path) as file:
        samples = int(np.frombuffer(_exactly(file, 4), "<u4")[0])
        offsets = np.frombuffer(_exactly(file, 4 * (samples + 1)), "<u4").astype(np.int64)
        _exactly(file, int(offsets[0]) - 4 * (samples + 2))  # the description
        for size in np.diff(offsets):
            content = _exactly(file, int(size))
            given = dict(zip(variable, np.frombuffer(content[: 4 * len(variable)], "<u4").tolist()))
            widths = [size or given.get(i, 0) for i, size in enumerate(sizes)]
            start = 4 * len(variable) + sum(widths[:at])
            yield _decode(content[start : start + widths[at]], encodings[at], path)


def _exactly(file: Any, size: int) -> bytes:
    content = file.read(size) if size > 0 else b""
    if size < 0 or len(content) < size:
        raise EOFError("it is cut off: it ends before the samples that its header has")
    return content


def _columns(path: str) -> tuple[list[str], list[str], list[int | None]]:
    """Names, encodings and fixed sizes of the columns, by the index.json beside the shard."""
    folder, base = posixpath.split(path)
    index = posixpath.join(folder, "index.json")
    try:
        with open_file(index) as file:
            found = json.loads(file.read())
        described = [
            shard
            for shard in found["shards"]
            if base in [(shard.get(key) or {}).get("basename") for key in ("raw_data", "zip_data")]
        ]
        names, encodings, sizes = (described[0][f"column_{part}"] for part in ("names", "encodings", "sizes"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {index}, which says what its columns are") from None
    except IndexError:
        raise UserError(f"{index} does not list {base}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of MDS shards: {type(error).__name__} {error}") from None
    return names, encodings, sizes


def _decode(content: bytes, encoding: str, path: str) -> np.ndarray:
    """The ids of one sample. `bytes` are int64, as llm-foundry writes them. Raises UserError for other encodings."""
    name, *arguments = encoding.split(":")
    if name == "bytes":
        return np.frombuffer(content, "<i8") if len(content) % 8 == 0 else _unlike(path, encoding)
    if name != "ndarray":
        raise UserError(f"{path}: its column of ids has the encoding {encoding}; expected ndarray or bytes")
    position = 0
    try:
        if arguments:
            dtype = np.dtype(arguments[0])
        else:
            dtype = np.dtype(VALUE_TYPES[content[0]])
            position = 1
        if len(arguments) < 2:
            dimensions, width = content[position] >> 2, SHAPE_TYPES[content[position] & 3]
            position += 1 + dimensions * np.dtype(width).itemsize
        ids = np.frombuffer(content[position:], dtype)
    except (KeyError, IndexError, ValueError, TypeError):
        return _unlike(path, encoding)
    return ids.astype(np.int64) if dtype.kind in "iu" else _unlike(path, encoding)


def _unlike(path: str, encoding: str) -> np.ndarray:
    raise UserError(f"{path}: a sample's ids are not what the encoding {encoding} of index.json says")
