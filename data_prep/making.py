"""Makes the units of a job: which of them, with which engine, and up to how many tokens of their source.

In: a job. Out: shards and records of its units, which `merging` puts together.
"""

from collections import Counter

from common.log import log

from . import tokenizing, worker
from .job import Job, select_engine
from .pool import run_units, worker_count
from .work_list import Unit

MIN_DOCUMENTS_TO_WARN = 1000  # of a source, before its share of unusable documents says something


def engine_of_job(job: Job) -> str:
    """The name of the engine to make units with, which is logged with the reason."""
    problem = worker.reference_only(job.directory)
    if problem is not None:
        log.info("tokenizing with tokenizers: another engine is not used any more: %s", problem)
        return tokenizing.Reference.name
    engine, reason = select_engine(job)
    log.info("tokenizing with %s %s: %s", engine.name, engine.version, reason)
    return engine.name


def make_units(job: Job, units: list[Unit], engine: str, progress: bool) -> None:
    """Make every unit that is not made yet, except those beyond their source's max_tokens.

    When the fast engine gives wrong ids, the units that it made before are made again. Raises what `process_unit` does.
    """
    directory = job.directory
    todo = [unit for unit in units if not worker.is_made(directory, unit)]
    workers = worker_count(job.config.num_workers, len(todo))
    parallel = workers == 1  # then the tokenizer may use threads
    problem = worker.reference_only(directory)
    budgets = {source.name: _Budget(job, source.name, source.max_tokens) for source in job.config.sources}
    usable = _Usable(job.config.max_bad_fraction)

    def task(unit: Unit) -> tuple | None:
        left = budgets[unit.source].left(unit)
        if left == 0:
            return None
        return worker.process_unit, unit, job.config, job.tokenizer, engine, parallel, left or 0

    def done(unit: Unit, record: dict) -> None:
        nonlocal problem
        usable.add(unit.source, record)
        if problem is None and (problem := worker.reference_only(directory)) is not None:
            log.warning("%s is not used any more: %s; its units are made again with tokenizers", engine, problem)

    run_units(todo, task, workers, f"tokenize and pack {len(todo)} of {len(units)} units", progress, done)
    if problem is not None and engine != tokenizing.Reference.name:
        make_units(job, units, tokenizing.Reference.name, progress)


class _Budget:
    """How many of a source's max_tokens are left for a unit, as far as the finished records tell."""

    def __init__(self, job: Job, source: str, max_tokens: int):
        self._directory = job.directory
        self._units = [unit for unit in job.units if unit.source == source] if max_tokens else []
        self._left = max_tokens
        self._next = 0  # the first unit whose tokens are not subtracted

    def left(self, unit: Unit) -> int | None:
        """None: no limit. More than in the end, while units before this one are not made."""
        if not self._units:
            return None
        while self._left and self._units[self._next].index < unit.index:
            record = worker.read_record(self._directory, self._units[self._next])
            if record is None:
                break
            self._left = 0 if record["cut"] else max(0, self._left - record["tokens"])
            self._next += 1
        return self._left


class _Usable:
    """Warns once of each source whose documents seem to be unusable; whether they are is known at the end."""

    def __init__(self, max_bad_fraction: float):
        self._limit = max_bad_fraction
        self._documents: Counter = Counter()
        self._bad: Counter = Counter()
        self._warned: set[str] = set()

    def add(self, source: str, record: dict) -> None:
        bad = sum(record["bad"].values())
        self._documents[source] += record["documents"] + bad
        self._bad[source] += bad
        count, total = self._bad[source], self._documents[source]
        if source not in self._warned and total >= MIN_DOCUMENTS_TO_WARN and count > self._limit * total:
            self._warned.add(source)
            log.warning(
                "source %s: %s of the first %s documents cannot be used (in the last unit %s); if it stays more than "
                "max_bad_fraction=%g, the corpus cannot be finished",
                source, f"{count:,}", f"{total:,}", record["bad"] or "none", self._limit,
            )  # fmt: skip
