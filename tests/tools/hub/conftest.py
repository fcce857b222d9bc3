"""A finished run, whose checkpoints are pushed."""

import shutil
from pathlib import Path

import pytest
from helpers import launch

from tools.run_checkpoints import checkpoint_steps


@pytest.fixture(scope="session")
def trained(tiny_run):
    """A finished run with checkpoints of steps 2, 4, 5, 6."""
    arguments, folder = tiny_run("hub", **{"train.steps": 6, "checkpoint.every": 2, "checkpoint.keep": 9})
    outcome = launch(1, [*arguments, "train.exit_interval=5"])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    outcome = launch(1, [*arguments, "train.exit_interval=0"])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert checkpoint_steps(folder) == [2, 4, 5, 6]
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
