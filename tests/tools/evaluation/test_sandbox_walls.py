"""What a program in the sandbox cannot see or reach: the network, files, secrets and other processes."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import uuid
from pathlib import Path

import pytest
from bubblewrap import AS_NOBODY, needs_bubblewrap
from helpers import ROOT

from tools.evaluation.sandbox import Outcome, run_program

pytestmark = needs_bubblewrap


def run(source: str, **values) -> Outcome:
    """Run a program that knows `values`."""
    head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return run_program(head + textwrap.dedent(source))


SERVERS = {  # how to open each, and a program that reaches it
    "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
    "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
    "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{uuid.uuid4()}"),
}
REACH = """
import socket
s = socket.socket(family, kind)
s.settimeout(2)
s.connect(address)
s.send(b"hello")
"""


@pytest.mark.parametrize("name", SERVERS)
def test_no_server_of_this_machine_is_reached(name):
    family, kind, address = SERVERS[name]
    with socket.socket(family, kind) as server:
        server.bind(address)
        server.settimeout(0.3)
        if kind == socket.SOCK_STREAM:
            server.listen()
        values = {"family": int(family), "kind": int(kind), "address": server.getsockname()}
        if name == "abstract":
            values["address"] = server.getsockname().decode()

        run(REACH, **values)
        receive = server.accept if kind == socket.SOCK_STREAM else lambda: server.recv(5)
        with pytest.raises(TimeoutError):
            receive()
        # outside, the same program does reach it
        head = "".join(f"{key} = {value!r}\n" for key, value in values.items())
        subprocess.run([sys.executable, "-c", head + REACH], check=True)
        assert receive()


def test_there_is_no_network_at_all():
    outcome = run("""
        import socket
        assert [name for _, name in socket.if_nameindex()] == ["lo"]
        for attempt in (
            lambda: socket.create_connection(("1.1.1.1", 53), timeout=2),
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("1.1.1.1", 53)),
            lambda: socket.getaddrinfo("example.com", 80),
        ):
            try:
                attempt()
            except OSError as error:
                assert not isinstance(error, TimeoutError)
                continue
            raise AssertionError("reached")
        """)
    assert outcome.passed, outcome.stderr
    assert outcome.seconds < 5


@pytest.mark.parametrize("place", ["tmp", "home"])
def test_no_file_outside_is_seen_or_deleted(place):
    parent = Path(tempfile.gettempdir()) if place == "tmp" else Path.home()
    if not os.access(parent, os.W_OK):
        pytest.skip(f"{parent} is not writable")
    with tempfile.TemporaryDirectory(dir=parent, prefix="sandbox_canary_") as folder:
        canary = Path(folder, "canary")
        canary.write_text("alive")
        Path(folder).chmod(0o777)
        canary.chmod(0o666)
        outcome = run(
            """
            import os, shutil
            assert not os.path.exists(canary)
            for path in (canary, os.path.dirname(canary), os.path.expanduser("~"), os.getcwd(), "/tmp", "/"):
                shutil.rmtree(path, ignore_errors=True)
            os.makedirs(os.path.dirname(canary), exist_ok=True)
            open(canary, "w").write("overwritten")
            """,
            canary=str(canary),
        )
        # in /tmp it may write a file of that name, which is its own; elsewhere it may write nothing
        assert outcome.passed == parent.is_relative_to("/tmp"), outcome.stderr
        assert canary.read_text() == "alive"


def test_only_the_interpreter_is_seen():
    """Of the whole machine: libraries, one Python, devices that do no harm, an empty /tmp."""
    outcome = run(
        """
        import os, sys
        assert set(os.listdir("/")) <= {"dev", "etc", "lib", "lib64", "root", "home", "opt", "tmp", "usr"}
        assert set(os.listdir("/etc") if os.path.exists("/etc") else []) <= {"ld.so.cache"}
        assert os.listdir("/tmp") == [] and os.getcwd() == "/tmp"
        assert not os.path.exists("/proc") and not os.path.exists("/sys") and not os.path.exists(repository)
        assert not any(name.startswith(("sd", "vd", "nvme", "nvidia", "kvm", "mem")) for name in os.listdir("/dev"))
        assert sys.executable.startswith("/") and os.access(sys.executable, os.X_OK)
        for path in (sys.executable, os.__file__):  # read-only, and not only another user's
            assert os.statvfs(path).f_flag & os.ST_RDONLY
        """,
        repository=str(ROOT),
    )
    assert outcome.passed, outcome.stderr


def test_no_file_of_ours_is_inherited():
    """Not one that leads out, such as a folder; only the three streams and the two pipes."""
    with open(ROOT / "setup.py") as file:
        os.set_inheritable(file.fileno(), True)
        folder = os.open(ROOT, os.O_RDONLY)
        os.set_inheritable(folder, True)
        outcome = run("""
            import os, sys
            modes = []
            for n in range(256):
                try:
                    modes.append(os.fstat(n).st_mode)
                except OSError:
                    pass
            sys.stderr.write(repr(modes))
            """)
        os.close(folder)
    modes = [int(mode) for mode in outcome.stderr.strip("[]").split(",")]
    assert len(modes) == 5
    assert all(stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) for mode in modes)


def test_secrets_of_the_environment_are_not_seen(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "PYTHONPATH", "HOME"):
        monkeypatch.setenv(name, "hf_canary")
    outcome = run("""
        import glob, os
        names = set(os.environ)
        assert names <= {"PWD", "LC_CTYPE"}, names
        seen = [repr(dict(os.environ))]
        for path in glob.glob("/proc/*/environ"):
            try:
                seen.append(open(path, errors="replace").read())
            except OSError:
                pass
        assert not any("hf_" + "canary" in text for text in seen)
        """)
    assert outcome.passed, outcome.stderr


def test_other_processes_are_neither_seen_nor_killed():
    """Not the harness, and not one that the sandbox's own user could kill if it were outside."""
    victim = subprocess.Popen(["sleep", "60"], cwd="/", **AS_NOBODY)
    try:
        outcome = run(
            """
            import os, signal
            for pid in pids:
                for attempt in (
                    lambda: os.kill(pid, signal.SIGKILL),
                    lambda: os.killpg(pid, signal.SIGKILL),
                    lambda: open(f"/proc/{pid}/environ"),
                    lambda: open(f"/proc/{pid}/mem"),
                    lambda: os.readlink(f"/proc/{pid}/cwd"),
                    lambda: os.sched_setaffinity(pid, {0}),
                ):
                    try:
                        attempt()
                    except OSError:
                        continue
                    raise AssertionError(pid)
            os.kill(1, signal.SIGKILL)  # the first process of the sandbox takes no signal from inside
            assert os.getpid() < 10 and os.getppid() < 10
            """,
            pids=[os.getpid(), victim.pid],
        )
        assert outcome.passed, outcome.stderr
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
