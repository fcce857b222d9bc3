"""What a cluster does to runs: other numbers of ranks, damaged and missing files, a full disk."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import config, launch, start, write_jsonl

from data_prep.prepare import prepare
from pretrain.telemetry import read_metrics

COMPARED = ("loss", "masked_ce", "grad_norm", "lr")


def run(ranks: int, arguments: list[str], expected: int = 0) -> str:
    outcome = launch(ranks, arguments)
    assert outcome.returncode == expected, outcome.stdout[-1000:] + outcome.stderr[-3000:]
    return outcome.stdout + outcome.stderr


def assert_close(a: list[dict], b: list[dict], rel: float) -> None:
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for x, y in zip(a[1:], b[1:]):
        for key in COMPARED:
            assert x[key] == pytest.approx(y[key], rel=rel), (x["step"], key)


@pytest.fixture(scope="module")
def unchanged(tiny_run):
    """`unchanged(stage)`: metrics of 6 steps on 2 ranks."""
    made: dict[int, list[dict]] = {}

    def metrics(stage: int) -> list[dict]:
        if stage not in made:
            arguments, folder = tiny_run(f"unchanged{stage}", stage=stage, **{"train.steps": 6})
            run(2, arguments)
            made[stage] = read_metrics(folder)
        return made[stage]

    return metrics


@pytest.mark.parametrize(("stage", "ranks"), [(1, (2, 1, 2)), (2, (2, 1, 2)), (3, (2, 1, 2)), (3, (4, 2))])
def test_on_other_numbers_of_ranks_it_goes_on_the_same(tiny_run, unchanged, tmp_path, stage, ranks):
    """The losses of a run that never changed, and every sample once: as recorded where ranks train on them."""
    name = f"{stage}{''.join(map(str, ranks))}"
    settings = {"train.steps": 6, "train.exit_interval": 6 // len(ranks)}
    arguments, folder = tiny_run(f"elastic{name}", stage=stage, **settings)
    seen: dict[int, list[int]] = {step: [] for step in range(6)}
    for launched, n in enumerate(ranks):
        output = run(n, ["tests/scripts/patched.py", "record", str(tmp_path / f"samples{launched}"), *arguments])
        for path in tmp_path.glob(f"samples{launched}.*"):
            for line in path.read_text().splitlines():
                seen[json.loads(line)["step"]] += json.loads(line)["numbers"]
    assert f"was written by {ranks[-2]} ranks, now {ranks[-1]}" in output
    assert_close(unchanged(stage), read_metrics(folder), 1e-5)
    assert not list((folder / "checkpoints").glob("*.universal"))
    assert {step: sorted(numbers) for step, numbers in seen.items()} == {
        step: list(range(8 * step, 8 * step + 8)) for step in range(6)
    }


def test_another_zero_stage_is_refused(tiny_run):
    arguments, _ = tiny_run("stage", stage=1, **{"train.steps": 2, "train.exit_interval": 1})
    run(1, arguments)
    other, _ = tiny_run("stage", stage=3, **{"train.steps": 2, "train.exit_interval": 1})
    assert "was written with ZeRO stage 1, now 3" in run(1, other, expected=2)


def test_other_shards_are_refused_and_moved_ones_are_not(tiny_run, corpus_dir, tokenizer_dir, tales, tmp_path):
    arguments, _ = tiny_run("shards", **{"train.steps": 3, "train.exit_interval": 1})
    run(1, arguments)
    shutil.copytree(corpus_dir, tmp_path / "moved")
    run(1, [*arguments, f"data.path={tmp_path / 'moved'}"])
    other = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:50])], seq_len=32)
    prepare(other, progress=False)
    output = run(1, [*arguments, f"data.path={other.output_dir}"], expected=2)
    assert "was trained on other shards than" in output and "checkpoint.allow_changes=true" in output
    run(1, [*arguments, f"data.path={other.output_dir}", "checkpoint.allow_changes=true"])


def test_another_offload_setting_is_refused(tiny_run):
    arguments, _ = tiny_run("offload", stage=3, **{"train.steps": 2, "train.exit_interval": 1})
    run(1, arguments)
    arguments[arguments.index("ds_configs/zero3.json")] = "ds_configs/zero3_offload.json"
    assert "was written with offload_optimizer none, now cpu" in run(1, arguments, expected=2)


@pytest.fixture(scope="module")
def undamaged(tiny_run) -> tuple[Path, list[dict]]:
    """A run folder at step 3 of 4, and the metrics of the same run to its end."""
    settings = {"checkpoint.every": 1, "train.steps": 4}
    arguments, folder = tiny_run("undamaged", **settings, **{"train.exit_interval": 3})
    run(1, arguments)
    whole_arguments, whole = tiny_run("undamaged_whole", **settings)
    run(1, whole_arguments)
    return folder, read_metrics(whole)


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "no checkpoint.json"])
def test_a_damaged_checkpoint_is_skipped_and_named(tiny_run, undamaged, damage):
    arguments, folder = tiny_run(damage.replace(" ", "_"), **{"checkpoint.every": 1, "train.steps": 4})
    shutil.copytree(undamaged[0], folder)
    newest = folder / "checkpoints" / "step_00000003"
    about = json.loads((newest / "checkpoint.json").read_text())
    victim = newest / next(file for file in about["files"] if "optim" in file)
    if damage == "flipped byte":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        (victim if damage == "missing file" else newest / "checkpoint.json").unlink()
    output = run(1, arguments)
    assert "step_00000003 is skipped:" in output and "resuming from step 2" in output
    assert_close(undamaged[1], read_metrics(folder), 0)


def test_when_none_can_be_used_nothing_is_overwritten(tiny_run):
    arguments, folder = tiny_run("none", **{"train.steps": 2, "train.exit_interval": 1})
    run(1, arguments)
    about = folder / "checkpoints" / "step_00000001" / "checkpoint.json"
    content = about.read_text()
    about.write_text("{")
    assert "no checkpoint in" in run(1, arguments, expected=2)
    about.write_text(content)
    run(1, arguments)
    assert read_metrics(folder)[-1]["step"] == 2


@contextlib.contextmanager
def small_disk(folder: Path, undamaged: Path, room: float):
    """`folder`/checkpoints is a file system of the size of `room` checkpoints."""
    (folder / "checkpoints").mkdir(parents=True)
    size = sum(f.stat().st_size for f in (undamaged / "checkpoints" / "step_00000003").rglob("*"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(size * room)}", "tmpfs", str(folder / "checkpoints")], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder / "checkpoints")], check=True)


only_root_mounts = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can mount the small file system that gets full"
)


@only_root_mounts
@pytest.mark.parametrize("room", [0, 1])
def test_without_room_for_another_checkpoint_training_goes_on(tiny_run, undamaged, room):
    """On a file system that has room for one, or for none."""
    name = f"disk{room}"
    arguments, folder = tiny_run(name, **{"train.steps": 3, "checkpoint.every": 1, "checkpoint.keep": 3})
    with small_disk(folder, undamaged[0], room + 0.6):
        output = run(1, arguments)
        for step in range(room + 1, 4):
            assert f"warning: step {step} is not saved" in output
        assert read_metrics(folder)[-1]["step"] == 3
        assert [f.name for f in (folder / "checkpoints").glob("step_*")] == ["step_00000001"][:room]


@only_root_mounts
def test_a_disk_that_gets_full_while_a_checkpoint_is_written_ends_the_run_in_one_line(tiny_run, undamaged):
    arguments, folder = tiny_run("filled", **{"train.steps": 4, "checkpoint.every": 1})
    with small_disk(folder, undamaged[0], 3.5):
        output = run(1, ["tests/scripts/patched.py", "fill", *arguments], expected=2)
        assert "error: rank 0 could not write step 2 to" in output and "Traceback" not in output
        (folder / "checkpoints" / "filler").unlink()
        assert "resuming from step 1" in run(1, arguments)
        assert_close(undamaged[1], read_metrics(folder), 0)


def test_some_checkpoints_are_kept_for_good(tiny_run):
    settings = {"checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 2, "train.steps": 5}
    arguments, folder = tiny_run("keep_every", **settings)
    run(1, arguments)
    kept = sorted(f.name for f in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000004", "step_00000005"]
    about = json.loads((folder / "checkpoints" / kept[0] / "checkpoint.json").read_text())
    assert sum(about["rows"].values()) == 2 * 8 and about["versions"]["torch"]


def test_a_changed_configuration_needs_a_word(tiny_run):
    arguments, folder = tiny_run("changed", **{"train.steps": 2, "train.exit_interval": 1})
    run(1, arguments)
    assert "checkpoint.allow_changes=true" in run(1, [*arguments, "optimizer.lr=0.5"], expected=2)
    run(1, [*arguments, "optimizer.lr=0.5", "checkpoint.allow_changes=true"])
    assert read_metrics(folder)[-1]["step"] == 2


def test_killed_at_any_moment_it_ends_the_same(tiny_run, tmp_path):
    """kill -9 of one rank, or of both, at ten moments, some of them while a checkpoint is written."""
    settings = {"train.steps": 24, "checkpoint.every": 1}
    whole_arguments, whole = tiny_run("kill_whole", **settings)
    run(2, whole_arguments)
    arguments, folder = tiny_run("kill", **settings)
    rng = random.Random(0)
    for number, target in enumerate(range(1, 21, 2)):
        started = start(2, arguments, tmp_path)
        while all(p.poll() is None for p in started) and not any(
            m["step"] >= target for m in read_metrics(folder)[-1:]
        ):
            time.sleep(0.002)
        if number % 2:  # in a step, or whatever comes
            time.sleep(rng.random() * 0.3)
        else:  # while it saves
            while all(p.poll() is None for p in started) and not list(folder.glob("checkpoints/*.tmp")):
                time.sleep(0.001)
        first = rng.choice(started)
        first.kill()
        if rng.random() < 0.5:
            time.sleep(0.3)  # the other one notices, or is in the middle of its part
        for process in started:  # as a launcher does when one is gone
            process.kill()
            process.wait()
    run(2, arguments)
    assert_close(read_metrics(whole), read_metrics(folder), 0)
