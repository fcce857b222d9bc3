"""The pipeline: configuration → work list → tokenised, packed shards → manifest.

Each unit of work writes its own shards and then a small record in DIR/.work; a unit with a record is
done. So a run that was killed continues where it was, and neither the number of processes, nor that of
machines, nor an interruption changes a byte. On a cluster, each of `num_tasks` tasks makes every
num_tasks-th unit, and `merge` writes the manifest.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import write_atomically

from . import deduplication, documents, shards, tokenizing, unit
from .config import PrepareConfig, check_prepare


def prepare(config: PrepareConfig, progress: bool = True, task: int = 0, num_tasks: int = 1) -> shards.Manifest | None:
    """Make the corpus of `config` in its output_dir, or finish one that was interrupted.

    With `num_tasks` > 1 only this task's share, and no manifest: returns None. Raises UserError before
    writing for bad settings, missing files, or a folder that holds another corpus; after reading for
    an empty corpus or too many documents that cannot be used.
    """
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of num_tasks {num_tasks}, expected 0 to {num_tasks - 1}")
    recipe, work, settings = _load(config)
    directory = Path(config.output_dir)
    finished = _finished(config, work, settings)
    if finished is not None:
        return finished
    with _lock(directory, task, num_tasks):
        _same_recipe(directory, _recipe(settings, work))
        if config.deduplicate == "exact":
            _deduplicate(config, work, num_tasks, progress)
        engine = _choose_engine(config, recipe, work)
        _run(config, work[task::num_tasks], recipe, engine, progress)
        return _merge(config, recipe, settings, work) if num_tasks == 1 else None


def merge(config: PrepareConfig) -> shards.Manifest:
    """The one manifest, when all tasks are done. Raises UserError naming how many units are missing."""
    recipe, work, settings = _load(config)
    finished = _finished(config, work, settings)
    if finished is not None:
        return finished
    directory = Path(config.output_dir)
    with _lock(directory, 0, 1):
        _same_recipe(directory, _recipe(settings, work))
        missing = [u for u in work if not unit.record_path(directory, u).exists()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(work)} units are not made yet, first {missing[0].source} {missing[0].index}; "
                "run the missing tasks again, then merge"
            )
        return _merge(config, recipe, settings, work)


def plan(config: PrepareConfig) -> str:
    """What `prepare` would do: files, bytes, estimated tokens and time, from a sample. Writes nothing."""
    recipe, work, _ = _load(config)
    engine, why = _engine_of(config, recipe, work)
    lines = [f"engine         {engine.name} {engine.version}: {why}"]
    total_tokens = total_seconds = 0.0
    for source in config.sources:
        mine = [u for u in work if u.source == source.name]
        began, texts, tally = time.perf_counter(), [], documents.Tally()
        text_bytes = kept = 0
        for document in documents.read(mine[0], source, tally):
            text = document if isinstance(document, str) else next(document.blocks())
            text_bytes += len(text.encode("utf-8", "replace")) if isinstance(document, str) else document.bytes
            if kept < 8 << 20:
                texts.append(text)
                kept += len(text.encode("utf-8", "replace"))
        reading = time.perf_counter() - began
        began = time.perf_counter()
        tokens = len(engine.encode(texts)[0]) + len(texts) * (config.add_bos + config.add_eos)
        tokenising = time.perf_counter() - began
        size = sum(u.size for u in mine)
        whole = size / max(1, mine[0].size) * text_bytes  # text bytes, as the first unit has them
        estimated = whole * tokens / max(1, kept)
        seconds = whole * (reading / max(1, text_bytes) + tokenising / max(1, kept))
        total_tokens, total_seconds = total_tokens + estimated, total_seconds + seconds
        files = len({name for u in mine for name in u.files})
        lines.append(
            f"{source.name:<14} {files:,} files, {size / 1e6:,.1f} MB, {len(mine):,} units; about "
            f"{estimated / 1e6:,.1f}M tokens = {estimated / config.seq_len:,.0f} rows"
        )
    workers = min(config.num_workers or os.cpu_count() or 1, len(work))
    lines.append(
        f"total          about {total_tokens / 1e6:,.1f}M tokens, {total_seconds / workers / 60:,.1f} minutes "
        f"with {workers} process(es), estimated from the first unit of each source"
    )
    return "\n".join(lines)


def _load(config: PrepareConfig):
    """(the tokenizer's recipe, work list, settings that decide the bytes), all checked."""
    check_prepare(config)
    tokenizer = tokenizing.load_tokenizer(config.tokenizer, config.tokenizer_revision)
    for wanted, name in ((config.add_bos, "bos_token"), (config.add_eos, "eos_token")):
        if wanted and getattr(tokenizer, f"{name}_id") is None:
            raise UserError(f"add_{name[:3]} is true, but tokenizer {config.tokenizer!r} has no {name}")
    recipe = tokenizing.recipe_of(tokenizer, config.tokenizer, config.tokenizer_revision)
    work = [u for source in config.sources for u in documents.units(source, int(config.unit_mb * 2**20))]
    names = ("seq_len", "packing", "add_bos", "add_eos", "validation_fraction", "deduplicate", "unit_mb", "shard_mb")
    settings = {
        "version": shards.VERSION,
        "tokenizer": recipe.fingerprint,
        **{name: getattr(config, name) for name in names},
        "sources": {s.name: [s.text_field, s.min_characters, s.filters] for s in config.sources},
    }
    return recipe, work, settings


def _recipe(settings: dict, work: list[documents.Unit]) -> str:
    """Hash of everything that decides the corpus: settings, and the files' names, sizes and ends."""
    content = json.dumps([settings, [documents.recipe(u) for u in work]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _finished(config: PrepareConfig, work, settings) -> shards.Manifest | None:
    """The manifest of a corpus that is there already; new mixture weights are written into it."""
    directory = Path(config.output_dir)
    if not (directory / "manifest.json").exists():
        return None
    manifest = shards.Manifest.load(directory)
    if manifest.recipe != _recipe(settings, work):
        raise UserError(
            f"{directory} holds a corpus made from other settings or files; "
            "choose another output_dir, or delete that folder first"
        )
    weights = {source.name: source.weight for source in config.sources}
    if weights != {source.name: source.weight for source in manifest.sources}:  # not part of the bytes
        for entry in manifest.sources:
            entry.weight = weights[entry.name]
        manifest.save(directory)
    return manifest


def _same_recipe(directory: Path, recipe: str) -> None:
    """An unfinished corpus is continued only by the settings and files that began it."""
    path = directory / ".work" / "recipe"
    if path.exists() and path.read_text() != recipe:
        raise UserError(
            f"{directory} holds an unfinished corpus made from other settings or files; "
            "choose another output_dir, or delete that folder first"
        )
    if not path.exists():
        write_atomically(path, recipe.encode())


@contextmanager
def _lock(directory: Path, task: int, num_tasks: int):
    """Two processes never write the same units: tasks share the folder, each has its own part."""
    work = directory / ".work"
    work.mkdir(parents=True, exist_ok=True)
    shared = fcntl.LOCK_SH if num_tasks > 1 else fcntl.LOCK_EX
    with open(work / "lock", "w") as whole, open(work / f"lock-{task}-of-{num_tasks}", "w") as part:
        try:
            fcntl.flock(whole, shared | fcntl.LOCK_NB)
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {directory}; wait for it, or stop it") from None
        yield


def _engine_of(config: PrepareConfig, recipe: tokenizing.Recipe, work: list[documents.Unit]):
    source = next(s for s in config.sources if s.name == work[0].source)
    found = islice(documents.read(work[0], source, documents.Tally()), 200)
    sample = [(text if isinstance(text, str) else next(text.blocks()))[:20_000] for text in found]
    return tokenizing.make_engine(recipe, config.engine, sample)


def _choose_engine(config: PrepareConfig, recipe: tokenizing.Recipe, work: list[documents.Unit]) -> str:
    engine, why = _engine_of(config, recipe, work)
    tqdm.write(f"tokenizing with {engine.name} {engine.version}: {why}")
    return engine.name


def _deduplicate(config: PrepareConfig, work: list[documents.Unit], num_tasks: int, progress: bool) -> None:
    directory = Path(config.output_dir)
    done = directory / ".work" / "unique"
    if done.exists():
        return
    if num_tasks > 1:
        raise UserError(
            "deduplicate needs all documents: run `python -m data_prep deduplicate CONFIG` before the tasks"
        )
    todo = [u for u in work if not deduplication.hashes_path(directory, u).exists()]
    _map(todo, lambda u: (deduplication.write_hashes, u, config), config, len(work), "hash documents", progress)
    removed = deduplication.choose(work, directory)
    for u in work:
        deduplication.hashes_path(directory, u).unlink()
    write_atomically(done, str(removed).encode())


def deduplicate(config: PrepareConfig, progress: bool = True) -> None:
    """The first pass of `deduplicate: exact` alone, before the tasks of a cluster; nothing to do for `none`."""
    if config.deduplicate == "none":
        return
    _, work, settings = _load(config)
    if _finished(config, work, settings) is None:
        with _lock(Path(config.output_dir), 0, 1):
            _same_recipe(Path(config.output_dir), _recipe(settings, work))
            _deduplicate(config, work, 1, progress)


def _run(
    config: PrepareConfig, work: list[documents.Unit], recipe: tokenizing.Recipe, engine: str, progress: bool
) -> None:
    """Make every unit that has no record."""
    todo = [u for u in work if not unit.record_path(Path(config.output_dir), u).exists()]
    parallel = _workers(config, todo) == 1  # then the tokenizer's own threads do the work
    using = [engine]

    def job(u: documents.Unit):
        return unit.process, u, config, recipe, using[0], parallel

    def finished(u: documents.Unit, record: dict) -> None:
        if record["engine_problem"] and using[0] != tokenizing.Reference.name:
            using[0] = tokenizing.Reference.name
            tqdm.write(
                f"warning: {engine} is not used any more: {record['engine_problem']}; {u.source} unit {u.index} was "
                "made again with tokenizers, and the following are"
            )

    _map(todo, job, config, len(work), "tokenize and pack", progress, finished)


def _workers(config: PrepareConfig, todo: list) -> int:
    return max(1, min(config.num_workers or os.cpu_count() or 1, len(todo)))


def _map(
    todo: list[documents.Unit],
    job: Callable,
    config: PrepareConfig,
    total: int,
    title: str,
    progress: bool,
    finished: Callable = lambda unit, result: None,
) -> None:
    """Run `job(unit)` = (function, arguments...) for each unit, in this process or a pool."""
    workers = _workers(config, todo)
    size = sum(u.size for u in todo)
    tokens, began = 0, time.monotonic()
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=not progress, dynamic_ncols=True)

    def done(u: documents.Unit, result) -> None:
        nonlocal tokens
        finished(u, result)
        tokens += result["tokens"] if isinstance(result, dict) else 0
        bar.update(u.size)
        if tokens:
            seconds = max(1e-9, time.monotonic() - began)
            bar.set_postfix_str(f"{tokens / seconds / 1e6:.2f}M tokens/s, {len(todo)} of {total} units to do")

    with bar:
        if workers == 1:
            for u in todo:
                function, *arguments = job(u)
                done(u, function(*arguments))
            return
        context = get_context("forkserver")  # imports once; forking this process would copy its threads' locks
        context.set_forkserver_preload(["data_prep.unit"])
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        waiting = iter(todo)
        running: dict = {}
        try:
            while True:
                for u in islice(waiting, 2 * workers - len(running)):  # few in flight: a warning reaches the next
                    running[pool.submit(*job(u))] = u
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result())
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); the finished units are kept: "
                "run the same command again, with a smaller num_workers if memory was short"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes already use every core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _merge(
    config: PrepareConfig, recipe: tokenizing.Recipe, settings: dict, work: list[documents.Unit]
) -> shards.Manifest:
    """Write the manifest of all records, in the order of the work list; the corpus is finished then.

    Raises UserError for a source without rows or with too many documents that cannot be used.
    """
    directory = Path(config.output_dir)
    entries = {source.name: shards.SourceEntry(source.name, source.weight) for source in config.sources}
    engines: Counter = Counter()
    for u in work:
        record, entry = json.loads(unit.record_path(directory, u).read_text()), entries[u.source]
        for name in ("documents", "characters", "bytes", "tokens", "remainder", "padding"):
            setattr(entry, name, getattr(entry, name) + record[name])
        for name in ("bad", "filtered"):
            setattr(entry, name, dict(sorted((Counter(getattr(entry, name)) + Counter(record[name])).items())))
        entry.damaged += record["damaged"]
        engines[record["engine"]] += 1
        for split in shards.SPLITS:
            getattr(entry, split).extend(shards.Shard(**shard) for shard in record[split])
    for entry in entries.values():
        unit.limit(Counter(entry.bad), entry.documents, config.max_bad_fraction, entry.name)
        if not entry.train:
            raise UserError(
                f"source {entry.name} gives no row of {config.seq_len} tokens for training: {entry.documents} "
                f"documents, {entry.tokens} tokens, left out {entry.bad | entry.filtered or 'none'}; "
                "check paths, text_field, filters and seq_len"
            )
        problem = entry.accounting()
        if problem:
            raise RuntimeError(problem)
    about = {
        "name": config.tokenizer,
        "fingerprint": settings["tokenizer"],
        "vocab_size": recipe.size,
        "add_bos": config.add_bos,
        "add_eos": config.add_eos,
        "special_ids": recipe.special_ids,
        "engine": ", ".join(sorted(engines)),
    }
    manifest = shards.Manifest(
        seq_len=config.seq_len,
        dtype=shards.dtype_for(recipe.size),
        packing=config.packing,
        tokenizer=about,
        recipe=_recipe(settings, work),
        sources=list(entries.values()),
    )
    for unfinished in directory.glob("manifest.json.*.tmp"):  # of a process that was killed here
        unfinished.unlink()
    manifest.save(directory)
    shutil.rmtree(directory / ".work")
    return manifest
