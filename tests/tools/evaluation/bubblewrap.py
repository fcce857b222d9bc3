"""Whether this machine can run a sandbox at all, asked without our code, and the processes that a sandbox left."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NOBODY = 65534
AS_NOBODY: dict = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _obstacle() -> str:
    """Why bubblewrap cannot run here, or nothing."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", **AS_NOBODY)
    except OSError as error:
        return f"bubblewrap cannot be started as user {NOBODY}: {error}"
    return "" if done.returncode == 0 else f"bubblewrap is forbidden here: {done.stderr.strip()}"


OBSTACLE = _obstacle()
needs_bubblewrap = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "bubblewrap runs")


def processes_of(memory_mb: int) -> list[int]:
    """Pids of the sandboxes with this memory limit, which is on the command line of all of their processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(memory_mb * 2**20).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def assert_nothing_left(memory_mb: int, seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(memory_mb) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of(memory_mb) == []
