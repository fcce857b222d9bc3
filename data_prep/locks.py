"""Locks of a corpus folder: of all of it, of a task's share, of one unit. They end with the process that holds them."""

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import UserError

from .work_list import Unit

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Locked(UserError):
    """Another process works in the folder."""


def flock(file: IO, mode: int) -> None:
    """fcntl.flock. Raises UserError where the file system has no locks, BlockingIOError as flock does."""
    try:
        fcntl.flock(file, mode)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"the file system of {Path(file.name).parent} has no locks (flock: {error.strerror}), without which two "
            "processes might write the same file; mount it with locks (Lustre: -o flock), or use another output_dir"
        ) from None


@contextmanager
def lock(directory: Path, task: int, num_tasks: int) -> Iterator[None]:
    """Tasks share the folder, but no task runs twice at a time; one process that makes everything has it alone.

    When the corpus is finished at the end, the folder .work is removed. Raises Locked.
    """
    work = directory / ".work"
    work.mkdir(parents=True, exist_ok=True)
    mode = fcntl.LOCK_SH if num_tasks > 1 else fcntl.LOCK_EX
    try:
        with open(work / "lock", "w") as whole, open(work / f"lock-{task}-of-{num_tasks}", "w") as part:
            try:
                flock(whole, mode | fcntl.LOCK_NB)
                flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Locked(f"another process is preparing {directory}; wait for it, or stop it") from None
            yield
    except Locked:
        raise
    except BaseException:
        _remove_unused(directory)
        raise
    _remove_unused(directory)


def _remove_unused(directory: Path) -> None:
    """Remove the folder .work of a finished corpus; a work list in it is that of an `append`, and stays.

    With the locks closed: NFS keeps what is open under another name, and the folder could not be removed.
    """
    work = directory / ".work"
    if (directory / "manifest.json").exists() and not (work / "work_list.json").exists():
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def unit_lock(directory: Path, unit: Unit) -> Iterator[bool]:
    """Wait until no other process makes the unit; gives whether one has begun to make it before.

    So two launches never make a unit at the same time, whatever their numbers of tasks, and a worker that outlives
    its killed parent for a moment is waited for.
    """
    path = directory / ".work" / f"{unit.source}-{unit.index:05d}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    has_begun = path.exists()
    with open(path, "w") as file:
        flock(file, fcntl.LOCK_EX)
        yield has_begun
