"""Is a corpus what its manifest says: sizes, checksums, every row. Each file is read once for both."""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import sha256_of

from .inputs.listing import in_threads
from .pool import start_worker
from .reading import map_file
from .shard_index import index_of, stored_index
from .shards import BATCH_ROWS, Manifest, Shard, SourceEntry, batch_rows, columns, schema, unit_of

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class Task:
    """One shard and what is asked about it."""

    source: str
    shard: Shard
    ends_unit: bool  # it is the last of its unit and split
    is_validation: bool


@dataclass
class Outcome:
    """What one shard's check found."""

    problems: list[str] = field(default_factory=list)  # one line each
    padding: int = 0  # places in rows that hold no document


def check(
    directory: str | Path,
    hashes: bool = True,
    contents: bool = False,
    progress: Callable[[Shard], object] | None = None,
    num_workers: int = 1,
    task: int = 0,
    num_tasks: int = 1,
) -> list[str]:
    """Compare a corpus with its manifest; returns one line per problem, naming the file. Empty when all is well.

    Sizes are always compared, sha256 with `hashes`, and every row with `contents`. `progress` is called after each
    shard. With `num_tasks`, only every num_tasks-th shard from `task` on is looked at. Raises UserError where there is
    no readable manifest, or a worker process was killed.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    tasks = tasks_of(manifest, task, num_tasks)
    outcomes: dict[str, Outcome] = {}
    for one, outcome in run(directory, manifest, tasks, hashes, contents, num_workers):
        outcomes[one.shard.file] = outcome
        if progress:
            progress(one.shard)
    problems = accounting(manifest) if task == 0 else []
    problems += [problem for one in tasks for problem in outcomes[one.shard.file].problems]
    if contents and num_tasks == 1 and not problems:
        for source in manifest.sources:
            found = sum(outcomes[one.shard.file].padding for one in tasks if one.source == source.name)
            if found != source.padding:
                problems.append(
                    f"source {source.name}: {found} padding in its rows, the manifest says {source.padding}"
                )
    return problems


def tasks_of(manifest: Manifest, task: int = 0, num_tasks: int = 1) -> list[Task]:
    """The shards that one of `num_tasks` looks at. Raises UserError for a task that there is not."""
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of num_tasks {num_tasks}, expected 0 to {num_tasks - 1}")
    found = []
    for source in manifest.sources:
        for split in (source.train, source.validation):
            units = [*(unit_of(shard.file) for shard in split), None]
            found += [
                Task(source.name, shard, unit != after, split is source.validation)
                for shard, unit, after in zip(split, units, units[1:])
            ]
    return found[task::num_tasks]


def check_sizes(directory: Path, sources: Iterable[SourceEntry]) -> None:
    """Raise UserError, naming the first, where a shard is missing or has another size: that is seen without reading."""
    found = [shard for source in sources for shard in source.train + source.validation]

    def problem(shard: Shard) -> str | None:
        try:
            size = (directory / shard.file).stat().st_size
        except FileNotFoundError:
            return f"{directory / shard.file} is missing"
        return None if size == shard.bytes else f"{directory / shard.file} has {size} bytes, it had {shard.bytes}"

    problems = [line for line in in_threads(problem, found, "look at shards") if line]
    if problems:
        others = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{others}; run `python -m data_prep repair CONFIG`")


def accounting(manifest: Manifest) -> list[str]:
    """What the manifest alone shows to be wrong, one line each."""
    problems = [problem for source in manifest.sources if (problem := source.token_mismatch())]
    vocab_size = manifest.tokenizer["vocab_size"]
    if vocab_size - 1 > np.iinfo(manifest.dtype).max:
        problems.append(f"manifest.json: {manifest.dtype} cannot hold the ids of a vocabulary of {vocab_size}")
    return problems


def run(
    directory: Path, manifest: Manifest, tasks: list[Task], hashes: bool, contents: bool, num_workers: int
) -> Iterator[tuple[Task, Outcome]]:
    """Each task and its outcome, in the order in which they end."""
    if min(num_workers, len(tasks)) <= 1:
        for one in tasks:
            yield one, check_shard(directory, manifest, one, hashes, contents)
        return
    context = multiprocessing.get_context("forkserver")  # forking would copy locks that threads may hold
    context.set_forkserver_preload(["data_prep.verify"])
    about = replace(manifest, sources=[], parts=[])  # each task is sent with it
    with ProcessPoolExecutor(min(num_workers, len(tasks)), context, initializer=start_worker) as pool:
        futures = {pool.submit(check_shard, directory, about, one, hashes, contents): one for one in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); try a smaller num_workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def check_shard(directory: Path, manifest: Manifest, task: Task, hashes: bool, contents: bool) -> Outcome:
    """Check one shard file: its size, with `hashes` its sha256, with `contents` its rows."""
    shard = task.shard
    path = directory / shard.file
    try:
        if not path.is_file():
            return Outcome([f"{path}: missing"])
        if path.stat().st_size != shard.bytes:
            size = path.stat().st_size
            return Outcome([f"{path}: {size} bytes, the manifest says {shard.bytes}; truncated or replaced"])
        if contents:
            outcome, digest = _check_contents(path, manifest, task, hashes)
        else:
            outcome, digest = Outcome(), sha256_of(path) if hashes else ""
    except OSError as error:
        return Outcome([f"{path}: cannot be read ({error})"])
    if hashes and digest != shard.sha256:
        outcome.problems.insert(
            0, f"{path}: sha256 {digest[:12]}…, the manifest says {shard.sha256[:12]}…; the file was altered"
        )
    return outcome


def _check_contents(path: Path, manifest: Manifest, task: Task, hashes: bool) -> tuple[Outcome, str]:
    """(what is wrong with the rows, sha256 or ""). The hash goes along, so that each page is read once."""
    content = map_file(path)
    digest = hashlib.sha256()
    hashed = 0
    outcome = Outcome()
    version_1 = manifest.version == 1
    try:
        rows = batch_rows(manifest.seq_len, manifest.dtype)
        index, batches = index_of(content, BATCH_ROWS if version_1 else rows)
        expected = schema(manifest.seq_len, manifest.dtype, manifest.tokenizer["fingerprint"], manifest.version)
        if not batches[0].schema.equals(expected, check_metadata=True):
            raise pa.ArrowInvalid("its schema differs from the manifest's seq_len, dtype or tokenizer")
        if index.rows != task.shard.rows:
            raise pa.ArrowInvalid(f"{index.rows} rows, the manifest says {task.shard.rows}")
        pieces = sum(len(batch.column(1).values) for batch in batches)
        if pieces != task.shard.documents:
            raise pa.ArrowInvalid(f"{pieces} pieces of documents, the manifest says {task.shard.documents}")
        end = len(content) if version_1 else len(content) - index.size
        if content[end - 8 : end].tobytes() != END_OF_STREAM:
            raise pa.ArrowInvalid("no end marker where its rows end")
        stored = None if version_1 else stored_index(content)
        if not version_1 and (stored is None or stored.to_bytes() != index.to_bytes()):
            raise pa.ArrowInvalid("its index does not point to its rows")
        found: dict[str, list] = {}  # what is wrong: the first such row, how many there are
        for number, batch in enumerate(batches):
            batch.validate(full=True)
            if hashes:
                upto = batch.column(0).values.buffers()[1]
                stop = upto.address + upto.size - content.ctypes.data
                digest.update(content[hashed:stop].data)
                hashed = stop
            is_last = number == len(batches) - 1
            outcome.padding += _check_batch(batch, number * index.batch_rows, manifest, task, is_last, found)
        for what, (row, count) in found.items():
            others = f" (and {count - 1} more rows)" if count > 1 else ""
            outcome.problems.append(f"{path}: row {row}: {what}{others}")
    except pa.ArrowException as error:
        outcome.problems.append(f"{path}: {str(error).splitlines()[0]}")
    if not hashes:
        return outcome, ""
    digest.update(content[hashed:].data)
    return outcome, digest.hexdigest()


def _check_batch(
    batch: pa.RecordBatch, first: int, manifest: Manifest, task: Task, is_last: bool, found: dict[str, list]
) -> int:
    """Add to `found` what is wrong with the rows of a batch, whose first is row `first`; returns its padding."""
    ids, lengths, offsets, continues = columns(batch)
    ids = ids.reshape(len(batch), manifest.seq_len)

    def bad(rows: np.ndarray, what: str) -> None:
        numbers = np.flatnonzero(rows)
        if len(numbers):
            found.setdefault(what, [first + int(numbers[0]), 0])[1] += len(numbers)

    ends = np.cumsum(lengths, dtype=np.int64)
    totals = np.diff(np.append(0, ends)[offsets])
    has_empty = np.diff(offsets) == 0
    if (lengths == 0).any():
        has_empty[np.repeat(np.arange(len(batch)), np.diff(offsets))[lengths == 0]] = True
    bad(has_empty, "a document of no tokens")
    bad(totals > manifest.seq_len, f"document lengths sum to more than {manifest.seq_len}")
    concat = manifest.packing == "concat"
    padded = totals < manifest.seq_len
    allowed = np.zeros(len(batch), dtype=bool)
    allowed[-1] = is_last and task.ends_unit and task.is_validation  # where held-out documents end
    bad(padded & ~allowed if concat else np.zeros(0), f"document lengths sum to less than {manifest.seq_len}")
    if ids.max() >= manifest.tokenizer["vocab_size"]:
        bad(ids.max(axis=1) >= manifest.tokenizer["vocab_size"], f"token id {ids.max()} is outside the vocabulary")
    bad(continues & (padded | allowed | (not concat)), "last_continues is true, but nothing follows")
    return int((manifest.seq_len - totals).sum())
