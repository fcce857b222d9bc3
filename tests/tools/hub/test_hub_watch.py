"""Pushing beside training: each checkpoint that is due once, whatever is killed, deleted or saved again."""

import fcntl
import json
import logging
import multiprocessing
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, digest, launch, wait_for
from hub_models import REPO, assert_no_secret, contents, delete_after, on_hub
from hub_server import READER, HubServer, environment

from common.errors import UserError
from tools import hub_watch, repository, run_checkpoints
from tools.export import export
from tools.hub_watch import watch
from tools.repository import HubUnreachable, push
from tools.run_checkpoints import due_steps, missing_steps

pytestmark = pytest.mark.slow


def test_due_and_missing_steps():
    assert due_steps([2, 4, 5, 6, 7], 2, finished=False) == [2, 4, 6]
    assert due_steps([2, 4, 5, 6, 7], 2, finished=True) == [2, 4, 6, 7]
    assert due_steps([], 2, finished=True) == []
    assert missing_steps([60, 90], every=20, saved_every=30) == []
    assert missing_steps([150, 180, 185], every=20, saved_every=30) == [60, 120]
    assert missing_steps([60], every=20, saved_every=0) == missing_steps([], 20, 30) == []


def steps_on_hub(hub: HubServer) -> dict[str, int]:
    """The step of the model in each branch that has one, by the branch's name."""
    branches = list(hub.repositories[REPO].commits) if REPO in hub.repositories else []
    configs = {name: json.loads(hub.files(REPO, name).get("config.json", b"{}")) for name in branches}
    return {name: config["diffusion"]["step"] for name, config in configs.items() if config}


def test_a_finished_run_is_pushed_step_by_step(run, hub, tmp_path):
    """What is pushed is what tools.export writes; the run's folder is as it was."""
    before = digest(run)
    watch(run, REPO, every=4, poll=0.01)
    assert steps_on_hub(hub) == {"main": 6, "step_4": 4, "step_6": 6}
    for revision in ("step_4", "step_6"):
        exported = export(run, tmp_path / revision, step=int(revision[5:]))
        assert on_hub(hub, revision) == contents(exported)
    assert on_hub(hub) == on_hub(hub, "step_6")
    assert digest(run) == before
    assert hub.titles(REPO, "main")[1:] == ["Step 6"]
    commits = len([path for _, path in hub.requests if "/commit/" in path])
    watch(run, REPO, every=4, poll=0.01)
    assert len([path for _, path in hub.requests if "/commit/" in path]) == commits


@pytest.mark.parametrize("branch", ["step_2", "step_4", "step_6", "main"])
def test_a_killed_watch_goes_on(branch, run, hub):
    """Killed before any of its commits, also when the branch is there already: nothing is pushed twice or forgotten."""
    (run / "hub" / "step_2").mkdir(parents=True)  # of a process before
    (run / "hub" / "step_2" / "config.json").write_text("{}")
    hub.fail("POST", f"/commit/{branch}$", how="stall")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=watch, args=(run, REPO, 2), kwargs={"poll": 0.01})
    process.start()
    assert hub.stalled.wait(60)
    process.kill()
    process.join(30)
    hub.released.set()
    watch(run, REPO, every=2, once=True)
    assert steps_on_hub(hub) == {"main": 6, "step_2": 2, "step_4": 4, "step_6": 6}
    made = [title for branch in hub.repositories[REPO].commits for title in hub.titles(REPO, branch)]
    assert sorted(made) == ["Step 2", "Step 4", "Step 6", "Step 6"] + ["initial commit"] * 4
    assert not (run / "hub").exists()


def test_a_watch_that_begins_before_the_run(trained, hub, tmp_path):
    """Checkpoints come while it looks, one in pieces under a temporary name; main follows the newest."""
    run = tmp_path / "run"
    done = threading.Event()

    def body() -> None:
        watch(run, REPO, every=2, poll=0.02)
        done.set()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    time.sleep(0.2)
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    lines = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)
    for step in (2, 4, 5, 6):
        name = f"step_{step:08d}"
        shutil.copytree(trained / "checkpoints" / name, run / "checkpoints" / f"{name}.tmp")
        (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        time.sleep(0.1)
        assert f"step_{step}" not in steps_on_hub(hub)
        (run / "checkpoints" / f"{name}.tmp").rename(run / "checkpoints" / name)
        if step % 2 == 0:
            wait_for(lambda step=step: steps_on_hub(hub).get("main") == step, 60, f"main is step {step}")
    assert done.wait(30)
    assert steps_on_hub(hub) == {"main": 6, "step_2": 2, "step_4": 4, "step_6": 6}
    assert hub.titles(REPO, "main")[1:] == ["Step 2", "Step 4", "Step 6"]


def test_main_never_goes_back(run, hub, tmp_path):
    """Neither to a step before it, nor to one that was due later on."""
    newest = Path(shutil.copytree(run, tmp_path / "newest"))
    push(export(newest, tmp_path / "export", step=6), REPO)
    delete_after(run, 4)
    watch(run, REPO, every=4, once=True)
    assert steps_on_hub(hub) == {"main": 6, "step_4": 4}
    watch(run, REPO, every=2, once=True)
    assert steps_on_hub(hub) == {"main": 6, "step_4": 4, "step_2": 2}
    assert len(hub.titles(REPO, "main")) == 2


def test_deleted_checkpoints_are_reported_once(run, hub, caplog, monkeypatch):
    """Those gone before it looked in one line; one that training deletes under its hands does not end it."""
    caplog.set_level(logging.INFO)
    shutil.rmtree(run / "checkpoints" / "step_00000002")

    def deleted_meanwhile(run_dir, out_dir, step, dtype):
        if step == 4:
            shutil.rmtree(run / "checkpoints" / "step_00000004")
            raise FileNotFoundError("gone")
        return export(run_dir, out_dir, step, dtype)

    monkeypatch.setattr(hub_watch, "export", deleted_meanwhile)
    watch(run, REPO, every=2, poll=0.01)
    assert steps_on_hub(hub) == {"main": 6, "step_6": 6}
    lines = [record.getMessage() for record in caplog.records if "no checkpoint any more" in record.getMessage()]
    assert [line.partition(";")[0] for line in lines] == [
        "step 2 is not pushed: no checkpoint any more (1 in all)",
        "step 4 is not pushed: no checkpoint any more (2 in all)",
    ]
    assert "2 due before had been deleted" in caplog.text


def test_a_checkpoint_that_is_damaged_ends_it(run, hub, monkeypatch):
    monkeypatch.setattr(run_checkpoints, "DELETION_SECONDS", 0.1)
    (run / "checkpoints" / "step_00000004" / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        watch(run, REPO, every=4, poll=0.01)


def test_a_watch_waits_for_the_hub_but_not_for_a_permission(run, hub, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    hub.fail("POST", "/commit/step_4", times=7, how=503)  # more than the tries of two looks
    watch(run, REPO, every=4, poll=0.01)
    assert steps_on_hub(hub) == {"main": 6, "step_4": 4, "step_6": 6}
    assert "tried again in 0.01 s" in caplog.text
    hub.fail("POST", "/api/repos/create", times=99, how=503)
    with pytest.raises(HubUnreachable):
        watch(run, REPO, every=4, once=True)
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match="may not write"):
        watch(run, REPO, every=4, poll=0.01)


def test_intervals(run, hub, caplog):
    with pytest.raises(UserError, match="--every is 0"):
        watch(run, REPO, every=0)
    with pytest.raises(UserError, match=r"config\.yaml not found"):
        watch(run / "nothing", REPO, every=1, once=True)
    assert not hub.requests
    watch(run, REPO, every=3, once=True)
    assert "--every 3 is no multiple of checkpoint.every=2: there are pushes every 6 steps" in caplog.text
    assert steps_on_hub(hub) == {"main": 6, "step_6": 6}


def test_an_autoregressive_run_is_not_pushed_twice_either(tiny_run, hub, tmp_path):
    arguments, run = tiny_run("hub_ar", objective="autoregressive", **{"train.steps": 2, "checkpoint.every": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    watch(run, REPO, every=1, poll=0.01)
    requests = len(hub.requests)
    watch(run, REPO, every=1, poll=0.01)
    assert not [path for _, path in hub.requests[requests:] if "/preupload/" in path]
    assert hub.titles(REPO, "main")[1:] == ["Step 2"]
    assert hub.titles(REPO, "step_1")[1:] == ["Step 1"] and hub.titles(REPO, "step_2")[1:] == ["Step 2"]


def test_a_checkpoint_saved_again_is_pushed_again(run, hub):
    """After a roll-back, or in a run begun anew: the step is the same, the checkpoint is not."""
    watch(run, REPO, every=2, once=True)
    about = run / "checkpoints" / "step_00000006" / "checkpoint.json"
    about.write_text(about.read_text() + "\n")
    watch(run, REPO, every=2, once=True)
    assert [len(hub.titles(REPO, name)) for name in ("step_2", "step_4", "step_6")] == [2, 2, 3]
    assert hub.titles(REPO, "main").count("Step 6") == 2
    assert on_hub(hub) == on_hub(hub, "step_6")


def test_one_process_watches_a_run(run, hub):
    (run / "hub").mkdir()
    with open(run / "hub" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process pushes"):
            watch(run, REPO, every=2, once=True)
    assert not any("/commit/" in path for _, path in hub.requests)
    watch(run, REPO, every=2, once=True)
    assert steps_on_hub(hub)["main"] == 6 and not (run / "hub").exists()


@pytest.mark.parametrize("config", ['{"diffusion": null}', "[]", '{"diffusion": {"step": "9"}}', '{"diffusion": [9]}'])
def test_a_strange_config_on_the_hub_counts_as_none(config, run, hub, tmp_path):
    folder = tmp_path / "strange"
    shutil.copytree(export(run, tmp_path / "exported", step=2), folder)
    (folder / "config.json").write_text(config)
    repository.push(folder, REPO)
    watch(run, REPO, every=6, once=True)
    assert steps_on_hub(hub)["main"] == 6


def test_a_private_watch_makes_a_private_repository(run, hub):
    watch(run, REPO, every=6, private=True, once=True)
    assert hub.repositories[REPO].private


def test_sigterm_ends_a_watch(trained, hub, tmp_path):
    """By the command line, with the exit code of an interruption, and nothing left."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    delete_after(run, 4)
    command = [sys.executable, "-m", "tools.hub", "watch", str(run), REPO, "--every", "2", "--poll", "0.05"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(hub, tmp_path / "hf"),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: REPO in hub.repositories and len(hub.titles(REPO, "main")) == 2, 90, "main was pushed")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "error: interrupted" in printed and "Traceback" not in printed
    assert steps_on_hub(hub) == {"main": 4, "step_2": 2, "step_4": 4}
    assert not (run / "hub").exists()
    assert_no_secret(printed)
