"""Bad shards made again from their inputs, to the same bytes: `python -m data_prep repair CONFIG`.

In: a corpus folder and the configuration that made it. Every shard is verified; the units of the bad ones are made in
DIR/.repair and moved into place where all their shards have the sha256 that the manifest says. Nothing else changes, so
a repair may be killed and run again at any moment. In an unfinished corpus the records of units with bad shards are
removed, and the next `prepare` makes these units.
"""

import json
import os
import shutil
from collections import defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import force_to_disk
from common.log import log

from . import engines, shards, tokenizing, verify, work_list, worker
from .config import PrepareConfig, SourceConfig
from .deduplication import find_duplicates
from .inputs.listing import InputFile, in_threads, list_files, look_at
from .job import Job, load_job, settings_difference, work_list_path
from .locks import lock
from .pool import run_units, worker_count
from .work_list import SourceList, Unit, WorkList

FOLDER = ".repair"  # in the corpus folder: units that are being made again


@dataclass
class Found:
    """What was wrong and what became of it."""

    is_finished: bool  # the corpus has a manifest
    problems: list[str]  # one line for each bad shard or record
    units: list[Unit]  # made again; of an unfinished corpus, those that the next `prepare` makes


def repair(config: PrepareConfig, dry_run: bool = False, progress: bool = True) -> Found:
    """Make the bad shards of a corpus again; with `dry_run`, only say which units that would be.

    Raises UserError where there is no corpus, for another configuration than the one that made it, for input files that
    are gone, have another size or give other shards than then, and for a corpus that kept no list of its inputs.
    """
    directory = Path(config.output_dir)
    is_finished = (directory / "manifest.json").exists()
    if not is_finished and not work_list_path(directory).exists():
        raise UserError(
            f"{directory} holds neither a manifest.json nor an unfinished corpus, so nothing tells what its shards "
            "should be; `python -m data_prep prepare CONFIG` makes them all"
        )
    job = load_job(config)
    with nullcontext() if dry_run else lock(directory, 0, 1):
        if not is_finished:
            return _repair_unfinished(job, dry_run, progress)
        return _repair_finished(job, dry_run, progress)


def _repair_unfinished(job: Job, dry_run: bool, progress: bool) -> Found:
    """Remove the record of every unit that has a bad shard: a unit without a record is made by `prepare`."""
    tasks: list[verify.Task] = []
    problems: dict[tuple[str, int], list[str]] = {}
    for unit in job.units:
        path = worker.record_path(job.directory, unit)
        if not path.exists():
            continue
        try:
            record = json.loads(path.read_bytes())
            made = [shards.Shard(**shard) for split in shards.SPLITS for shard in record[split]]
        except (ValueError, KeyError, TypeError) as error:
            problems[unit.source, unit.index] = [f"{path}: no record of a unit ({error})"]
        else:
            tasks += [verify.Task(unit.source, shard, False, False) for shard in made]
    config = job.config
    about = shards.Manifest(config.seq_len, shards.dtype_for(job.tokenizer.size), config.packing, {}, "", [])
    for task, lines in _check(job, about, tasks, False, progress):
        problems.setdefault(_unit_of(task), []).extend(lines)
    bad = [unit for unit in job.units if (unit.source, unit.index) in problems]
    lines = [line for unit in bad for line in problems[unit.source, unit.index]]
    for line in lines:
        log.warning("%s", line)
    for unit in bad if not dry_run else []:
        worker.record_path(job.directory, unit).unlink()
    return Found(False, lines, bad)


def _repair_finished(job: Job, dry_run: bool, progress: bool) -> Found:
    manifest = shards.Manifest.load(job.directory)
    difference = settings_difference(job.config, job.tokenizer, job.work, adding=True) if manifest.parts else None
    if difference:
        raise UserError(
            f"{job.directory} was made with other settings ({difference}); repair it with the configuration that made "
            "it"
        )
    wrong = verify.accounting(manifest)
    if wrong:
        raise UserError(f"{wrong[0]}: manifest.json itself is wrong; restore it, or make the corpus in another folder")
    found = _check(job, manifest, verify.tasks_of(manifest), True, progress)
    bad = [task for task, _ in found]
    problems = list(chain(*(lines for _, lines in found)))
    for line in problems:
        log.warning("%s", line)
    if bad and not manifest.parts:
        raise UserError(
            f"{job.directory} has {len(bad)} bad shards and kept no list of its inputs: it was made by an earlier "
            "version or by rechunk; make it again in another folder"
        )
    listed = {(unit.source, unit.index): unit for unit in job.units}
    names = dict.fromkeys(_unit_of(task) for task in bad)
    for source, index in names:
        if (source, index) not in listed:
            raise UserError(
                f"{source} unit {index} has bad shards, but the lists in {job.directory / 'inputs'} have no such unit; "
                "restore them, or make the corpus in another folder"
            )
    units = [listed[name] for name in names]
    if bad and not dry_run:
        _make_again(job, manifest, units, bad, progress)
    return Found(True, problems, units)


def _unit_of(task: verify.Task) -> tuple[str, int]:
    return task.source, shards.unit_of(task.shard.file)


def _check(
    job: Job, about: shards.Manifest, tasks: list[verify.Task], contents: bool, progress: bool
) -> list[tuple[verify.Task, list[str]]]:
    """The bad shards, in the order of the tasks, each with what is wrong."""
    total = sum(task.shard.bytes for task in tasks)
    workers = worker_count(job.config.num_workers, len(tasks))
    found: dict[str, list[str]] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
        for task, outcome in verify.run(job.directory, about, tasks, True, contents, workers):
            found[task.shard.file] = outcome.problems
            bar.update(task.shard.bytes)
    return [(task, found[task.shard.file]) for task in tasks if found[task.shard.file]]


def _make_again(job: Job, manifest: shards.Manifest, units: list[Unit], bad: list[verify.Task], progress: bool) -> None:
    """Make the units in FOLDER, and move their bad shards into place.

    Each unit by itself: one that cannot be made as it was does not keep the others from being repaired. For such units
    it raises UserError at the end.
    """
    temporary = job.directory / FOLDER
    shutil.rmtree(temporary, ignore_errors=True)  # of a repair that was killed
    bad_files = {one.shard.file for one in bad}
    expected: dict[tuple[str, int], list[shards.Shard]] = {}
    for one in verify.tasks_of(manifest):  # of a unit: training shards, then validation shards, as in its record
        expected.setdefault(_unit_of(one), []).append(one.shard)
    failed: list[Unit] = []

    def finish(unit: Unit, record: dict) -> None:
        made = [shards.Shard(**shard) for split in shards.SPLITS for shard in record[split]]
        if made != expected[unit.source, unit.index]:
            failed.append(unit)
            made = []
        for shard in made:
            if shard.file in bad_files:
                (job.directory / unit.source).mkdir(exist_ok=True)
                os.replace(temporary / shard.file, job.directory / shard.file)
                log.info("repaired %s", job.directory / shard.file)
            else:
                (temporary / shard.file).unlink()  # many units may be made: no more space than is needed
        if made:
            force_to_disk(job.directory / unit.source)

    try:
        (temporary / ".work").mkdir(parents=True)
        parts = _parts_now(job, manifest, units)
        config = replace(job.config, output_dir=str(temporary))
        there = Job(config, job.tokenizer, WorkList(job.work.settings, [s for part in parts for s in part.sources]))
        if job.config.deduplicate == "exact":  # which documents these units keep depends on all units
            find_duplicates(there, 1, progress, parts)
        wanted = {(unit.source, unit.index) for unit in units}
        todo = [unit for unit in there.units if (unit.source, unit.index) in wanted]
        engine = _engine(job, manifest)
        workers = worker_count(job.config.num_workers, len(todo))
        limits = {(source, index): tokens for part in manifest.parts for source, (index, tokens) in part.cut.items()}

        def task(unit: Unit) -> tuple:
            left = limits.get((unit.source, unit.index), 0)
            return worker.process_unit, unit, there.config, there.tokenizer, engine, workers == 1, left

        run_units(todo, task, workers, f"make {len(todo)} units again", progress, finish)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if failed:
        raise _failure(job, manifest, failed)
    still = _check(job, manifest, bad, True, False)
    if still:
        raise UserError(
            f"{still[0][1][0]}: it was made again and is so again; report this, and make the corpus in another folder"
        )


def _parts_now(job: Job, manifest: shards.Manifest, units: list[Unit]) -> list[WorkList]:
    """The work lists of the parts as they were made, with the files of the units that are needed as they are now."""
    needed = job.units if job.config.deduplicate == "exact" else units
    now = look_again(needed, job.work, job.config)

    def as_now(source: SourceList) -> SourceList:
        return replace(source, units=[now.get((unit.source, unit.index), unit) for unit in source.units])

    parts = [work_list.load(job.directory / part.inputs) for part in manifest.parts]
    return [replace(part, sources=[as_now(source) for source in part.sources]) for part in parts]


def look_again(units: list[Unit], work: WorkList, config: PrepareConfig) -> dict[tuple[str, int], Unit]:
    """The units with their files as they are now, which may have other times and lie in another folder.

    Raises UserError for a file that is gone or has another size.
    """
    found: dict[tuple[str, int], Unit] = {}
    paths_then = {source.name: source.paths for source in work.sources}
    for source in config.sources:
        own = [unit for unit in units if unit.source == source.name]
        if not own:
            continue
        files = list(dict.fromkeys(file for unit in own for file in unit.files))
        now: dict[InputFile, InputFile | None] = dict.fromkeys(files)
        if list(source.paths) == paths_then[source.name]:
            now = dict(zip(files, in_threads(_look, files, f"look at the files of {source.name}")))
        there = {file: other for file, other in now.items() if other and other.size == file.size}
        if len(there) < len(files):  # another folder may have them
            there |= _elsewhere([file for file in files if file not in there], there, now, source)
        other_times = sum(there[file].stamp != file.stamp for file in files)
        if other_times:
            log.info(
                "source %s: %d of %d files have other times than when the corpus was made; the checksums of the shards "
                "tell whether they hold the same", source.name, other_times, len(files),
            )  # fmt: skip
        for unit in own:
            found[unit.source, unit.index] = replace(unit, files=tuple(there[file] for file in unit.files))
    return found


def _elsewhere(
    lost: list[InputFile], there: dict[InputFile, InputFile], now: dict[InputFile, InputFile | None],
    source: SourceConfig,
) -> dict[InputFile, InputFile]:  # fmt: skip
    """For each file that is lost, one that the source's paths name and that has its name and size."""
    taken = {file.path for file in there.values()}
    others: dict[tuple[str, int], deque[InputFile]] = defaultdict(deque)
    for file in chain(*list_files(source).groups):
        if file.path not in taken:
            others[os.path.basename(file.path), file.size].append(file)
    found = {}
    for file in lost:
        same = others[os.path.basename(file.path), file.size]
        if not same:
            other = now[file]
            what = f"has {other.size} bytes now, it had {file.size}" if other else "is gone"
            raise UserError(
                f"{file.path} {what}, and the paths of source {source.name} name no other file of its name and size; "
                "repair needs the input files as they were when the corpus was made"
            )
        found[file] = same.popleft()
    return found


def _look(file: InputFile) -> InputFile | None:
    try:
        return look_at(file.path)
    except FileNotFoundError:
        return None


def _engine(job: Job, manifest: shards.Manifest) -> str:
    """The engine that made the corpus: where the manifest names tokenizers alone, the fast one gave other ids."""
    if engines.Gigatoken.name not in manifest.tokenizer["engine"]:
        return tokenizing.Reference.name
    engine, reason = engines.select_engine(job.tokenizer, job.config.engine, [])
    log.info("tokenizing with %s %s: %s", engine.name, engine.version, reason)
    return engine.name


def _failure(job: Job, manifest: shards.Manifest, failed: list[Unit]) -> UserError:
    """The error for units that gave other shards than the manifest says."""
    then = {(unit.source, unit.index): unit for unit in job.units}
    first = failed[0]
    changed = [
        now.path for now, old in zip(first.files, then[first.source, first.index].files) if now.stamp != old.stamp
    ]
    files = changed or [file.path for file in first.files]
    named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    if changed:
        why = f"its input files hold something else now: {named}"
    else:
        why = (
            f"either its input files hold something else now, though their times are the same ({named}), or another "
            f"version of a library gives other shards (the manifest says {manifest.tokenizer['engine']})"
        )
    more = f" (and {len(failed) - 1} more units)" if len(failed) > 1 else ""
    return UserError(
        f"{first.source} unit {first.index}{more} does not give the shards that the manifest says, so its bad shards "
        f"stay as they are: {why}; restore what made the corpus, or make it again in another folder"
    )
