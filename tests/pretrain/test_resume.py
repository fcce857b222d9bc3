"""What a cluster does to runs: other numbers of ranks, damaged and missing files, a full disk, kills; old runs."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from helpers import (
    START_SECONDS,
    assert_same_metrics,
    config,
    error_lines,
    kill,
    run,
    run_all,
    start,
    wait_for,
    write_jsonl,
)

from data_prep.prepare import prepare
from pretrain.runtime.metrics import read_metrics

pytestmark = pytest.mark.slow

EVERY_STEP = {"checkpoint.every": 1, "train.steps": 4}
STOPPED = {"train.steps": 3, "train.exit_interval": 1}
STRATIFIED = {"diffusion.time_sampling": "stratified"}


@pytest.fixture(scope="module")
def made(tiny_run) -> dict[str, Path]:
    """Folders of runs on one rank that the tests below copy or look at."""
    runs = {
        "whole": tiny_run("whole", **EVERY_STEP),
        "broken": tiny_run("broken", **EVERY_STEP, **{"train.exit_interval": 3}),  # at step 3 of 4
        "stopped": tiny_run("stopped", **STOPPED),  # at step 1 of 3
        "stopped at stage 1": tiny_run("stopped1", stage=1, **STOPPED),
        "whole, stratified": tiny_run("stratified", stage=2, **{"train.steps": 3}, **STRATIFIED),
        "stopped, stratified": tiny_run("stratified_stopped", stage=2, **STOPPED, **STRATIFIED),
        "kept": tiny_run("kept", **{"train.steps": 5, "checkpoint.every": 1, "checkpoint.keep": 1,
                                    "checkpoint.keep_every": 2}),
    }  # fmt: skip
    run_all(1, list(runs.values()))
    return {name: folder for name, (_, folder) in runs.items()}


@pytest.fixture(scope="module")
def elastic(tiny_run) -> dict[str, Path]:
    """Folders of 6 steps at stages 1, 2 and 3, by the numbers of ranks of their launches, with what each rank saw."""
    settings = {"train.steps": 6}
    folders = {}
    for launches, stages in (((2,), (1, 2, 3)), ((2, 1, 2), (1, 2, 3)), ((4, 2), (3,))):
        name = "".join(map(str, launches))
        stops = {"train.exit_interval": 6 // len(launches)}
        runs = [tiny_run(f"elastic{name}_{stage}", stage=stage, **settings, **stops) for stage in stages]
        for n, ranks in enumerate(launches):
            printed = run_all(ranks, runs, patched="record")
            if n:
                assert printed.count(f"was written by {launches[n - 1]} ranks, now {ranks}") == len(runs)
        folders |= {f"{name}_{stage}": folder for stage, (_, folder) in zip(stages, runs)}
    return folders


@pytest.mark.parametrize("changed", ["212_1", "212_2", "212_3", "42_3"])
def test_on_other_numbers_of_ranks_it_goes_on_the_same(elastic, changed):
    """The metrics of a run that never changed, and every row once: as recorded where ranks train on them."""
    folder = elastic[changed]
    assert_same_metrics(read_metrics(folder), read_metrics(elastic[f"2_{changed[-1]}"]), rel=1e-5)
    assert not list((folder / "checkpoints").glob("*.universal"))
    seen: dict[int, list[int]] = {step: [] for step in range(6)}
    for path in folder.glob("rows.*"):
        for line in path.read_text().splitlines():
            seen[json.loads(line)["step"]] += json.loads(line)["numbers"]
    assert {step: sorted(numbers) for step, numbers in seen.items()} == {
        step: list(range(8 * step, 8 * step + 8)) for step in range(6)
    }


def copied(tiny_run, folder: Path, name: str, stage: int = 3, **settings) -> tuple[list[str], Path]:
    """A copy of a run folder, and the arguments to go on with it."""
    arguments, copy = tiny_run(name, stage=stage, **settings)
    shutil.copytree(folder, copy)
    return arguments, copy


@pytest.fixture(scope="module")
def other_corpora(corpus_dir, tokenizer_dir, tales, tmp_path_factory) -> tuple[Path, str]:
    """(The corpus of all runs in another place, another corpus.)"""
    folder = tmp_path_factory.mktemp("corpora")
    shutil.copytree(corpus_dir, folder / "moved")
    other = config(folder, tokenizer_dir, [write_jsonl(folder / "a.jsonl", tales[:50])], seq_len=32)
    prepare(other, progress=False)
    return folder / "moved", other.output_dir


@pytest.fixture(scope="module")
def changes(tiny_run, made, other_corpora) -> dict[str, tuple[list[str], Path]]:
    """Copies of a run at step 1, each to go on with after a change."""
    _, other = other_corpora
    copy = copied(tiny_run, made["stopped"], "other shards", **STOPPED, **{"data.path": other})
    settings = copied(tiny_run, made["stopped"], "other settings", **STOPPED, **{"optimizer.lr": 0.5})
    damaged = copied(tiny_run, made["stopped"], "damaged", **STOPPED)
    (damaged[1] / "checkpoints/step_00000001/checkpoint.json").write_text("{")
    offload, offload_folder = copied(tiny_run, made["stopped"], "other offload", **STOPPED)
    offload[offload.index("ds_configs/zero3.json")] = "ds_configs/zero3_offload.json"
    return {
        "stage": copied(tiny_run, made["stopped at stage 1"], "other stage", stage=3, **STOPPED),
        "offload": (offload, offload_folder),
        "shards": copy,
        "settings": settings,
        "damaged": damaged,
    }


@pytest.fixture(scope="module")
def refusals(changes) -> dict[str, str]:
    """The error line of each change."""
    lines = error_lines(run_all(1, list(changes.values()), expected=2))
    assert len(lines) == len(changes)
    return dict(zip(changes, lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage", r"was written with ZeRO stage 1, now 3"),
        ("offload", r"was written with offload_optimizer none, now cpu"),
        ("shards", r"was trained on other shards than .*checkpoint\.allow_changes=true"),
        ("settings", r"holds a run with optimizer\.lr=0\.001, but 0\.5 .*checkpoint\.allow_changes=true"),
        ("damaged", r"no checkpoint in .*/damaged/checkpoints can be used; .*checkpoint\.json cannot be read"),
    ],
)
def test_what_would_compute_something_else_is_refused(refusals, changes, made, change, message):
    """And nothing is overwritten."""
    assert re.search(message, refusals[change])
    before = made["stopped at stage 1" if change == "stage" else "stopped"]
    assert read_metrics(changes[change][1]) == read_metrics(before)
    assert sorted((changes[change][1] / "checkpoints").iterdir())[0].name == "latest"


def test_what_was_allowed_or_put_right_goes_on(tiny_run, refusals, changes, made, other_corpora):
    """Other shards or settings with a word for it, moved shards without one, the checkpoint that was made whole."""
    allow = "checkpoint.allow_changes=true"
    moved = copied(tiny_run, made["stopped"], "moved shards", **STOPPED, **{"data.path": other_corpora[0]})
    restored, folder = changes["damaged"]
    about = "checkpoints/step_00000001/checkpoint.json"
    shutil.copy(made["stopped"] / about, folder / about)
    runs = [([*changes[name][0], allow], changes[name][1]) for name in ("shards", "settings")]
    runs += [(restored, folder), moved]
    run_all(1, runs)
    assert [read_metrics(folder)[-1]["step"] for _, folder in runs] == [2] * len(runs)
    assert_same_metrics(read_metrics(moved[1]), read_metrics(folder))


def test_some_checkpoints_are_kept_for_good(made):
    folder = made["kept"] / "checkpoints"
    kept = sorted(f.name for f in folder.glob("step_*"))
    assert kept == ["step_00000002", "step_00000004", "step_00000005"]
    about = json.loads((folder / kept[0] / "checkpoint.json").read_text())
    assert sum(about["rows"].values()) == 2 * 8 and about["versions"]["torch"]


def test_a_run_folder_of_the_version_before_goes_on_to_the_bit(tiny_run, made):
    """It named diffusion.times what is diffusion.time_sampling, and knew no objectives."""
    settings = STOPPED | {"train.exit_interval": 0}
    arguments, folder = copied(tiny_run, made["stopped, stratified"], "of before", stage=2, **settings, **STRATIFIED)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["diffusion"]["times"] = content["diffusion"].pop("time_sampling")
    for section, key in ((content, "objective"), (content["diffusion"], "shift"), (content["model"], "init")):
        section.pop(key)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    path = folder / "checkpoints/step_00000001/checkpoint.json"
    about = json.loads(path.read_text())
    (history,) = about["guard"]["history"]
    assert set(history) <= {f"masked_ce_to_t{edge}" for edge in (0.25, 0.5, 0.75, 1)}
    about["guard"] = {
        "skipped": 0, "in_a_row": 0, "rollbacks": 0, "left_out": [], "history": [history], "above": 0,
    }  # fmt: skip
    path.write_text(json.dumps(about))
    arguments = [a.replace("diffusion.time_sampling=", "diffusion.times=") for a in arguments]  # as its command had it
    printed = run(1, arguments)
    assert "warning: diffusion.times is now called diffusion.time_sampling" in printed
    assert f"warning: {folder}/config.yaml: diffusion.times is now called" in printed
    assert_same_metrics(read_metrics(made["whole, stratified"]), read_metrics(folder))


DAMAGES = ("flipped byte", "missing file", "no checkpoint.json")


@pytest.fixture(scope="module")
def after_damage(tiny_run, made) -> tuple[str, dict[str, Path]]:
    """What was printed, and the folders of runs whose newest checkpoint, of step 3, was damaged before they went on."""
    runs = {}
    for damage in DAMAGES:
        arguments, folder = copied(tiny_run, made["broken"], damage.replace(" ", "_"), **EVERY_STEP)
        newest = folder / "checkpoints" / "step_00000003"
        about = json.loads((newest / "checkpoint.json").read_text())
        victim = newest / next(file for file in about["files"] if "optim" in file)
        if damage == "flipped byte":
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        else:
            (victim if damage == "missing file" else newest / "checkpoint.json").unlink()
        runs[damage] = arguments, folder
    return run_all(1, list(runs.values())), {damage: folder for damage, (_, folder) in runs.items()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_named(after_damage, made, damage):
    printed, folders = after_damage
    assert re.search(f"step_00000003 is skipped: {folders[damage]}/", printed)
    assert f"{folders[damage]}: resuming from step 2" in printed
    assert_same_metrics(read_metrics(made["whole"]), read_metrics(folders[damage]))


@contextlib.contextmanager
def small_disk(folder: Path, broken: Path, room: float):
    """`folder`/checkpoints is a file system of the size of `room` checkpoints."""
    (folder / "checkpoints").mkdir(parents=True)
    size = sum(f.stat().st_size for f in (broken / "checkpoints" / "step_00000003").rglob("*"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(size * room)}", "tmpfs", str(folder / "checkpoints")],
        check=True,
        timeout=60,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder / "checkpoints")], check=True, timeout=60)


only_root_mounts = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can mount the small file system that gets full"
)


@only_root_mounts
def test_without_room_for_another_checkpoint_training_goes_on(tiny_run, made):
    """On a file system that has room for one, or for none."""
    settings = {"train.steps": 3, "checkpoint.every": 1, "checkpoint.keep": 3}
    none, one = (tiny_run(f"disk{room}", **settings) for room in (0, 1))
    with small_disk(none[1], made["broken"], 0.6), small_disk(one[1], made["broken"], 1.6):
        printed = run_all(1, [none, one])
        for room, (_, folder) in enumerate((none, one)):
            for step in range(1, 4):
                said = f"warning: step {step} is not saved: {folder}/checkpoints lacks" in printed
                assert said == (step > room), (room, step)
            assert read_metrics(folder)[-1]["step"] == 3
            assert [f.name for f in (folder / "checkpoints").glob("step_*")] == ["step_00000001"][:room]


@only_root_mounts
def test_a_disk_that_gets_full_while_a_checkpoint_is_written_ends_the_run_in_one_line(tiny_run, made):
    arguments, folder = tiny_run("filled", **EVERY_STEP)
    with small_disk(folder, made["broken"], 3.5):
        printed = run_all(1, [(arguments, folder)], expected=2, patched="fill")
        assert "error: rank 0 could not write step 2 to" in printed and "Traceback" not in printed
        (folder / "checkpoints" / "filler").unlink()
        assert "resuming from step 1" in run(1, arguments)
        assert_same_metrics(read_metrics(made["whole"]), read_metrics(folder))


def test_killed_at_any_moment_it_ends_the_same(tiny_run, tmp_path):
    """kill -9 of one rank, or of both, at ten moments, some of them while a checkpoint is written."""
    settings = {"train.steps": 24, "checkpoint.every": 1}
    whole_arguments, whole = tiny_run("kill_whole", **settings)
    run(2, whole_arguments)
    arguments, folder = tiny_run("kill", **settings)
    rng = random.Random(0)
    for number, target in enumerate(range(1, 21, 2)):
        started = start(2, arguments, tmp_path)
        try:
            wait_for(
                lambda target=target: any(m["step"] >= target for m in read_metrics(folder)[-1:]),
                START_SECONDS, f"at step {target}", started,
            )  # fmt: skip
            if number % 2:  # in a step, or whatever comes
                time.sleep(rng.random() * 0.3)
            else:  # while it saves
                wait_for(lambda: list(folder.glob("checkpoints/*.tmp")), 60, "saving", started)
            kill([rng.choice(started)])
            if rng.random() < 0.5:
                time.sleep(0.3)  # the other one notices, or is in the middle of its part
        finally:  # as a launcher does when one is gone
            kill(started)
    run(2, arguments)
    assert_same_metrics(read_metrics(whole), read_metrics(folder))
