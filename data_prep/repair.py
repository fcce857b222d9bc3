"""Makes shards again that are missing or were altered, from the inputs that they were made from.

In: the configuration of a corpus, finished or not. Out: the same corpus with its shards as they were. Every shard is
verified first. In a finished corpus, a unit's shards are made in DIR/.work/repair and replace the bad ones only if they
have the sha256 of the manifest. In an unfinished one, the units of bad shards are made again in their place.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import force_to_disk, sha256_of
from common.log import log

from . import shards, tokenizing, verify, work_list, worker
from .config import PrepareConfig
from .inputs.listing import InputFile, list_files, look_at
from .job import Job, load_job, settings_difference, work_list_path
from .locks import lock
from .making import engine_of_job, make_units
from .pool import run_units, worker_count
from .prepare import find_duplicates, is_finished, remove_leftovers
from .work_list import Unit, WorkList


def repair(config: PrepareConfig, progress: bool = True) -> str:
    """Make bad shards again; returns what was done, in one line, and logs each shard.

    Raises UserError for other settings, for shards that come out otherwise than before because an input changed (they
    are not replaced), and where there is no corpus.
    """
    directory = Path(config.output_dir)
    if not (directory / "manifest.json").exists() and not work_list_path(directory).exists():
        raise UserError(f"{directory} holds no corpus, finished or not; make it with `python -m data_prep prepare`")
    job = load_job(config)
    finished = is_finished(job)
    with lock(directory, 0, 1):
        done = _repair_finished(job, progress) if finished else _repair_unfinished(job, progress)
    if finished:
        remove_leftovers(job, shards.Manifest.load(directory))
    return f"{directory}: {done}"


def _repair_unfinished(job: Job, progress: bool) -> str:
    """Make the units again whose shards are not those of their records."""
    made = [unit for unit in job.units if worker.record_path(job.directory, unit).exists()]
    bad: list[Unit] = []

    def done(unit: Unit, problems: list[str]) -> None:
        for problem in problems:
            log.warning("%s; %s unit %d is made again", problem, unit.source, unit.index)
        if problems:
            worker.record_path(job.directory, unit).unlink()
            bad.append(unit)

    workers = worker_count(job.config.num_workers, len(made))
    run_units(made, lambda unit: (check_unit, unit, job.directory), workers, "verify", progress, done)
    if bad:
        make_units(job, [unit for unit in job.units if unit in bad], engine_of_job(job), progress)
    return (
        f"{len(bad)} of {len(made)} units made again; the corpus is not finished: go on with "
        "`python -m data_prep prepare`, or its tasks and `merge`"
    )


def check_unit(unit: Unit, directory: Path) -> list[str]:
    """What is wrong with the shards of a unit's record, one line each."""
    record = worker.read_record(directory, unit) or {}
    problems = []
    for shard in (shards.Shard(**shard) for split in shards.SPLITS for shard in record[split]):
        path = directory / shard.file
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{path}: {path.stat().st_size:,} bytes, it was made with {shard.bytes:,}")
        elif sha256_of(path) != shard.sha256:
            problems.append(f"{path}: its sha256 is not that of its record; the file was altered")
    return problems


def _repair_finished(job: Job, progress: bool) -> str:
    manifest = shards.Manifest.load(job.directory)
    bad = _bad_shards(job, manifest, progress)
    total = sum(len(source.train + source.validation) for source in manifest.sources)
    if not bad:
        return f"all {total:,} shards match the manifest"
    if not manifest.parts:
        raise UserError(
            f"{job.directory} was made by an earlier version, which kept no list of its inputs; "
            "prepare it again into another folder"
        )
    difference = settings_difference(job.config, job.tokenizer, job.work)
    if difference:
        raise UserError(f"{job.directory} was made from other settings ({difference}); give those to repair it")
    numbers = {(file.split("/")[0], shards.unit_of(file)) for file in bad}
    with _workshop(job, manifest) as here:
        units = [_inputs_now(job, unit) for unit in here.units if (unit.source, unit.index) in numbers]
        if job.config.deduplicate == "exact":
            find_duplicates(here, 1, progress)
        left = _make_again(here, units, manifest, set(bad), engine_of_job(here), progress)
        if left and worker.reference_only(here.directory) is None:
            left = _make_again(here, left, manifest, set(bad), tokenizing.Reference.name, progress)
        if left:
            first = left[0]
            others = f" (and {len(left) - 1} more units)" if len(left) > 1 else ""
            raise UserError(
                f"{first.source} unit {first.index}{others} comes out otherwise than the manifest says: the content of "
                f"{first.files[0].path} or of another of its files changed since; its shards were not replaced"
            )
    return f"{len(bad)} of {total:,} shards repaired; all match the manifest"


def _bad_shards(job: Job, manifest: shards.Manifest, progress: bool) -> list[str]:
    """The files of shards that do not match the manifest. Raises UserError where the manifest itself is wrong."""
    tasks = verify.tasks_of(manifest)
    workers = worker_count(job.config.num_workers, len(tasks))
    total = sum(task.shard.bytes for task in tasks)
    bad = set()
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
        for task, outcome in verify.run(job.directory, manifest, tasks, True, True, workers):
            for problem in outcome.problems:
                log.warning("%s", problem)
                bad.add(task.shard.file)
            bar.update(task.shard.bytes)
    found = [task.shard.file for task in tasks if task.shard.file in bad]
    if not found and (problems := verify.check(job.directory, hashes=False)):
        raise UserError(f"{problems[0]}; that is not in the shards, and cannot be repaired")
    return found


@contextmanager
def _workshop(job: Job, manifest: shards.Manifest) -> Iterator[Job]:
    """The same job in a folder of its own, with the units of all parts in the order in which they were made."""
    folder = job.directory / ".work" / "repair"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / ".work").mkdir(parents=True)
    parts = [work_list.load(job.directory / part.inputs) for part in manifest.parts]
    work = WorkList(job.work.settings, [source for part in parts for source in part.sources])
    try:
        yield replace(job, config=replace(job.config, output_dir=str(folder)), work=work)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inputs_now(job: Job, unit: Unit) -> Unit:
    """The unit with its files as they are now: they may have another time or folder, but not another size."""
    return replace(unit, files=tuple(_file_now(job, unit.source, file) for file in unit.files))


def _file_now(job: Job, name: str, file: InputFile) -> InputFile:
    try:
        found = look_at(file.path)
    except FileNotFoundError:
        source = next(source for source in job.config.sources if source.name == name)
        listed = [other for group in list_files(source).groups for other in group]
        moved = [other for other in listed if Path(other.path).name == Path(file.path).name and other.size == file.size]
        if len(moved) != 1:
            raise UserError(f"{file.path} is gone; it is needed to make its shards again") from None
        found = moved[0]
    if found.size != file.size:
        raise UserError(
            f"{file.path} has {found.size:,} bytes, and had {file.size:,} when the corpus was made: "
            "its shards cannot be made again"
        )
    return found


def _make_again(
    here: Job, units: list[Unit], manifest: shards.Manifest, bad: set[str], engine: str, progress: bool
) -> list[Unit]:
    """Make the units and replace the bad shards; returns the units whose shards are not those of the manifest."""
    limits = {(source, index): tokens for part in manifest.parts for source, (index, tokens) in part.cut.items()}
    directory = here.directory.parent.parent
    left = []

    def done(unit: Unit, record: dict) -> None:
        entry = next(source for source in manifest.sources if source.name == unit.source)
        files = []
        for split in shards.SPLITS:
            made = [shards.Shard(**shard) for shard in record[split]]
            if made != [shard for shard in getattr(entry, split) if shards.unit_of(shard.file) == unit.index]:
                left.append(unit)
                worker.record_path(here.directory, unit).unlink()
                return
            files += [shard.file for shard in made if shard.file in bad]
        for file in files:
            (here.directory / file).replace(directory / file)
            force_to_disk((directory / file).parent)
            log.info("repaired %s", directory / file)

    def task(unit: Unit) -> tuple:
        limit = limits.get((unit.source, unit.index), 0)
        return worker.process_unit, unit, here.config, here.tokenizer, engine, workers == 1, limit

    workers = worker_count(here.config.num_workers, len(units))
    run_units(units, task, workers, f"make {len(units)} units again", progress, done)
    return left
