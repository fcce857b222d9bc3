"""`sbatch slurm/diffullama_7b.sh` over two nodes, requeued in the middle, ends like an undisturbed run."""

import json

import pytest
from helpers import START_SECONDS, assert_same_metrics, run, wait_for

from pretrain.runtime.metrics import read_metrics

pytestmark = pytest.mark.slow

SMALL = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]


@pytest.fixture
def small(tiny_run):
    """Overrides that make the 7B job a tiny one, and its run folder."""

    def arguments(name: str):
        settings = {"train.steps": 80, "checkpoint.every": 30, "wandb.mode": "disabled"}
        found, folder = tiny_run(name, "llama", 3, **settings)
        return found[found.index("--deepspeed_config") + 2 :], folder

    return arguments


def test_requeued_in_the_middle_it_ends_the_same(cluster, small, tmp_path):
    (tmp_path / "config.yaml").write_text("{}\n")
    environment = {
        "CONFIG": str(tmp_path / "config.yaml"), "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu",
        "RANK": "0", "WORLD_SIZE": "1",  # left over in the shell that submits
    }  # fmt: skip
    overrides, folder = small("slurm")
    job = cluster.submit(*SMALL, "slurm/diffullama_7b.sh", *overrides, **environment)
    wait_for(lambda: len(read_metrics(folder)) >= 10, START_SECONDS, lambda: f"10 lines\n{cluster.output(job)}")
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "PENDING", "RUNNING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert "resuming from step" in cluster.output(job), cluster.output(job)

    undisturbed, other = small("undisturbed")
    run(2, ["pretrain/main.py", "--config", environment["CONFIG"],
            "--deepspeed_config", "ds_configs/zero3.json", *undisturbed])  # fmt: skip
    assert json.loads((folder / "checkpoints/step_00000080/checkpoint.json").read_text())["world_size"] == 2
    assert [m["step"] for m in read_metrics(folder)] == list(range(81))
    assert_same_metrics(read_metrics(folder), read_metrics(other))
