"""Runs a job for every unit of work, in this process or in a pool, under one progress bar."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_end
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.log import log, set_up_logging

from .work_list import Unit

Job = Callable[[Unit], tuple | None]  # (function, arguments...) of a unit; None: nothing is to be done
Done = Callable[[Unit, Any], None]  # called with each unit and what its function returned


def worker_count(requested: int, units: int) -> int:
    """`requested` processes, 0 meaning one per CPU that this process may use, but no more than there are units."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(requested or cpus, units))


def start_server() -> None:
    """Begin to import what workers need, in the background: half a second that other preparations can hide."""
    multiprocessing.set_forkserver_preload(["data_prep.worker"])  # once, not in every worker
    forkserver.ensure_running()


def run_units(units: list[Unit], job: Job, workers: int, title: str, progress: bool, done: Done | None = None) -> None:
    """Run the job of every unit.

    A unit's job is asked for shortly before it runs, so that what `done` learns changes the jobs that follow.
    Raises UserError when a worker process was killed.
    """
    tokens = 0
    began = time.monotonic()
    total = sum(unit.size for unit in units)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=not progress, dynamic_ncols=True) as bar:

        def finish(unit: Unit, result: Any) -> None:
            nonlocal tokens
            if done:
                done(unit, result)
            bar.update(unit.size)
            tokens += result["tokens"] if isinstance(result, dict) else 0
            if tokens:
                seconds = max(1e-9, time.monotonic() - began)
                bar.set_postfix_str(f"{tokens / seconds / 1e6:.2f}M tokens/s")

        def skip(unit: Unit) -> None:
            bar.update(unit.size)

        if workers > 1:
            _run_in_pool(units, job, workers, finish, skip)
            return
        for unit in units:
            task = job(unit)
            if task is None:
                skip(unit)
            else:
                finish(unit, task[0](*task[1:]))


def _run_in_pool(units: list[Unit], job: Job, workers: int, finish: Done, skip: Callable[[Unit], None]) -> None:
    context = multiprocessing.get_context("forkserver")  # forking would copy locks that this process's threads hold
    start_server()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    waiting = iter(units)
    running: dict = {}
    try:
        while True:
            while len(running) < 2 * workers and (unit := next(waiting, None)) is not None:
                task = job(unit)
                if task is None:
                    skip(unit)
                else:
                    running[pool.submit(*task)] = unit
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finish(running.pop(future), future.result())
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); the finished units are kept: "
            "run the same command again, with a smaller num_workers if memory was short"
        ) from None
    except KeyboardInterrupt:
        log.warning("finishing %d units that have begun; Ctrl-C again ends at once", min(workers, len(running)))
        raise
    finally:
        _shut_down(pool)


def _shut_down(pool: ProcessPoolExecutor) -> None:
    """End the workers when their units are finished, or at once with another Ctrl-C."""
    try:
        pool.shutdown(wait=True, cancel_futures=True)
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()
        raise


def start_worker() -> None:
    """What a worker process begins with: it leaves Ctrl-C to its parent, and ends when that is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use every core
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # PR_SET_PDEATHSIG would not do: the process that forked this one is the fork server, which lives on
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_end([parent.sentinel])
        os._exit(1)


def end_if_orphan() -> None:
    """End a worker process whose parent was killed, before it begins something new."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
