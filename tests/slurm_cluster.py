"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, all in a temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
KillWait=5
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


START_SECONDS = 40  # for each of the daemons


class Cluster:
    """Commands against it; `environment` has SLURM_CONF and this project's Python."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "VENV": os.environ.get("VIRTUAL_ENV", str(ROOT / ".venv")),
        }

    def run(self, *command: str, **environment: str) -> str:
        outcome = subprocess.run(
            command, cwd=ROOT, env={**self.environment, **environment}, text=True, capture_output=True, check=False,
            timeout=60,
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        return outcome.stdout.strip()

    def submit(self, *arguments: str, **environment: str) -> str:
        """sbatch; returns the job id. Output goes to the cluster's folder."""
        output = f"--output={self.folder}/%x-%j.out"
        return self.run("sbatch", "--parsable", output, *arguments, **environment).split(";")[0]

    def state(self, job: str) -> str:
        found = self.run("scontrol", "--oneliner", "show", "job", job)
        return next(word.split("=")[1] for word in found.split() if word.startswith("JobState="))

    def wait(self, job: str, *states: str, seconds: float = 240) -> str:
        """Until the job is in one of `states`; by default until it has ended."""
        ended = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_for(
            lambda: self.state(job) in ended, seconds,
            lambda: f"job {job} one of {', '.join(ended)}\n{self.output(job)}", pause=0.2,
        )  # fmt: skip
        return self.state(job)

    def output(self, job: str) -> str:
        """What it printed, then the controller's log of it and how it ended: the end is what CI shows."""
        outputs = [path.read_text(errors="replace") for path in sorted(self.folder.glob(f"*-{job}.out"))]
        controller = (self.folder / "slurmctld.log").read_text(errors="replace").splitlines()
        about = [line for line in controller if f"JobId={job}" in line]
        return "\n".join([*outputs, *about[-30:], self.run("scontrol", "--oneliner", "show", "job", job)])


def _free_ports() -> list[int]:
    """Three in a row."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")  # two may look at the same time
    for first in range(17_000 + 1_000 * int(worker), 30_000, 10):
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            try:
                for n, s in enumerate((a, b, c)):
                    s.bind(("127.0.0.1", first + n))
                return [first, first + 1, first + 2]
            except OSError:
                continue
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"Slurm is not here ({', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start a Slurm of its own")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    ports, host = _free_ports(), socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))
    cluster = Cluster(folder)
    munge = ["munged", "--foreground", "--force", "--num-threads=2"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    commands = [
        [*munge, f"--socket={folder}/munge.socket"],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in ("n1", "n2")),
    ]
    processes = []
    try:
        for command in commands:
            log = open(folder / f"{Path(command[0]).name}-{len(processes)}.stderr", "wb")  # noqa: SIM115
            processes.append(
                subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log, start_new_session=True)
            )
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, START_SECONDS, lambda: f"munged\n{logs(folder)}")
        wait_for(lambda: nodes_are_idle(cluster), START_SECONDS, lambda: f"two idle nodes\n{logs(folder)}", pause=0.2)
        yield cluster
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def nodes_are_idle(cluster: Cluster) -> bool:
    """Both of them; False also while the controller does not answer yet."""
    try:
        return cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2"
    except AssertionError:
        return False


def logs(folder: Path) -> str:
    """The ends of what the daemons wrote."""
    found = [*folder.glob("*.log"), *folder.glob("*.stderr")]
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in found)
