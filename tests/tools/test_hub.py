"""Models on a Hub: pushed whole or not at all, whatever fails on the way, and never with a token in them."""

import errno
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
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import httpx2
import pytest
from helpers import ROOT, digest, error_lines, launch, wait_for
from hub_server import READER, SIGNATURE, WRITER, HubServer, environment
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from common.errors import UserError, without_passwords
from tools import hub_watch, repository
from tools.export import export
from tools.export import main as export_main
from tools.hub import main as hub_main
from tools.hub_watch import due_steps, missing_steps, watch
from tools.repository import HubUnreachable, pull, push, revisions

pytestmark = pytest.mark.slow

REPO = "team/model"
SECRETS = (WRITER, READER, SIGNATURE)

# Runs where this project cannot be imported: each model by its name on the Hub is the one in the folder.
LOADED = """
import sys
for name in ("common", "pretrain", "data_prep", "tools"):
    sys.modules[name] = None
import torch
from transformers import AutoModel, AutoTokenizer
ids = torch.arange(48).reshape(2, 24) + 5
repo_id, *pairs = sys.argv[1:]
for revision, folder in zip(pairs[::2], pairs[1::2]):
    here = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    there = AutoModel.from_pretrained(repo_id, revision=revision, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(here(ids).logits, there(ids).logits), revision
    assert here.config.diffusion == there.config.diffusion
    tokenizer = AutoTokenizer.from_pretrained(repo_id, revision=revision)
    assert tokenizer.mask_token_id == here.config.mask_token_id
"""


def model(folder: Path, step: int, shards: int = 1) -> Path:
    """A folder that looks like an export; the weights are a few bytes that depend on the step."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "diffusion": {"step": step}}))
    (folder / "README.md").write_text(f"---\nlibrary_name: transformers\n---\nAfter {step} steps\n")
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    for name in names if shards > 1 else ["model.safetensors"]:
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 50)
    if shards > 1:
        index = {"weight_map": {f"weight_{n}": name for n, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_hub(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    """All files but the one that a new repository has."""
    return {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}


def assert_no_secret(*texts: str | bytes) -> None:
    for text in texts:
        for secret in SECRETS:
            assert secret.encode() not in (text.encode() if isinstance(text, str) else text)


@pytest.fixture(scope="module")
def trained(tiny_run):
    """A finished run with checkpoints of steps 2, 4, 5, 6."""
    arguments, folder = tiny_run("hub", **{"train.steps": 6, "checkpoint.every": 2, "checkpoint.keep": 9})
    outcome = launch(1, [*arguments, "train.exit_interval=5"])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    outcome = launch(1, [*arguments, "train.exit_interval=0"])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert hub_watch.checkpoint_steps(folder) == [2, 4, 5, 6]
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def delete_after(run: Path, step: int) -> None:
    """As if it had been killed just after that step's checkpoint."""
    for folder in (run / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def test_an_export_is_pushed_and_loads_by_its_name(trained, hub, tmp_path):
    """By the command line, in a private repository; by others without this project, to the bit; no token anywhere."""
    out = tmp_path / "export"
    command = [sys.executable, "-m", "tools.export", str(trained), str(out), "--push_to_hub", REPO, "--private"]
    outcome = subprocess.run(
        command, cwd=ROOT, env=environment(hub, tmp_path / "hf"), text=True, capture_output=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert f"pushed {hub.url}/{REPO}/commit/" in outcome.stdout
    assert on_hub(hub) == contents(out)
    assert hub.repositories[REPO].private
    with pytest.raises(urllib.error.HTTPError, match="401"):  # private: not without a token
        urllib.request.urlopen(f"{hub.url}/{REPO}/resolve/main/config.json")

    older = export(trained, tmp_path / "older", step=2)
    push(older, REPO, revision="trial", private=True)
    assert on_hub(hub, "trial") == contents(older) and on_hub(hub) == contents(out)
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED, REPO, "main", str(out), "trial", str(older)],
        cwd=tmp_path, env=environment(hub, tmp_path / "hf2", READER), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    everything = [*contents(trained).values(), *contents(out).values(), *hub.files(REPO).values()]
    assert_no_secret(outcome.stdout, outcome.stderr, *everything)


def test_export_checks_the_hub_before_its_work(trained, hub, tmp_path, monkeypatch, capfd):
    out = tmp_path / "export"
    arguments = [str(trained), str(out), "--push_to_hub", REPO]

    def refused(*words: str) -> str:
        assert export_main([*words]) == 2
        printed = capfd.readouterr()
        assert len(error_lines(printed.err)) == 1 and "Traceback" not in printed.err
        assert_no_secret(printed.out, printed.err)
        assert not out.exists() and not list(tmp_path.glob("export*"))
        return printed.err

    assert "give --push_to_hub" in refused(str(trained), str(out), "--revision", "trial")
    assert "expected org/name" in refused(str(trained), str(out), "--push_to_hub", "model")
    assert "is not a revision's name" in refused(*arguments, "--revision", "no such")
    assert "may not write to other/model (403)" in refused(str(trained), str(out), "--push_to_hub", "other/model")
    wrong = {"hf_wrong": "(401)", "": "(401)", READER: "may not write"}
    for token, expected in {**wrong, "hf_tab\x0bs": "characters", "hf_ümlaut": "characters"}.items():
        monkeypatch.setenv("HF_TOKEN", token)
        message = refused(*arguments)
        assert expected in message and (not token or token not in message)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub.fail("POST", "/api/repos/create", times=3, how="drop")
    assert "nothing was exported" in refused(*arguments)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert "set HF_HUB_OFFLINE=0" in refused(*arguments)
    assert len(hub.requests) == before


def test_an_export_whose_push_failed_is_pushed_without_exporting_again(trained, hub, tmp_path, capfd):
    out = tmp_path / "export"
    hub.fail("POST", "/commit/", times=3, how=503)
    assert export_main([str(trained), str(out), "--push_to_hub", REPO, "--revision", "r1", "--private"]) == 2
    message = capfd.readouterr().err
    again = message.rpartition("push it with: python -m tools.hub ")[2].split()
    assert again == ["push", str(out), REPO, "--revision", "r1", "--private"], message
    assert hub_main(again) == 0
    assert on_hub(hub, "r1") == contents(out)


CALLS = [
    ("POST", "/api/repos/create"), ("GET", "/auth-check/write"), ("GET", "/api/models/team/model$"),
    ("POST", "/branch/"), ("GET", "/tree/"), ("POST", "/validate-yaml"), ("POST", "/preupload/"),
    ("POST", "/objects/batch"), ("PUT", "/upload/"), ("POST", "/objects/verify"), ("POST", "/commit/"),
]  # fmt: skip


@pytest.mark.parametrize("how", ["drop", "lose", 503])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[1].strip("/$").rpartition("/")[2])
def test_a_push_survives_failures_of_each_call(call, how, hub, tmp_path, capfd):
    """Two of them, which is as often as it tries again here. The commit is made once, though its answer be lost."""
    folder = model(tmp_path / "model", 1, shards=2)
    hub.fail(*call, times=2, how=how)
    url = push(folder, REPO, revision="trial", private=True)
    left = 1 if (call[1], how) == ("/commit/", "lose") else 0  # it is found done, and not made again
    assert hub.faults[0].times == left
    assert on_hub(hub, "trial") == contents(folder) and not on_hub(hub)
    assert len(hub.titles(REPO, "trial")) == 2  # the first is the repository's
    assert url.endswith(hub.repositories[REPO].commits["trial"][-1][0])
    assert_no_secret(*capfd.readouterr())


@pytest.mark.parametrize("call", CALLS[::2], ids=lambda call: call[1].strip("/$").rpartition("/")[2])
def test_a_hub_that_stays_away_is_an_error_of_one_line(call, hub, tmp_path, capfd, caplog):
    """Logged at each try; neither that nor a whole traceback holds a token, or the signature of a URL."""
    caplog.set_level(logging.INFO)
    hub.fail(*call, times=99, how=503)
    with pytest.raises(HubUnreachable, match="503, at each of 3 tries") as caught:
        push(model(tmp_path / "model", 1), REPO, revision="trial", private=True)
    assert "\n" not in str(caught.value)
    ours = [record.getMessage() for record in caplog.records if record.name == "diffullama"]
    assert ours == [f"{REPO}: the Hub answered 503; try {n} of 3 in 0 s" for n in (2, 3)]
    assert_no_secret("".join(traceback.format_exception(caught.value)), caplog.text, *capfd.readouterr())


def test_a_busy_hub_is_asked_again(hub, tmp_path):
    """After another's commit at the same time, and after too many requests; not after it has refused."""
    for how in (409, 429):
        hub.fail("POST", "/commit/", how=how)
    push(model(tmp_path / "model", 1), REPO)
    assert len(hub.titles(REPO, "main")) == 2
    hub.fail("POST", "/commit/", how=400)
    requests = len(hub.requests)
    with pytest.raises(UserError, match=r"refuses this for team/model \(400\)"):
        push(model(tmp_path / "next", 2), REPO)
    assert len([path for _, path in hub.requests[requests:] if "/commit/" in path]) == 1


def test_nobody_listens(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="no connection"):
        push(model(tmp_path / "model", 1), REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "my-hub")
    with pytest.raises(UserError, match="HF_ENDPOINT is not a URL"):
        push(tmp_path / "model", REPO)


@pytest.mark.parametrize("call", [("PUT", "/upload/"), ("POST", "/commit/")], ids=["upload", "commit"])
def test_a_killed_push_leaves_the_revision_as_it_was(call, hub, tmp_path):
    old, new = model(tmp_path / "old", 1), model(tmp_path / "new", 2, shards=3)
    push(old, REPO)
    hub.fail(*call, how="stall")
    process = multiprocessing.get_context("fork").Process(target=push, args=(new, REPO))
    process.start()
    assert hub.stalled.wait(30)
    process.kill()
    process.join(30)
    assert on_hub(hub) == contents(old)
    assert contents(pull(REPO, tmp_path / "pulled")) == hub.files(REPO)
    push(new, REPO)
    assert on_hub(hub) == contents(new)
    assert len(hub.titles(REPO, "main")) == 3


@pytest.mark.parametrize("before,after", [(3, 1), (1, 3), (3, 2), (2, 2)])
def test_no_weights_of_an_earlier_push_remain(before, after, hub, tmp_path):
    """In the one commit that brings the new ones; what others have added to the repository stays."""
    first, added = model(tmp_path / "first", 1, before), {"results.json": b"{}", "gguf/model.gguf": b"1"}
    for name, content in {**added, "model-q4.gguf": b"2", "generation_config.json": b"{}"}.items():
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_bytes(content)
    second = model(tmp_path / "second", 2, after)
    push(first, REPO)
    push(second, REPO)
    assert on_hub(hub) == {**contents(second), **added}
    assert len(hub.titles(REPO, "main")) == 3


def test_a_push_of_what_is_there_makes_no_commit(hub, tmp_path):
    """Nor do the notes of git and huggingface_hub in a folder that was downloaded."""
    folder = model(tmp_path / "model", 1, shards=2)
    url = push(folder, REPO)
    for name in (".git", ".cache"):
        (folder / name).mkdir()
        (folder / name / "notes").write_text("")
    assert push(folder, REPO) == url
    assert len(hub.titles(REPO, "main")) == 2


def test_what_is_no_whole_model_is_not_pushed(hub, tmp_path):
    whole = model(tmp_path / "whole", 1, shards=2)
    for missing, expected in (
        ("model-00002-of-00002.safetensors", "names model-00002"),
        ("model.safetensors.index.json", "holds no weights"),
        ("config.json", "config.json is missing"),
    ):
        broken = Path(shutil.copytree(whole, tmp_path / f"no_{missing}"))
        (broken / missing).unlink()
        with pytest.raises(UserError, match=expected):
            push(broken, REPO)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        push(tmp_path / "nowhere", REPO)
    assert not hub.requests


def test_a_private_push_does_not_go_to_a_public_repository(hub, tmp_path):
    folder = model(tmp_path / "model", 1)
    push(folder, REPO)
    push(model(tmp_path / "next", 2), REPO)  # public, as it is
    with pytest.raises(UserError, match="exists and is public"):
        push(folder, REPO, private=True)
    assert len(hub.titles(REPO, "main")) == 3


def test_pull_is_push_backwards(hub, tmp_path, monkeypatch, capfd):
    folders = {"main": model(tmp_path / "a", 1), "step_2": model(tmp_path / "b", 2, shards=2)}
    for revision, folder in folders.items():
        push(folder, REPO, revision, private=True)
    assert set(revisions(REPO)) == set(folders)
    monkeypatch.setenv("HF_TOKEN", READER)
    (tmp_path / "out_main").mkdir()  # an empty folder is fine
    for revision in folders:
        out = tmp_path / f"out_{revision}"
        assert hub_main(["pull", REPO, str(out), "--revision", revision]) == 0
        assert contents(out) == hub.files(REPO, revision)
        assert not out.with_name(out.name + ".tmp").exists()
    requests = len(hub.requests)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        pull(REPO, tmp_path / "full")
    assert len(hub.requests) == requests and len(list((tmp_path / "full").iterdir())) == 1
    with pytest.raises(UserError, match="no such revision"):
        pull(REPO, tmp_path / "x", "step_3")
    with pytest.raises(UserError, match=r"team/other not found \(404\)"):
        pull("team/other", tmp_path / "x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert hub_main(["pull", REPO, str(tmp_path / "x")]) == 2
    assert "(401)" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_killed_pull_goes_on(hub, tmp_path):
    """What has come is not asked for again; what was there of another revision does not stay."""
    folder = model(tmp_path / "model", 1, shards=3)
    push(folder, REPO)
    out = tmp_path / "out"
    hub.fail("GET", "model-00002-of-00003", how="stall")
    process = multiprocessing.get_context("fork").Process(target=pull, args=(REPO, out))
    process.start()
    assert hub.stalled.wait(30)
    arrived = out.with_name("out.tmp") / "model-00001-of-00003.safetensors"
    wait_for(arrived.exists, 30, "the first shard came")
    process.kill()
    process.join(30)
    assert not out.exists()
    (out.with_name("out.tmp") / "stale.txt").write_text("of another revision")
    assert contents(pull(REPO, out)) == hub.files(REPO)
    assert len([path for method, path in hub.requests if method == "GET" and arrived.name in path]) == 1


@pytest.mark.parametrize("how", ["drop", 503])
def test_a_pull_survives_failures(how, hub, tmp_path):
    push(model(tmp_path / "model", 1, shards=2), REPO)
    calls = [("GET", "/team/model$"), ("GET", "/tree/"), ("HEAD", "/config.json"), ("GET", "/resolve/.*-00001-of")]
    for number, call in enumerate(calls):
        hub.fail(*call, times=1, how=how)
        assert contents(pull(REPO, tmp_path / f"out_{number}")) == hub.files(REPO)
        assert sum(fault.times for fault in hub.faults) == 0, f"{call} was not made"


def test_a_pull_does_not_take_what_another_left_for_what_it_wants(hub, tmp_path):
    """huggingface_hub does, where the Hub does not tell it what the file should be."""
    push(model(tmp_path / "model", 1, shards=2), REPO)
    for number, name in enumerate(("config.json", "model-00001-of-00002.safetensors")):
        out = tmp_path / f"out_{number}"
        (tmp_path / f"out_{number}.tmp").mkdir()
        (tmp_path / f"out_{number}.tmp" / name).write_bytes(b"x" * len(hub.files(REPO)[name]))
        hub.fail("HEAD", name, times=1, how=503)
        assert contents(pull(REPO, out)) == hub.files(REPO)


def test_a_pull_that_finds_nobody_does_not_take_half_for_whole(hub, tmp_path):
    push(model(tmp_path / "model", 1, shards=2), REPO)
    hub.fail("GET", "model-00002", times=99, how="drop")
    hub.fail("HEAD", "model-00002", times=99, how="drop")
    for _ in range(2):
        with pytest.raises(HubUnreachable):
            pull(REPO, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_model_without_all_its_shards_is_not_pulled(hub, tmp_path):
    push(model(tmp_path / "model", 1, shards=2), REPO)
    del hub.files(REPO)["model-00002-of-00002.safetensors"]
    with pytest.raises(UserError, match="names model-00002-of-00002"):
        pull(REPO, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert not [path for _, path in hub.requests if "model-00001" in path and "/resolve/" in path]


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
    monkeypatch.setattr(hub_watch, "DELETION_SECONDS", 0.1)
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


def test_it_waits_as_long_as_the_hub_asks(monkeypatch):
    waited = []
    monkeypatch.setattr(repository.time, "sleep", waited.append)

    class Busy(HfHubHTTPError):
        def __init__(self, seconds: str):
            self.response = httpx2.Response(429, headers={"Retry-After": seconds})

    asked = iter(["20", "never", "9999"])

    def call() -> str:
        for seconds in asked:
            raise Busy(seconds)
        return "done"

    assert repository._attempt(REPO, call) == "done"
    assert waited == [20, 2, 300]


def test_a_full_disk_is_no_failure_of_the_hub():
    def call() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        repository._attempt(REPO, call)


def test_a_password_in_the_endpoint_is_refused_unsaid(monkeypatch):
    monkeypatch.setattr(repository.constants, "ENDPOINT", "http://bob:s3cret@localhost:1")
    with pytest.raises(UserError, match="HF_ENDPOINT holds a user or password") as error:
        repository.check_repo_id(REPO)
    assert "s3cret" not in str(error.value)
    assert without_passwords("no 'http://bob:s3cret@host/x' here") == "no 'http://host/x' here"


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
