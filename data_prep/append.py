"""Adds sources and files to a finished corpus: `python -m data_prep append CONFIG`.

In: a corpus folder, and its configuration with more sources, or with paths that name more files. Out: the same folder
with more shards. What is there keeps its bytes: the new files make units of their own, numbered on from the last, and
the manifest, which comes last, lists their shards behind the others. As `prepare`, it may be killed and run again, and
runs on a cluster in tasks, after which `merge` writes the manifest.
"""

from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from common.log import log

from . import deduplication, merging, shards, work_list
from .config import PrepareConfig
from .job import Job, change, load_job, make_work_list, settings_difference, work_list_path
from .locks import lock
from .making import engine_of_job, make_units
from .work_list import WorkList


def append(config: PrepareConfig, progress: bool = True, task: int = 0, num_tasks: int = 1) -> shards.Manifest | None:
    """Add to the corpus in output_dir what `config` names and the corpus does not have; returns its manifest.

    Sources of the corpus that `config` leaves out stay as they are. With `num_tasks` > 1 only this task's share is
    made: returns None. Raises UserError where there is no finished corpus, for other settings, and for files of the
    corpus that were removed or written again.
    """
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of num_tasks {num_tasks}, expected 0 to {num_tasks - 1}")
    directory = Path(config.output_dir)
    if not (directory / "manifest.json").exists():
        raise UserError(
            f"{directory} holds no finished corpus to add to; `python -m data_prep prepare CONFIG` makes one"
        )
    job = load_job(config)
    manifest = shards.Manifest.load(directory)
    _check(job, manifest)
    with lock(directory, task, num_tasks):
        added = _added(job, manifest)
        if not added.units:
            work_list_path(directory).unlink(missing_ok=True)
            log.info("%s has all that the configuration names; nothing is added", directory)
            return manifest
        if config.deduplicate == "exact":  # equal documents of the corpus come first
            deduplication.find_duplicates(added, num_tasks, progress, _parts(job, added))
        make_units(added, added.units[task::num_tasks], engine_of_job(added), progress)
        return merging.finish(added, progress, manifest) if num_tasks == 1 else None


def is_unfinished(directory: Path) -> bool:
    """Whether units are made that are to be added to a finished corpus."""
    path = work_list_path(directory)
    if not (directory / "manifest.json").exists() or not path.exists():
        return False
    made = [part.corpus_hash for part in shards.Manifest.load(directory).parts]
    return work_list.load(path).corpus_hash() not in made


def merge(config: PrepareConfig, progress: bool = True) -> shards.Manifest:
    """Write the manifest of a corpus to which the tasks of `append` have added. Raises UserError for missing units."""
    job = load_job(config)
    manifest = shards.Manifest.load(job.directory)
    _check(job, manifest)
    with lock(job.directory, 0, 1):
        return merging.finish(_added(job, manifest), progress, manifest)


def hash_share(config: PrepareConfig, progress: bool, task: int, num_tasks: int) -> None:
    """`deduplication.deduplicate` for what is added: with one task, all is hashed and the duplicates are found."""
    if config.deduplicate == "none":
        return
    job = load_job(config)
    manifest = shards.Manifest.load(job.directory)
    _check(job, manifest)
    with lock(job.directory, task, num_tasks):
        added = _added(job, manifest)
        parts = _parts(job, added)
        if not added.units:
            log.info("%s has all that the configuration names; nothing is added", job.directory)
        elif num_tasks == 1:
            deduplication.find_duplicates(added, 1, progress, parts)
        elif not deduplication.is_done(job.directory):
            units = [unit for part in parts for unit in part.units]
            deduplication.hash_units(added, units[task::num_tasks], progress)


def _check(job: Job, manifest: shards.Manifest) -> None:
    """Raise UserError for a corpus that cannot be added to by this configuration."""
    directory, config = job.directory, job.config
    if not manifest.parts:
        raise UserError(
            f"{directory} kept no list of its inputs: it was made by an earlier version or by rechunk, and cannot be "
            "added to; prepare another corpus, and give both in data.path"
        )
    names = {source.name for source in config.sources}
    then = [source for source in job.work.sources if source.name in names]
    left_out = [source.name for source in job.work.sources if source.name not in names]
    difference = change(replace(job, work=WorkList(job.work.settings, then)), adding=True)
    if difference:
        raise UserError(
            f"{directory} was made from other settings or files ({difference}); what is added must have the same, and "
            "what is there must not have changed"
        )
    if config.deduplicate == "exact" and left_out:
        raise UserError(f"deduplicate: exact compares with all of {directory}: give its source {left_out[0]}, too")
    limited = [source.name for source in then if source.settings.get("max_tokens")]
    new = {source.name for source in make_work_list(config, job.tokenizer, job.work).sources} if limited else set()
    if new.intersection(limited):
        raise UserError(f"source {limited[0]} ended at its max_tokens; add its new files as a source of another name")


def _added(job: Job, manifest: shards.Manifest) -> Job:
    """The job of the units to add; their work list is made once, as that of a new corpus."""
    path = work_list_path(job.directory)
    made = [part.corpus_hash for part in manifest.parts]
    if path.exists():
        work = work_list.load(path)
        if work.corpus_hash() in made:  # a process was killed after it had added them
            path.unlink()
        else:
            paths = {source.name: list(source.paths) for source in job.config.sources}
            if settings_difference(job.config, job.tokenizer, work, adding=True) or any(
                paths[source.name] != source.paths for source in work.sources
            ):
                raise UserError(
                    f"{job.directory} is being added to from other settings or files; finish that with its own "
                    f"configuration, or delete {path.parent} to give it up"
                )
            return replace(job, work=work)
    work = make_work_list(job.config, job.tokenizer, job.work)
    if work.units:
        work.save(path)
    return replace(job, work=work)


def _parts(job: Job, added: Job) -> list[WorkList]:
    """The work lists of the corpus, as its parts made them, and last that of what is to be added."""
    manifest = shards.Manifest.load(job.directory)
    return [*(work_list.load(job.directory / part.inputs) for part in manifest.parts), added.work]
