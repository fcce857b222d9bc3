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
# Runs the job at once, or each of its array, and writes down what was asked for
import json, os, re, subprocess, sys

options = [word for word in sys.argv[1:] if word.startswith("--")]
given = [word for word in sys.argv[1:] if not word.startswith("--")]
count = next((int(word.split("-")[-1]) + 1 for word in options if word.startswith("--array=")), 0)
with open("{log}", "a+") as log:
    log.seek(0)
    job = len(log.readlines()) + 1
    print(json.dumps([os.environ["STAGE"], options]), file=log)
for task in range(count or 1):
    array = dict(SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=str(count)) if count else dict()
    subprocess.run(["bash", *given], env=dict(os.environ, SLURM_CPUS_PER_TASK="1", **array), check=True, stdout=2)
print(f"{{job}};cluster")
"""


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_each_job_begins_after_those_it_needs(tokenizer_dir, tales, tmp_path, deduplicate):
    path = write_jsonl(tmp_path / "a.jsonl", tales[:60] * 2)
    settings = {"unit_mb": 0.05, "validation_fraction": 0.1, "deduplicate": "exact"}
    prepare(config(tmp_path / "whole", tokenizer_dir, [path], **{**settings, "deduplicate": deduplicate}), False)
    (tmp_path / "array").mkdir()
    save_config(config(tmp_path / "array", tokenizer_dir, [path], **settings), tmp_path / "config.yaml")
    log = tmp_path / "jobs"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH.format(python=sys.executable, log=log))
    sbatch.chmod(0o755)
    out = tmp_path / "array" / "out"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{sbatch.parent}:{os.environ['PATH']}", "VENV": os.environ.get("VIRTUAL_ENV", str(ROOT / ".venv")),
        "TASKS": "2", "CPUS": "3", "SHARE_OPTIONS": "--mem=1G --partition=cpu", "VERIFY": str(out),
    }  # fmt: skip
    command = ["bash", "slurm/data_prep.sh", str(tmp_path / "config.yaml"), f"deduplicate={deduplicate}"]
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert outcome.returncode == 0, outcome.stderr
    jobs = [json.loads(line) for line in log.read_text().splitlines()]
    each = ["--parsable", "--cpus-per-task=3", "--mem=1G", "--partition=cpu"]

    def after(number: int) -> list[str]:
        return [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]

    expected = [["hash", [*each, "--array=0-1"]], ["choose", [*each, *after(1)]]] if deduplicate == "exact" else []
    before = len(expected)
    expected += [
        ["share", [*each, "--array=0-1", *(after(2) if before else [])]],
        ["merge", ["--parsable", *after(before + 1)]],
        ["verify", [*each, "--array=0-1", *after(before + 2)]],
    ]
    assert [(stage, set(options)) for stage, options in jobs] == [(stage, set(options)) for stage, options in expected]
    assert f"2 shares as job {before + 1} and the merge after them as job {before + 2}" in outcome.stdout
    assert outcome.stderr.count("match the manifest") == 2
    assert digest(out) == digest(tmp_path / "whole" / "out")
