"""Models on a Hub: pushed whole or not at all, whatever fails on the way, and never with a token in them."""

import errno
import logging
import multiprocessing
import shutil
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import httpx2
import pytest
from helpers import ROOT, error_lines, wait_for
from hub_models import REPO, assert_no_secret, contents, model, on_hub
from hub_server import READER, WRITER, environment
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from common.errors import UserError, without_passwords
from tools import repository
from tools.export import export
from tools.export import main as export_main
from tools.hub import main as hub_main
from tools.repository import HubUnreachable, pull, push, revisions

pytestmark = pytest.mark.slow

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
