"""Runs a job for every unit of work, in this process or in a pool, under one progress bar."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from common.errors import UserError

from .work_list import Unit

Job = Callable[[Unit], tuple]  # (function, arguments...) of a unit
Done = Callable[[Unit, Any], None]  # called with each unit and what its function returned


def worker_count(requested: int, units: int) -> int:
    """`requested` processes, 0 meaning one per CPU core, but no more than there are units."""
    return max(1, min(requested or os.cpu_count() or 1, units))


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

        if workers > 1:
            _run_in_pool(units, job, workers, finish)
            return
        for unit in units:
            function, *arguments = job(unit)
            finish(unit, function(*arguments))


def _run_in_pool(units: list[Unit], job: Job, workers: int, finish: Done) -> None:
    context = get_context("forkserver")  # forking this process would copy locks that its threads may hold
    context.set_forkserver_preload(["data_prep.worker"])  # import once, not in every worker
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting = iter(units)
    running: dict = {}
    try:
        while True:
            for unit in islice(waiting, 2 * workers - len(running)):
                running[pool.submit(*job(unit))] = unit
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finish(running.pop(future), future.result())
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); the finished units are kept: "
            "run the same command again, with a smaller num_workers if memory was short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use every core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
