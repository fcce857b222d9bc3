"""Exact de-duplication: every unit's document hashes first, then which documents each unit keeps.

Of equal documents the first of the work list stays. The hashes lie in DIR/.work until the choice is made.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import documents
from .config import PrepareConfig
from .documents import Document, Tally, Unit


def hashes_path(directory: Path, unit: Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.hashes.npy"


def _keep_path(directory: Path, unit: Unit) -> Path:
    return directory / ".work" / f"{unit.source}-{unit.index:05d}.keep.npy"


def write_hashes(unit: Unit, config: PrepareConfig) -> None:
    """128-bit hashes of the unit's documents, in order; (documents, 2) uint64."""
    source = next(source for source in config.sources if source.name == unit.source)
    found = b"".join(documents.digest(document) for document in documents.read(unit, source, Tally()))
    path = hashes_path(Path(config.output_dir), unit)
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.save(file, np.frombuffer(found, dtype="<u8").reshape(-1, 2))
    path.with_suffix(".tmp").replace(path)


def choose(work: list[Unit], directory: Path, buckets: int = 64) -> int:
    """Write for each unit which documents it keeps; returns how many go, over all.

    A bucket of hashes at a time, so that memory holds a part of them.
    """
    hashes = [np.load(hashes_path(directory, unit), mmap_mode="r") for unit in work]
    kept = [np.zeros(len(h), dtype=bool) for h in hashes]
    for bucket in range(buckets):
        places = [np.flatnonzero(h[:, 0] % buckets == bucket) for h in hashes]
        values = np.concatenate([h[place] for h, place in zip(hashes, places)])
        if not len(values):
            continue
        _, first = np.unique(values, axis=0, return_index=True)  # the first of the work list, as np.unique is stable
        is_first = np.zeros(len(values), dtype=bool)
        is_first[first] = True
        for keep, place, part in zip(kept, places, np.split(is_first, np.cumsum([len(p) for p in places])[:-1])):
            keep[place] = part
    for unit, keep in zip(work, kept):
        np.save(_keep_path(directory, unit), keep)
    return sum(int((~keep).sum()) for keep in kept)


def unique(found: Iterator[Document], directory: Path, unit: Unit, tally: Tally) -> Iterator[Document]:
    """Those of the unit's documents that `choose` keeps; the others are counted as filtered."""
    keep = np.load(_keep_path(directory, unit))
    for i, document in enumerate(found):
        if keep[i]:
            yield document
        else:
            tally.filtered["duplicate"] += 1
