"""Exact de-duplication: hash the documents of every unit, then choose which of equal documents stays.

In: a job. Out: in DIR/.work/duplicates the documents that are dropped; `drop_duplicates` leaves them out when a unit is
made. Of equal documents the first in the order of the work list stays, in sources with max_tokens only if no other
source has it. Until that is chosen, each unit's hashes lie in .work/SOURCE-INDEX.hashes, sorted into 256 buckets by
their first byte: 257 int64 (where each bucket begins), then the hashes (16 bytes each), then their documents' numbers
in the unit (uint32). The choice is made for a few buckets at a time, and never more than one unit's file is open.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_atomically
from common.log import log

from . import documents
from .config import PrepareConfig
from .inputs.document import Document, Tally, digest
from .inputs.listing import check_unchanged
from .job import Job, load_finished, load_job
from .locks import lock
from .pool import end_if_orphan, run_units, worker_count
from .retrying import with_retries
from .tokenizing import TokenizerSpec
from .work_list import Unit, WorkList, limited_last

BUCKETS = 256
AT_ONCE = 1 << 22  # documents of one choice, about; it takes some 80 bytes of memory a document
HASH_BYTES, NUMBER_BYTES = 16, 4


def deduplicate(config: PrepareConfig, progress: bool = True, task: int = 0, num_tasks: int = 1) -> None:
    """Find the duplicates of `deduplicate: exact`, before the tasks of a cluster; nothing to do for `none`.

    With `num_tasks` > 1 only this task's share of the units is hashed. Raises UserError for bad settings, changed
    files, and while another process works in the folder; ReadFailed for files that cannot be read.
    """
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of num_tasks {num_tasks}, expected 0 to {num_tasks - 1}")
    if config.deduplicate == "none":
        return
    job = load_job(config)
    if load_finished(job) is None:
        with lock(job.directory, task, num_tasks):
            if num_tasks == 1:
                find_duplicates(job, 1, progress)
            elif not is_done(job.directory):
                hash_units(job, job.units[task::num_tasks], progress)


def find_duplicates(job: Job, num_tasks: int, progress: bool, parts: Sequence[WorkList] = ()) -> None:
    """Choose which documents each unit keeps: those of earlier `parts` first, in a part those without max_tokens first.

    Without `parts` the job's list is the only one. Raises UserError in one of several tasks where it is not done.
    """
    if is_done(job.directory):
        return
    if num_tasks > 1:
        raise UserError(
            "deduplicate needs all documents: run `python -m data_prep deduplicate CONFIG` before the tasks"
        )
    units = [unit for part in parts or [job.work] for unit in limited_last(part).units]
    _warn_of_limits(job.config)
    hash_units(job, units, progress)
    dropped = choose(units, job.directory, job.config.num_workers, progress)
    write_atomically(_done_path(job.directory), str(dropped).encode())
    for unit in units:
        hashes_path(job.directory, unit).unlink(missing_ok=True)


def _warn_of_limits(config: PrepareConfig) -> None:
    """Of equal documents of limited sources, the one that stays may be one that max_tokens leaves out."""
    limited = [source.name for source in config.sources if source.max_tokens]
    if len(limited) > 1:
        log.warning(
            "sources %s have max_tokens: a document that %s has beyond its own is dropped from those after it, too",
            ", ".join(limited), limited[0],
        )  # fmt: skip


def is_done(directory: Path) -> bool:
    """Whether it is chosen which documents stay."""
    return _done_path(directory).exists()


def hash_units(job: Job, units: list[Unit], progress: bool) -> None:
    """Write the hashes of those of the units that have none yet."""
    todo = [unit for unit in units if not hashes_path(job.directory, unit).exists()]
    workers = worker_count(job.config.num_workers, len(todo))
    title = f"hash the documents of {len(todo)} of {len(units)} units"
    run_units(todo, lambda unit: (write_hashes, unit, job.config, job.tokenizer), workers, title, progress)


def hashes_path(directory: Path, unit: Unit) -> Path:
    return _hashes_path(directory, unit.source, unit.index)


def _hashes_path(directory: Path, source: str, index: int) -> Path:
    return directory / ".work" / f"{source}-{index:05d}.hashes"


def _done_path(directory: Path) -> Path:
    return directory / ".work" / "unique"


def _dropped_folder(directory: Path) -> Path:
    return directory / ".work" / "duplicates"


def write_hashes(unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec) -> None:
    """Write the hashes of the unit's documents, if no other process has; 20 bytes of memory a document, twice.

    It needs no lock: whoever writes them writes the same. Raises ReadFailed for files that cannot be read, after
    config.read_retries more attempts, and UserError for files that are gone or changed.
    """

    def hashed() -> np.ndarray:
        check_unchanged(unit.files)
        found = b"".join(digest(document) for document in documents.of_unit(unit, config, tokenizer, Tally()))
        check_unchanged(unit.files)  # while they were read, too
        return np.frombuffer(found, dtype=np.uint8).reshape(-1, HASH_BYTES)

    path = hashes_path(Path(config.output_dir), unit)
    end_if_orphan()
    if path.exists():
        return
    hashes = with_retries(hashed, config.read_retries, f"hashing {unit.source} unit {unit.index}")
    order = np.argsort(hashes[:, 0], kind="stable")
    counts = np.bincount(hashes[:, 0], minlength=BUCKETS)
    begins = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
    write_atomically(path, begins.tobytes() + hashes[order].tobytes() + order.astype("<u4").tobytes())


def choose(units: list[Unit], directory: Path, num_workers: int, progress: bool, at_once: int = AT_ONCE) -> int:
    """Write which documents are dropped, where that is not written yet; returns how many they are.

    Of N documents about `at_once` are compared at a time in each process, or N/256 if that is more.
    """
    folder = _dropped_folder(directory)
    folder.mkdir(exist_ok=True)
    documents_of = [_documents(hashes_path(directory, unit)) for unit in units]
    listed = [[unit.source, unit.index, count] for unit, count in zip(units, documents_of)]
    write_atomically(folder / "units.json", json.dumps(listed).encode())
    parts = min(BUCKETS, max(1, -(-sum(documents_of) // at_once)))
    ends = [BUCKETS * (part + 1) // parts for part in range(parts)]
    size = sum(documents_of) * (HASH_BYTES + NUMBER_BYTES) // parts
    chosen = [Unit("duplicates", i, (), begin, end, size) for i, (begin, end) in enumerate(zip([0, *ends], ends))]
    todo = [part for part in chosen if not _part_path(directory, part).exists()]
    workers = worker_count(num_workers, len(todo))
    run_units(todo, lambda part: (choose_part, part, directory), workers, "choose among equal documents", progress)
    return sum(len(np.load(_part_path(directory, part), mmap_mode="r")) for part in chosen)


def _part_path(directory: Path, part: Unit) -> Path:
    """Named by its buckets, so that one written for another number of parts is not taken for it."""
    return _dropped_folder(directory) / f"{part.start:03d}-{part.end:03d}.npy"


def _documents(path: Path) -> int:
    with open(path, "rb") as file:
        return int(np.frombuffer(file.read(8 * (BUCKETS + 1)), dtype="<i8")[-1])


def choose_part(part: Unit, directory: Path) -> None:
    """Write the documents of the buckets `part.start` to `part.end` that are dropped: unit << 32 | number, sorted.

    `unit` is a place in the work list, `number` the document's in the unit.
    """
    listed = json.loads((_dropped_folder(directory) / "units.json").read_bytes())
    hashes, places = [], []
    for number, (source, index, _) in enumerate(listed):
        found, numbers = _read_buckets(_hashes_path(directory, source, index), part.start, part.end)
        hashes.append(found)
        places.append(numbers.astype(np.int64) | number << 32)
    values = np.concatenate(hashes)
    order = np.lexsort((values[:, 1], values[:, 0]))  # stable: equal ones stay in the order of the work list
    values = values[order]
    is_same = (values[1:] == values[:-1]).all(axis=1)
    dropped = np.sort(np.concatenate(places)[order[1:][is_same]])
    end_if_orphan()
    content = io.BytesIO()
    np.save(content, dropped)
    write_atomically(_part_path(directory, part), content.getvalue())


def _read_buckets(path: Path, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes (n, 2) of some of a unit's buckets, and the numbers (n,) of their documents."""
    with open(path, "rb") as file:
        begins = np.frombuffer(file.read(8 * (BUCKETS + 1)), dtype="<i8")
        header, total, begin = file.tell(), int(begins[-1]), int(begins[first])
        count = int(begins[end]) - begin
        file.seek(header + begin * HASH_BYTES)
        hashes = file.read(count * HASH_BYTES)
        file.seek(header + total * HASH_BYTES + begin * NUMBER_BYTES)
        numbers = file.read(count * NUMBER_BYTES)
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2), np.frombuffer(numbers, dtype="<u4")


def drop_duplicates(found: Iterator[Document], directory: Path, unit: Unit, tally: Tally) -> Iterator[Document]:
    """Those of the unit's documents that stay; the others are counted as filtered.

    Raises UserError where there are more or fewer documents than were hashed.
    """
    listed = json.loads((_dropped_folder(directory) / "units.json").read_bytes())
    number, hashed = next(
        (number, count)
        for number, (source, index, count) in enumerate(listed)
        if (source, index) == (unit.source, unit.index)
    )
    is_kept = np.ones(hashed, dtype=bool)
    for path in sorted(_dropped_folder(directory).glob("*.npy")):
        dropped = np.load(path, mmap_mode="r")
        begin, end = np.searchsorted(dropped, [number << 32, (number + 1) << 32])
        is_kept[dropped[begin:end] & 0xFFFFFFFF] = False
        del dropped  # closes the file
    count = 0
    for count, document in enumerate(found, 1):
        if count > hashed:
            break
        if is_kept[count - 1]:
            yield document
        else:
            tally.filtered["duplicate"] += 1
    if count != hashed:
        raise UserError(
            f"{unit.source} unit {unit.index} changed since its documents were hashed: it had {hashed:,} of them and "
            f"has {'more' if count > hashed else f'{count:,}'}; restore its files, the first is "
            f"{unit.files[0].path}, or choose another output_dir"
        )
