"""Runs a script in a process that has the libraries already: importing them takes longer than most of our runs.

A server (multiprocessing's) imports them once and forks for each script; otherwise it is `python SCRIPT ARGUMENTS`.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["libraries"])


class Forked:
    """What subprocess.Popen has, as far as tests use it; in a session of its own."""

    def __init__(self, arguments: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path):
        before = dict(os.environ)
        try:  # the server gets these when it starts, which is at the first fork; here it finds `libraries`
            os.environ.update(environment)
            os.environ["PYTHONPATH"] = f"{environment['PYTHONPATH']}{os.pathsep}{Path(__file__).parent}"
            self._process = SERVER.Process(target=_script, args=(arguments, cwd, environment, out, err))
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs; -N after signal N."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float) -> int:
        """Raises TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With all that it started."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, or not yet a session
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()


def _script(arguments: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """In the new process."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for path, stream in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, stream)
        os.close(handle)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = arguments
    sys.path[:0] = [str(Path(arguments[0]).resolve().parent), environment["PYTHONPATH"]]
    runpy.run_path(arguments[0], run_name="__main__")
