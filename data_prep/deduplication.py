"""Exact de-duplication: hash the documents of every unit, then decide which documents each unit keeps.

Of equal documents the first of the work list stays. The hashes lie in DIR/.work until that is decided.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.files import write_atomically

from . import documents
from .config import PrepareConfig
from .inputs.document import Document, Tally, digest
from .tokenizing import TokenizerSpec
from .work_list import Unit

BUCKETS = 64  # hashes are compared a bucket at a time, so that few are in memory


def hashes_path(directory: Path, unit: Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.hashes.npy"


def _kept_path(directory: Path, unit: Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.keep.npy"


def write_hashes(unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec) -> None:
    """Write the 128-bit hashes of the unit's documents, in order: (documents, 2) uint64."""
    found = documents.of_unit(unit, config, tokenizer, Tally())
    digests = b"".join(digest(document) for document in found)
    hashes = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    write_atomically(hashes_path(Path(config.output_dir), unit), _npy(hashes))


def select_kept(units: list[Unit], directory: Path, buckets: int = BUCKETS) -> int:
    """Write for each unit a mask of the documents that it keeps; returns how many are dropped over all units."""
    hashes = [np.load(hashes_path(directory, unit), mmap_mode="r") for unit in units]
    kept = [np.zeros(len(h), dtype=bool) for h in hashes]
    for bucket in range(buckets):
        indices = [np.flatnonzero(h[:, 0] % buckets == bucket) for h in hashes]  # of each unit's documents in it
        values = np.concatenate([h[i] for h, i in zip(hashes, indices)])
        if not len(values):
            continue
        _, first = np.unique(values, axis=0, return_index=True)  # the first occurrence in the order of the work list
        is_first = np.zeros(len(values), dtype=bool)
        is_first[first] = True
        ends = np.cumsum([len(i) for i in indices])
        for mask, i, part in zip(kept, indices, np.split(is_first, ends[:-1])):
            mask[i] = part
    for unit, mask in zip(units, kept):
        write_atomically(_kept_path(directory, unit), _npy(mask))
    return sum(int((~mask).sum()) for mask in kept)


def drop_duplicates(found: Iterator[Document], directory: Path, unit: Unit, tally: Tally) -> Iterator[Document]:
    """Those of the unit's documents that `select_kept` kept; the others are counted as filtered."""
    kept = np.load(_kept_path(directory, unit))
    for i, document in enumerate(found):
        if kept[i]:
            yield document
        else:
            tally.filtered["duplicate"] += 1


def _npy(array: np.ndarray) -> bytes:
    """The content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
