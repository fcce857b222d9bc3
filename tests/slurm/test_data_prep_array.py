"""slurm/data_prep.sh makes the bytes of one process: on two nodes, and by an sbatch that runs jobs at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, config, digest, write_jsonl

from common.config import save_config
from data_prep.prepare import prepare


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_an_array_of_jobs_gives_the_bytes_of_one_process(cluster, tokenizer_dir, tales, tmp_path, deduplicate):
    path = write_jsonl(tmp_path / "a.jsonl", tales[:200] * 2)
    settings = {"unit_mb": 0.05, "validation_fraction": 0.1, "deduplicate": deduplicate}
    prepare(config(tmp_path / "whole", tokenizer_dir, [path], **settings), progress=False)
    (tmp_path / "array").mkdir()
    save_config(config(tmp_path / "array", tokenizer_dir, [path], **settings), tmp_path / "config.yaml")

    job = cluster.submit("slurm/data_prep.sh", str(tmp_path / "config.yaml"), TASKS="4", CPUS="1",
                         SBATCH_OUTPUT=f"{cluster.folder}/%x-%j.out")  # fmt: skip
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    submitted = re.search(r"4 shares as job (\d+) and the merge after them as job (\d+)", cluster.output(job))
    assert submitted, cluster.output(job)
    assert cluster.wait(submitted[2]) == "COMPLETED", cluster.output(submitted[2])
    assert digest(tmp_path / "array" / "out") == digest(tmp_path / "whole" / "out")
    logs = [path.read_text() for path in Path(cluster.folder).glob("data_prep-*.out")]
    assert sum(bool(re.search(r"task \d of 4 is done", log)) for log in logs) >= 4


SBATCH = """#!{python}
# Runs the job at once, or each of its array, and writes down what was asked for. REFUSED names a stage that it does not
# take; of the stage KILLED, a task is killed once it has written a file *.hashes, and begins again
import json, os, signal, subprocess, sys, time
from pathlib import Path

options = [word for word in sys.argv[1:] if word.startswith("--")]
given = [word for word in sys.argv[1:] if not word.startswith("--")]
count = next((int(word.split("-")[-1]) + 1 for word in options if word.startswith("--array=")), 0)
with open("{log}", "a+") as log:
    log.seek(0)
    job = len(log.readlines()) + 1
    print(json.dumps([os.environ["STAGE"], options]), file=log)
if os.environ.get("REFUSED") == os.environ["STAGE"]:
    sys.exit("error: Job violates accounting/QOS policy")
for task in range(count or 1):
    array = dict(SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=str(count)) if count else dict()
    environment = dict(os.environ, SLURM_CPUS_PER_TASK="1", **array)
    if os.environ.get("KILLED") == os.environ["STAGE"] and task == 0:
        job_step = subprocess.Popen(["bash", *given], env=environment, stdout=2, start_new_session=True)
        while job_step.poll() is None and not list(Path("{out}").glob(".work/*.hashes")):
            time.sleep(0.002)
        os.killpg(job_step.pid, signal.SIGKILL)
        print("killed with", job_step.wait(), "after", len(list(Path("{out}").glob(".work/*.hashes"))), file=sys.stderr)
    subprocess.run(["bash", *given], env=environment, check=True, stdout=2)
print(f"{{job}};cluster")
"""


def submit_to_fake(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], unit_mb: float, *overrides: str, **environment: str
) -> tuple[subprocess.CompletedProcess, list[tuple[str, set[str]]]]:
    """The job script with the sbatch above; returns what it printed, and each job's stage and options."""
    (tmp_path / "array").mkdir()
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    settings = {"unit_mb": unit_mb, "validation_fraction": 0.1, "deduplicate": "exact"}
    save_config(config(tmp_path / "array", tokenizer_dir, [path], **settings), tmp_path / "config.yaml")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH.format(python=sys.executable, log=tmp_path / "jobs", out=tmp_path / "array" / "out"))
    sbatch.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{sbatch.parent}:{os.environ['PATH']}", "VENV": os.environ.get("VIRTUAL_ENV", str(ROOT / ".venv")),
        "TASKS": "2", "CPUS": "3", **environment,
    }  # fmt: skip
    command = ["bash", "slurm/data_prep.sh", str(tmp_path / "config.yaml"), *overrides]
    outcome = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    jobs = [json.loads(line) for line in (tmp_path / "jobs").read_text().splitlines()]
    return outcome, [(stage, set(options)) for stage, options in jobs]


def made_by_one_process(tmp_path: Path, tokenizer_dir: Path, **settings) -> dict[str, str]:
    paths = [tmp_path / "a.jsonl"]
    prepare(config(tmp_path / "whole", tokenizer_dir, paths, validation_fraction=0.1, **settings), progress=False)
    return digest(tmp_path / "whole" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_each_job_begins_after_those_it_needs(tokenizer_dir, tales, tmp_path, deduplicate):
    options = {"SHARE_OPTIONS": "--mem=1G --partition=cpu", "VERIFY": "1"}
    texts = tales[:60] * 2
    outcome, jobs = submit_to_fake(tmp_path, tokenizer_dir, texts, 0.05, f"deduplicate={deduplicate}", **options)
    assert outcome.returncode == 0, outcome.stderr
    each = ["--parsable", "--cpus-per-task=3", "--mem=1G", "--partition=cpu"]

    def after(number: int) -> list[str]:
        return [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]

    expected = [("hash", [*each, "--array=0-1"]), ("choose", [*each, *after(1)])] if deduplicate == "exact" else []
    before = len(expected)
    expected += [
        ("share", [*each, "--array=0-1", *(after(2) if before else [])]),
        ("merge", ["--parsable", *after(before + 1)]),
        ("verify", [*each, "--array=0-1", *after(before + 2)]),
    ]
    assert jobs == [(stage, set(options)) for stage, options in expected]
    assert f"2 shares as job {before + 1} and the merge after them as job {before + 2}" in outcome.stdout
    assert outcome.stderr.count("match the manifest") == 2
    whole = made_by_one_process(tmp_path, tokenizer_dir, unit_mb=0.05, deduplicate=deduplicate)
    assert digest(tmp_path / "array" / "out") == whole


@pytest.mark.slow
def test_a_hashing_task_that_was_killed_goes_on(tokenizer_dir, tales, tmp_path):
    texts = [f"{number % 700}: {tales[number % 50]}" for number in range(1000)]
    outcome, _ = submit_to_fake(tmp_path, tokenizer_dir, texts, 0.01, KILLED="hash")
    assert outcome.returncode == 0, outcome.stderr
    killed = re.search(r"killed with -9 after (\d+)", outcome.stderr)
    hashed = re.findall(r"hash the documents of (\d+) of (\d+) units", outcome.stderr)
    assert killed and hashed, outcome.stderr
    first, units = max(int(count) for count, _ in hashed), int(hashed[0][1])
    assert first == units and (str(units - int(killed[1])), str(units)) in hashed  # what was done is not done again
    whole = made_by_one_process(tmp_path, tokenizer_dir, unit_mb=0.01, deduplicate="exact")
    assert digest(tmp_path / "array" / "out") == whole


@pytest.mark.parametrize("stage", ["hash", "share"])
def test_nothing_more_is_submitted_after_a_job_that_is_refused(tokenizer_dir, tales, tmp_path, stage):
    """It would begin without what it needs."""
    outcome, jobs = submit_to_fake(tmp_path, tokenizer_dir, tales[:10], 0.05, REFUSED=stage)
    assert outcome.returncode != 0 and "violates" in outcome.stderr
    assert jobs[-1][0] == stage
