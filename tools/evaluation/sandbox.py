"""Runs a Python program that nobody has read, such as one that a model wrote, and says whether it ran to its end.

    outcome = run_program(source, timeout=10.0)
    outcome.passed, outcome.reason        # (False, "exit code 1")

Each program gets a bubblewrap sandbox of its own. There is no way to run one without: where bubblewrap is missing or
forbidden, a UserError says what to do.

What a program has: a Python of its own with the standard library, read-only, and an empty /tmp of `disk_mb`, its
working folder. What it does not have: the network, other files or devices, /proc, the environment variables,
other processes, capabilities, further user namespaces, a terminal. All its processes end when it does, or at `timeout`.

A program that ends early with exit code 0 does not pass: after its last line the interpreter must send back a random
secret, which waits in a pipe and so is in no file, variable, argument or memory while the program runs.

Limits of this. The tests of a program run in its own interpreter. One written to cheat can read the pipe, or can
return an object that equals everything; a model that is only wrong does not. Memory is limited for each process, so
all `MAX_PROCESSES` of a program together can take as many times `memory_mb`, and memory that a program shares through
memfd or System V comes on top. The kernel is the host's: to execute what an attacker wrote, use a virtual machine.
"""

import contextlib
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

NOBODY = 65534  # user and group that programs run as where we are root
SYSTEM_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")  # where `NOBODY` cannot read our own
MAX_PROCESSES = 8  # processes and threads of one program
MAX_OPEN_FILES = 64
MIN_MEMORY_MB = 64  # with less an interpreter cannot start
STDERR_BYTES = 4096  # kept of what a program writes to stderr, from the end
KILLED_SECONDS = 5.0  # that the kernel gets to end the processes of a killed sandbox
MIB = 2**20

READY = b"R"  # what the sandbox reports before it starts the program
SYSCTLS = ("kernel/unprivileged_userns_clone", "kernel/apparmor_restrict_unprivileged_userns")
FORBIDDEN = ("namespace", "uid map", "gid map", "setgroups", "RTM_NEWADDR", "/proc/sys")

# Runs inside, before the program. Limits are set here and not before bubblewrap starts: then they do not bind
# bubblewrap itself, and the kernel counts only the processes of this sandbox. Nobody inside can raise them again.
INSIDE = f"""
import os, resource, sys, types
secret, report, memory, disk, seconds = map(int, sys.argv[1:])
for limit, value in (
    ("AS", memory), ("FSIZE", disk), ("CPU", seconds),
    ("CORE", 0), ("NPROC", {MAX_PROCESSES}), ("NOFILE", {MAX_OPEN_FILES}), ("MSGQUEUE", 0), ("MEMLOCK", 0),
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
source = sys.stdin.buffer.read()
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
first, last = sorted((secret, report))
os.closerange(3, first)
os.closerange(first + 1, last)
os.closerange(last + 1, 65536)
sys.argv[:] = ["program.py"]
main = sys.modules["__main__"] = types.ModuleType("__main__")
os.write(report, {READY!r})
exec(compile(source, "program.py", "exec", dont_inherit=True), main.__dict__)
os.write(report, os.read(secret, 64))
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    reason: "passed", "exit code N", "killed by signal N", "timed out" or "ended before its last line".
    stderr: the end of what it wrote there, at most `STDERR_BYTES` bytes of it.
    seconds: wall clock, with the start of the sandbox.
    """

    passed: bool
    reason: str
    stderr: str
    seconds: float


def check_sandbox() -> None:
    """Raise a UserError, which says what to do, where programs cannot be run in a sandbox."""
    outcome = run_program("", timeout=60.0)  # a minute: a machine may be slow, or its disk asleep
    if not outcome.passed:
        raise UserError(f"an empty program does not pass in the sandbox: {outcome.reason}. {outcome.stderr}")


def run_all(programs: Iterable[str], workers: int, timeout: float = 10.0) -> Iterator[Outcome]:
    """`run_program` of each program, `workers` at a time, in the order of `programs`."""
    if workers < 1:
        raise UserError(f"{workers} workers cannot run programs; give 1 or more, for example one for each CPU core")
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda source: run_program(source, timeout), programs)


def run_program(source: str, timeout: float = 10.0, memory_mb: int = 512, disk_mb: int = 16) -> Outcome:
    """Run a Python program in a sandbox: it passes if its last line is reached and its exit code is 0.

    timeout: seconds of wall clock. memory_mb: MiB of address space of each process. disk_mb: MiB of its files.
    Raises UserError where a sandbox cannot be had, or where these limits make no sense.
    """
    if timeout <= 0 or disk_mb < 1 or memory_mb < MIN_MEMORY_MB:
        raise UserError(
            f"a sandbox with timeout {timeout}, memory_mb {memory_mb} and disk_mb {disk_mb} cannot run a program; "
            f"expected more than 0 seconds, at least {MIN_MEMORY_MB} and at least 1"
        )
    begin = time.monotonic()
    secret = secrets.token_bytes(16)
    with contextlib.ExitStack() as files:
        secret_read, secret_write = _pipe(files)
        report_read, report_write = _pipe(files)
        os.write(secret_write.fileno(), secret)
        limits = (memory_mb * MIB, disk_mb * MIB, math.ceil(timeout) + 1)
        numbers = [str(n) for n in (secret_read.fileno(), report_write.fileno(), *limits)]
        python = _interpreter()
        process = _start(
            [*_bubblewrap(python, disk_mb), "--", str(python), "-I", "-X", "utf8", "-c", INSIDE, *numbers],
            _in_memory(source, files),
            (secret_read.fileno(), report_write.fileno()),
        )
        report_write.close()
        stderr, timed_out = _watch(process, begin + timeout)
        os.set_blocking(report_read.fileno(), False)
        report = report_read.read(len(READY + secret) + 1) or b""
    if not timed_out and not report.startswith(READY):
        raise UserError(_what_to_do(stderr))
    reason = "timed out" if timed_out else _reason(process.returncode, report == READY + secret)
    return Outcome(reason == "passed", reason, stderr, time.monotonic() - begin)


def _reason(code: int, finished: bool) -> str:
    if code == 0:
        return "passed" if finished else "ended before its last line"
    if code < 0 or code > 128:  # bubblewrap ends with 128 + the signal that ended the program
        return f"killed by signal {-code if code < 0 else code - 128}"
    return f"exit code {code}"


def _pipe(files: contextlib.ExitStack):
    """The two ends of a pipe, unbuffered; `files` closes them."""
    read, write = os.pipe()
    return files.enter_context(open(read, "rb", buffering=0)), files.enter_context(open(write, "wb", buffering=0))


def _in_memory(source: str, files: contextlib.ExitStack):
    """A file with the program's text that has no name. A pipe would block us on a long program."""
    file = files.enter_context(os.fdopen(os.memfd_create("program"), "wb+"))
    file.write(source.encode("utf-8", "surrogatepass"))
    file.seek(0)
    return file


def _start(command: list[str], stdin, pass_fds: tuple[int, ...]) -> subprocess.Popen:
    # RLIMIT_NPROC does not bind root, and root could do more if it got out. Not by preexec_fn, which can deadlock
    # where other threads run.
    nobody: dict = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            env={},
            cwd="/",
            start_new_session=True,
            **nobody,
        )
    except OSError as error:
        raise UserError(
            f"{command[0]} cannot be started{' as user 65534' if nobody else ''}: {error}. "
            "Start the evaluation as a normal user, or on a machine where root may change its user"
        ) from error


def _watch(process: subprocess.Popen, deadline: float) -> tuple[str, bool]:
    """Wait for the end, or kill all at `deadline` (of time.monotonic). The end of stderr, and whether it timed out."""
    assert process.stderr is not None, "stderr is piped"
    tail = b""
    with process.stderr as pipe:
        try:
            tail = _read_tail(pipe.fileno(), tail, deadline)
            process.wait(max(0.0, deadline - time.monotonic()))  # it may have closed its stderr
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            # also where it ended: nothing of it may be left. The first process of the sandbox gets a signal when
            # bubblewrap dies (--die-with-parent), and with it the kernel ends the whole PID namespace.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tail = _read_tail(pipe.fileno(), tail, time.monotonic() + KILLED_SECONDS)
    return tail.decode("utf-8", "replace").strip(), timed_out


def _read_tail(pipe: int, tail: bytes, deadline: float) -> bytes:
    """Read to the end or to `deadline`, and keep the last `STDERR_BYTES` of `tail` and what came.

    A program that writes more than a pipe holds has to be read all the time, or it would wait for us.
    """
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(pipe, 65536)
        if not chunk:
            break
        tail = (tail + chunk)[-STDERR_BYTES:]
        if time.monotonic() > deadline:
            break
    return tail


def _interpreter() -> Path:
    """The Python that runs programs: the one that our virtual environment was made from, or the system's.

    The latter where we are root and ours lies where `NOBODY` cannot read, for example in /root.
    """
    own = Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
    if os.geteuid() != 0:
        return own
    for python in (own, *(Path(name).resolve() for name in SYSTEM_PYTHONS)):
        if python.exists() and all(folder.stat().st_mode & 0o001 for folder in (python, *python.parents)):
            return python
    raise UserError(
        f"root runs generated code as user {NOBODY}, who cannot read {own}, and there is no {SYSTEM_PYTHONS[0]}. "
        "Install the system's Python (apt install python3), or start the evaluation as a normal user"
    )


def _bubblewrap(python: Path, disk_mb: int) -> list[str]:
    """The command line up to `--`. Order matters: what is mounted first is covered by what comes after."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError(
            "generated code is only run in a sandbox, and bwrap is not on the PATH. Install bubblewrap 0.8 or newer "
            "(apt install bubblewrap), or evaluate without the tasks that run code"
        )
    arguments = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    arguments += ["--die-with-parent", "--new-session", "--clearenv"]
    for folder in ("/lib", "/lib64"):  # links to /usr/lib on most systems
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        else:
            arguments += ["--ro-bind-try", folder, folder]
    libraries = [python.parent.parent / name for name in ("lib", "lib64")]
    for path in ("/usr/lib", "/usr/lib64", *libraries, python, "/etc/ld.so.cache"):
        arguments += ["--ro-bind-try", str(path), str(path)]
    # /dev and the root folder are in memory too, without a limit of size
    arguments += ["--dev", "/dev", "--remount-ro", "/dev", "--size", str(disk_mb * MIB), "--tmpfs", "/tmp"]
    return [*arguments, "--remount-ro", "/", "--chdir", "/tmp"]


def _what_to_do(stderr: str) -> str:
    """The error for a sandbox that did not come to its program, from what bubblewrap wrote."""
    found = f"the sandbox for generated code cannot be set up: {stderr or 'bwrap says nothing'}."
    if any(word in stderr for word in FORBIDDEN):
        values = [f"{name.replace('/', '.')} = {_sysctl(name)}" for name in SYSCTLS]
        return (
            f"{found} This machine forbids unprivileged user namespaces, or a container takes them away "
            f"({', '.join(values)}). Allow them: sysctl -w kernel.unprivileged_userns_clone=1 "
            "kernel.apparmor_restrict_unprivileged_userns=0 (where these exist); in Docker: --security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined. "
            "Or save the generations and run the code on another machine"
        )
    return f"{found} Expected is bubblewrap 0.8 or newer (see bwrap --version)"


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return "absent"
