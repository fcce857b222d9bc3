"""What keeps a run alive, in this process: metrics, guards, checkpoints that are found or refused, the watchdog."""

import hashlib
import json
import time

import pytest

from common.config import load_config
from common.errors import UserError
from pretrain.config import CheckpointConfig, GuardConfig, RunConfig
from pretrain.runtime import checkpoint, resume
from pretrain.runtime.guards import Guard
from pretrain.runtime.metrics import MetricLogger, read_metrics
from pretrain.runtime.watchdog import Watchdog


def config_of(folder, *overrides: str) -> RunConfig:
    return load_config(RunConfig, None, [f"run_dir={folder}", "wandb.mode=disabled", *overrides])


def record(step: int) -> dict:
    return {"step": step, "loss": float(step), "lr": 0.1, "step_seconds": 0.5}


def log_steps(config: RunConfig, start: int, steps: range) -> None:
    logger = MetricLogger(config, start, 10, enabled=True)
    for step in steps:
        logger.log({"step": 0} if step == 0 else record(step))
    logger.close()


def test_a_resumed_run_drops_the_metrics_after_its_checkpoint(tmp_path):
    config = config_of(tmp_path)
    log_steps(config, 0, range(5))
    log_steps(config, 2, range(3, 6))
    assert [m["step"] for m in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_begins_anew_writes_step_0_once(tmp_path):
    config = config_of(tmp_path)
    log_steps(config, 0, range(2))
    log_steps(config, 0, range(3))
    assert [m["step"] for m in read_metrics(tmp_path)] == [0, 1, 2]


def test_the_heartbeat_is_the_last_step(tmp_path):
    before = time.time()
    log_steps(config_of(tmp_path), 0, range(4))
    beat = json.loads((tmp_path / "heartbeat").read_text())
    assert beat["step"] == 3 and before <= beat["time"] <= time.time()


def test_a_disabled_logger_writes_nothing(tmp_path):
    logger = MetricLogger(config_of(tmp_path), 0, 10, enabled=False)
    logger.log(record(1))
    logger.rewind(0)
    logger.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(5, 7), (10, 11)], [[5, 7], [10, 11]]),
        ([(5, 7), (3, 8)], [[3, 8]]),
        ([(18, 20), (17, 22)], [[17, 22]]),
        ([(5, 7), (8, 9)], [[5, 9]]),
        ([(10, 12), (2, 3), (3, 11)], [[2, 12]]),
    ],
)
def test_batches_left_out_never_overlap_and_each_other_batch_comes_once(ranges, expected):
    guard = Guard(GuardConfig(), ("loss",))
    for first, last in ranges:
        guard.skip_batches(first, last)
    assert guard.left_out == expected
    skipped = {n for first, last in expected for n in range(first, last + 1)}
    assert [guard.batch(step) for step in range(30)] == [n for n in range(60) if n not in skipped][:30]


def make_checkpoint(run_dir, step: int, **about) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"weights")
    file = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    found = {"step": step, "world_size": 1, "zero_stage": 1, "corpus_fingerprint": "f", "corpus": "data/x", **about}
    (folder / "checkpoint.json").write_text(json.dumps({**found, "files": {"weights.pt": file}}))


DS = {"zero_optimization": {"stage": 1}}


def test_the_newest_checkpoint_is_resumed_from(tmp_path):
    for step in (1, 3, 2):
        make_checkpoint(tmp_path, step)
    folder, about = resume.find_resume_checkpoint(config_of(tmp_path), DS, "f")
    assert folder.name == "step_00000003" and about["step"] == 3
    assert resume.find_resume_checkpoint(config_of(tmp_path / "empty"), DS, "f") is None


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"zero_stage": 3}, "was written with ZeRO stage 3, now 1"),
        ({"corpus_fingerprint": "other"}, "was trained on other shards than"),
        ({"offload": "cpu"}, "was written with offload_optimizer cpu, now none"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, about, message):
    make_checkpoint(tmp_path, 1, **about)
    with pytest.raises(UserError, match=message):
        resume.find_resume_checkpoint(config_of(tmp_path), DS, "f")


def test_other_shards_may_be_allowed(tmp_path):
    make_checkpoint(tmp_path, 1, corpus_fingerprint="other")
    assert resume.find_resume_checkpoint(config_of(tmp_path, "checkpoint.allow_changes=true"), DS, "f") is not None


def test_the_newest_checkpoints_and_every_nth_are_kept(tmp_path):
    for step in range(1, 9):
        make_checkpoint(tmp_path, step)
    checkpoint._delete_old(tmp_path / "checkpoints", CheckpointConfig(keep=2, keep_every=3))
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in (3, 6, 7, 8)]


@pytest.mark.parametrize(
    "override", ["objective=autoregressive", "model.init=random", "model.mask_token_id=3", "model.mask_token='<m>'"]
)
def test_another_model_is_refused_whatever_is_allowed(tmp_path, override):
    resume.save_config(config_of(tmp_path), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"holds a run with .* the same value to resume$"):
        resume.check_same_run(config_of(tmp_path, override, "checkpoint.allow_changes=true"))
    resume.check_same_run(config_of(tmp_path, "optimizer.lr=1", "checkpoint.allow_changes=true"))
    with pytest.raises(UserError, match=r"or checkpoint\.allow_changes=true$"):
        resume.check_same_run(config_of(tmp_path, "optimizer.lr=1"))


def test_the_watchdog_survives_a_disk_that_takes_nothing(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    watchdog = Watchdog(tmp_path, 0, 1, minutes=1)
    time.sleep(0.1)
    assert watchdog.is_alive()
    watchdog.close()
    watchdog.join(5)
    assert not watchdog.is_alive()
