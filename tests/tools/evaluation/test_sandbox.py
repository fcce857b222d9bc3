"""The sandbox tells a program that ran to its end from all others, and stays usable whatever the program does."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from bubblewrap import AS_NOBODY, NOBODY, assert_nothing_left, needs_bubblewrap, processes_of
from helpers import ROOT

from common.errors import UserError
from tools.evaluation.sandbox import MAX_PROCESSES, STDERR_BYTES, Outcome, check_sandbox, run_all, run_program


def run(source: str, **limits) -> Outcome:
    return run_program(textwrap.dedent(source), **limits)


@pytest.fixture
def open_folder():
    """A new folder that every user can read and search; pytest's own folders are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@needs_bubblewrap
def test_this_machine_has_a_sandbox():
    check_sandbox()


@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "",
        "x = 1",
        "import dataclasses, typing, math, re, hashlib, collections, heapq, itertools, threading, subprocess",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    b: 'int'\nassert A(1) == A(1)",
        "ran = False\nif __name__ == '__main__':\n    ran = True\nassert ran",
        "import sys\nassert sys.stdin.read() == '' and sys.argv == ['program.py']",
        "open('file', 'w').write('text')\nassert open('/tmp/file').read() == 'text'",
        "assert 'é' == chr(233)",
        "x = 0  # " + "long " * 200_000,
        "try:\n    exit(0)\nexcept SystemExit:\n    pass",
        "import os\nos.close(2)",
    ],
    ids=lambda source: source[:20],
)
def test_a_program_passes_that_reaches_its_last_line(source):
    outcome = run_program(source)
    assert (outcome.passed, outcome.reason, outcome.stderr) == (True, "passed", "")


@needs_bubblewrap
@pytest.mark.parametrize(
    ("source", "reason", "stderr"),
    [
        ("assert 1 == 2", "exit code 1", "AssertionError"),
        ("def f(:", "exit code 1", "SyntaxError"),
        ("x = '\0'", "exit code 1", "null bytes"),
        ("x = '\ud800'", "exit code 1", "SyntaxError"),
        ("exit(3)", "exit code 3", ""),
        ("import atexit, os; atexit.register(os._exit, 3)", "exit code 3", ""),  # at its last line, and yet
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9", ""),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11", ""),
        ("def f(): f()\nf()", "exit code 1", "RecursionError"),
    ],
)
def test_a_failure_has_its_reason(source, reason, stderr):
    outcome = run_program(source)
    assert (outcome.passed, outcome.reason) == (False, reason)
    assert stderr in outcome.stderr


@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "exit(0)",
        "quit()",
        "raise SystemExit",
        "import sys; sys.exit()",
        "import os; os._exit(0)",
        "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
        "import sys, os; sys.excepthook = lambda *_: os._exit(0); 1 / 0",
        "import os, sys; os.execv(sys.executable, ['python', '-c', 'pass'])",
        "import os\nif os.fork():\n    os._exit(0)",
        "print('passed', 'ok', 'R'); exit(0)",
        "import os\nfor n in range(64):\n    try: os.write(n, b'R' + bytes(16))\n    except OSError: pass\nos._exit(0)",
    ],
    ids=lambda source: source[:30],
)
def test_who_ends_before_the_tests_does_not_pass(source):
    """Exit code 0 alone is no success: the failing line behind was never reached."""
    assert not run_program(f"{source}\nassert False\n").passed


FORGERY = """
import os
for n in range(3, 64):
    try:
        os.write(n, bytes({secret}))
    except OSError:
        pass
os._exit(0)
"""


@needs_bubblewrap
def test_the_proof_of_completion_is_new_in_each_run(monkeypatch):
    drawn, draw = [], secrets.token_bytes
    monkeypatch.setattr(secrets, "token_bytes", lambda n: drawn.append(draw(n)) or drawn[-1])
    assert run_program("").passed
    assert not run_program(FORGERY.format(secret=list(drawn[0]))).passed
    # that the forgery would work if it knew the secret shows that the secret is what protects
    monkeypatch.setattr(secrets, "token_bytes", lambda n: drawn[0])
    assert run_program(FORGERY.format(secret=list(drawn[0]))).passed


@needs_bubblewrap
def test_the_proof_is_nowhere_in_the_interpreter_or_its_files(monkeypatch):
    monkeypatch.setattr(secrets, "token_bytes", lambda n: b"S" * n)
    outcome = run("""
        import gc, os, sys
        frame, seen = sys._getframe(), []
        while frame:
            seen.append(repr(frame.f_globals) + repr(frame.f_locals) + repr(frame.f_code.co_consts))
            frame = frame.f_back
        seen += [repr(sys.argv), repr(sys.orig_argv), repr(os.environ)]
        seen += [repr(o) for o in gc.get_objects() if type(o) in (bytes, tuple, list) and len(o) < 100]
        assert os.listdir("/tmp") == []
        assert len(seen) > 10 and any("setrlimit" in text for text in seen)  # it did look at what started it
        assert not any(chr(83) * 8 in text for text in seen)
        """)
    assert outcome.passed, outcome.stderr


@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import os, time\nos.close(1); os.close(2)\ntime.sleep(100)",
        "import signal, time\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True: time.sleep(1)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()",
        "import os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.01)",
    ],
    ids=["loop", "sleep", "closed files", "deaf", "thread", "fork bomb"],
)
def test_time_is_up(source):
    """The wall clock ends a program, and all that it started."""
    outcome = run_program(source, timeout=0.8, memory_mb=201)
    assert (outcome.passed, outcome.reason) == (False, "timed out")
    assert outcome.seconds < 4
    assert_nothing_left(201)


@needs_bubblewrap
def test_the_number_of_processes_is_limited():
    outcome = run("""
        import os, sys, time
        made = 0
        for _ in range(60):  # and not without end, should there be no limit
            try:
                if os.fork() == 0:
                    time.sleep(60)
            except BlockingIOError:
                break
            made += 1
        sys.stderr.write(str(made))
        """)
    assert outcome.passed and 1 <= int(outcome.stderr) < MAX_PROCESSES


@needs_bubblewrap
def test_children_that_run_on_are_ended():
    """A daemon, in a session of its own and without our pipes, ends with its program."""
    outcome = run(
        """
        import os, signal, time
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if os.fork() == 0:
                os.closerange(0, 64)
                time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        """,
        memory_mb=202,
    )
    assert outcome.passed and outcome.seconds < 5
    assert_nothing_left(202)


@needs_bubblewrap
def test_left_over_processes_would_be_seen():
    """The control of the tests above; and no process of the sandbox is root's."""
    thread = threading.Thread(target=run_program, args=("import time; time.sleep(1)", 5.0, 203))
    thread.start()
    deadline = time.monotonic() + 10
    while len(processes_of(203)) < 3 and time.monotonic() < deadline:  # bwrap, the first process inside, Python
        time.sleep(0.01)
    users = {os.stat(f"/proc/{pid}").st_uid for pid in processes_of(203)}
    thread.join()
    assert users == {NOBODY if os.geteuid() == 0 else os.geteuid()}
    assert_nothing_left(203)


@needs_bubblewrap
@pytest.mark.parametrize("source", ["x = bytearray(10**10)", "import mmap; mmap.mmap(-1, 10**10)", "x = [0] * 10**10"])
def test_memory_is_limited(source):
    outcome = run_program(source)
    assert not outcome.passed and re.search("MemoryError|Cannot allocate memory", outcome.stderr)


@needs_bubblewrap
def test_limits_cannot_be_raised_and_namespaces_cannot_be_made():
    outcome = run("""
        import ctypes, resource
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
            try:
                resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            except (OSError, ValueError):
                continue
            raise AssertionError(limit)
        CLONE_NEWUSER = 0x10000000
        assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == -1
        """)
    assert outcome.passed, outcome.stderr


@needs_bubblewrap
def test_the_disk_is_small_and_the_rest_read_only():
    """All that a program can write anywhere is `disk_mb`."""
    outcome = run(
        """
        import os, sys
        written, block = 0, bytes(2**18)
        for folder in [at for at, _, _ in os.walk("/") if os.access(at, os.W_OK)]:
            for n in range(20):
                try:
                    with open(f"{folder}/file{n}", "wb", buffering=0) as file:
                        while written < 2**26:  # and not more, should there be no limit
                            written += file.write(block)
                except OSError:
                    pass
        sys.stderr.write(str(written))
        """,
        disk_mb=4,
    )
    assert outcome.passed, outcome.stderr
    assert 2**21 < int(outcome.stderr) <= 2**22


@needs_bubblewrap
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_neither_kept_nor_waited_for(stream):
    tracemalloc.start()
    try:
        outcome = run(f"""
            import sys
            for _ in range(500):
                sys.{stream}.write("x" * 100_000)
            sys.{stream}.write("end")
            """)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcome.passed and peak < 2**20
    assert len(outcome.stderr) == (STDERR_BYTES if stream == "stderr" else 0)
    assert outcome.stderr.endswith("end" if stream == "stderr" else "")


@needs_bubblewrap
def test_endless_output_ends_with_the_time():
    for stream in ("stdout", "stderr"):
        outcome = run_program(f"import sys\nwhile True: sys.{stream}.write('x' * 100_000)", timeout=0.5)
        assert outcome.reason == "timed out" and outcome.seconds < 3 and len(outcome.stderr) <= STDERR_BYTES


def test_bad_limits_are_refused():
    for limits in ({"timeout": 0}, {"timeout": -1}, {"memory_mb": 1}, {"disk_mb": 0}):
        with pytest.raises(UserError, match="cannot run a program"):
            run_program("", **limits)
    with pytest.raises(UserError, match="0 workers"):
        list(run_all([""], 0))


@needs_bubblewrap
def test_many_programs_run_at_once_and_come_in_order():
    programs = [f"import time; time.sleep({0.9 if n == 2 else 0.6}); exit({n})" for n in range(2, 10)]
    begin = time.monotonic()
    assert [outcome.reason for outcome in run_all(programs, 8)] == [f"exit code {n}" for n in range(2, 10)]
    assert time.monotonic() - begin < 4.0  # one after the other: 5.1


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; the other tests ran as a normal one")
def test_a_normal_user_has_a_sandbox_too():
    script = """
from tools.evaluation.sandbox import check_sandbox, run_program
check_sandbox()
print(run_program("import os; assert os.getuid() != 0").reason, run_program("exit(0)").passed, sep=",")
print(run_program("x = bytearray(10**10)").reason, run_program("while True: pass", timeout=0.5).reason, sep=",")
"""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-B", "-c", script],
                cwd=ROOT,
                env={"PATH": os.environ["PATH"]},
                **AS_NOBODY,
                capture_output=True,
                text=True,
            )
        except PermissionError:
            continue
        if "No module named 'tools'" in done.stderr:
            pytest.skip(f"user {NOBODY} cannot read {ROOT}")
        assert done.stdout.split() == ["passed,False", "exit", "code", "1,timed", "out"], done.stderr
        return
    pytest.skip(f"user {NOBODY} can run neither {sys.executable} nor /usr/bin/python3")


DENIED = (
    "bwrap: No permissions to create new namespace, likely because the kernel does not allow non-privileged user "
    "namespaces. On e.g. debian this can be enabled with 'sysctl kernel.unprivileged_userns_clone=1'."
)


@pytest.mark.parametrize(
    ("says", "code", "expected"),
    [
        (DENIED, 1, "unprivileged user namespaces.*kernel.apparmor_restrict_unprivileged_userns.*seccomp=unconfined"),
        ("bwrap: setting up uid map: Permission denied", 1, "unprivileged user namespaces"),
        ("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", 1, "unprivileged user namespaces"),
        ("bwrap: Unknown option --disable-userns", 1, "bubblewrap 0.8 or newer"),
        ("", 0, "bwrap says nothing"),  # success without a sandbox is none
    ],
)
def test_without_namespaces_nothing_runs(open_folder, monkeypatch, says, code, expected):
    fake = open_folder / "bwrap"
    fake.write_text(f'#!/bin/sh\necho "{says}" >&2\nexit {code}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{open_folder}:{os.environ['PATH']}")
    written = open_folder / "written"
    written.touch()
    written.chmod(0o666)
    for attempt in (check_sandbox, lambda: run_program(f"open({str(written)!r}, 'w').write('ran')")):
        with pytest.raises(UserError, match=expected) as error:
            attempt()
        assert says in str(error.value)
    assert written.read_text() == ""


def test_without_bubblewrap_nothing_runs(open_folder, monkeypatch):
    monkeypatch.setenv("PATH", str(open_folder))
    for attempt in (check_sandbox, lambda: run_program("")):
        with pytest.raises(UserError, match="apt install bubblewrap"):
            attempt()
