"""`sbatch slurm/data_prep.sh` on two nodes makes the same bytes as one process."""

import re
from pathlib import Path

import pytest
from helpers import config, digest, write_jsonl

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
