"""The pipeline: configuration → work list → tokenized, packed shards → manifest.

Each unit of work writes its own shards and then a small record in DIR/.work; a unit with a record is
done. So a run that was killed continues where it stopped, and the bytes do not depend on the number of
processes or machines, nor on interruptions. On a cluster, each of `num_tasks` tasks makes every
num_tasks-th unit, and `merge` writes the manifest.
"""

from common.errors import UserError

from . import merging, shards, work_list
from .config import PrepareConfig
from .deduplication import find_duplicates
from .job import Job, load_finished, load_job, work_list_path
from .locks import Locked, lock
from .making import engine_of_job, make_units
from .pool import start_server, worker_count


def prepare(config: PrepareConfig, progress: bool = True, task: int = 0, num_tasks: int = 1) -> shards.Manifest | None:
    """Make the corpus of `config` in its output_dir, or finish one that was interrupted.

    With `num_tasks` > 1 only this task's share is made, without a manifest: returns None. Raises UserError
    before writing for bad settings, missing files, or a folder that holds another corpus; ReadFailed for files that
    cannot be read; after reading, UserError for an empty corpus, too many unusable documents or damaged files. Warns
    of every source that gets no validation row.
    """
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of num_tasks {num_tasks}, expected 0 to {num_tasks - 1}")
    if worker_count(config.num_workers, 2) > 1:
        start_server()
    job = load_job(config)
    if not is_finished(job):
        with lock(job.directory, task, num_tasks):
            if not is_finished(job):  # by a process that has ended meanwhile
                if config.deduplicate == "exact":
                    find_duplicates(job, num_tasks, progress)
                make_units(job, job.units[task::num_tasks], engine_of_job(job), progress)
                return merging.finish(job, progress) if num_tasks == 1 else None
    return _load_checked(job)


def merge(config: PrepareConfig, progress: bool = True) -> shards.Manifest:
    """Write the manifest when all tasks are done. Raises UserError naming how many units are missing."""
    job = load_job(config)
    if not is_finished(job):
        with lock(job.directory, 0, 1):
            if not is_finished(job):
                return merging.finish(job, progress)
    return _load_checked(job)


def is_finished(job: Job) -> bool:
    """Whether the folder holds a finished corpus, of whatever settings."""
    return (job.directory / "manifest.json").exists()


def _load_checked(job: Job) -> shards.Manifest:
    """The manifest of a corpus that is already made, its shards present. What a killed process left is removed."""
    manifest = load_finished(job) or shards.Manifest.load(job.directory)
    remove_leftovers(job, manifest)
    return manifest


def remove_leftovers(job: Job, manifest: shards.Manifest) -> None:
    """Remove the folder .work that a process left which was killed after it had written the manifest."""
    path = work_list_path(job.directory)
    if not path.parent.exists():
        return
    try:
        with lock(job.directory, 0, 1):
            if path.exists() and work_list.load(path).corpus_hash() in [part.corpus_hash for part in manifest.parts]:
                path.unlink()  # that of an unfinished `append` stays
    except Locked:  # a process is at work
        pass
