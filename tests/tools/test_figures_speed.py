"""`python -m tools.figures speed`: what is timed, the paper's points, and what a folder keeps."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import SHARED

from tools.figures import main
from tools.paper_figures.published import DECODING_SPEED
from tools.paper_figures.speed_report import page


@pytest.fixture(scope="module")
def base(base_dir) -> Path:
    return base_dir("llama")


def command(checkpoint, folder, *more: str) -> list[str]:
    settings = ["--lengths", "6", "12", "--steps", "2", "4", "--repeats", "2"]
    return ["speed", str(checkpoint), *settings, "--output", str(folder), *more]


def points_of(folder: Path) -> list[dict]:
    return json.loads((folder / "speed.json").read_text())["points"]


def test_the_papers_points_are_those_of_its_table():
    found = {(t.length, t.attention): (t.diffusion, t.autoregressive) for t in DECODING_SPEED}
    assert found == {
        (512, "flash 2"): (12.5, 9.2),
        (1024, "SDPA"): (13.2, 16.3),
        (1024, "flash 2"): (13.3, 17.5),
        (1024, "vanilla"): (16.2, 17.2),
        (2048, "SDPA"): (28.5, 29.5),
        (2048, "flash 2"): (23.5, 35.7),
        (2048, "vanilla"): (38.1, 32.8),
    }
    lines = page([], {"device": "a GPU", "threads": None, "repeats": 3}).splitlines()
    stated = [line for line in lines if line.count("|") == 5 and line[2].isdigit()]
    assert stated == [f"| {length} | {name} | {a} | {b} |" for (length, name), (a, b) in found.items()]
    notes = SHARED / "design" / "paper.md"
    if notes.exists():
        assert all(line in notes.read_text() for line in stated)


@pytest.mark.slow
def test_every_point_is_timed_and_a_folder_is_continued(tiny_checkpoint, base, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    assert main(command(tiny_checkpoint, folder, "--rules", "entropy", "cache=window,block_length=3")) == 0
    first = points_of(folder)
    assert len(first) == 2 * 2 * 2
    for point in first:
        assert len(point["seconds"]) == 2 and min(point["seconds"]) <= point["median"] <= max(point["seconds"])
        blocks = point["point"]["length"] // 3 if "block" in point["point"]["rule"] else 1
        assert point["nfe"] == max(point["point"]["steps"], blocks)  # one call a step, and one a block at least
    assert main(command(tiny_checkpoint, folder, "--rules", "entropy", "--base", str(base))) == 0
    assert "2 points measured, 4 were there" in capsys.readouterr().out
    assert points_of(folder)[:8] == first
    assert [p["nfe"] for p in points_of(folder)[8:]] == [6, 12]
    monkeypatch.setattr("tools.paper_figures.speed.load", None)
    assert main(command(tiny_checkpoint, folder, "--rules", "entropy")) == 0
    assert (folder / "speed.png").stat().st_size > 10_000
    assert (folder / "speed.md").read_text().count("autoregressive, KV cache") == 2
    capsys.readouterr()
    assert main(command(tiny_checkpoint, folder, "--repeats", "3")) == 2
    assert "has points of repeats 2, and this command asks for 3" in capsys.readouterr().err
    monkeypatch.setattr("tools.paper_figures.speed.device_in_words", lambda: {"device": "another", "threads": 1})
    assert main(command(tiny_checkpoint, folder)) == 2
    assert "which cannot be compared; choose another --output" in capsys.readouterr().err


def test_a_checkpoint_that_has_changed_is_refused(tiny_checkpoint, tmp_path, capsys):
    copy, folder = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, copy)
    small = ["--lengths", "4", "--steps", "2"]
    assert main(command(copy, folder, *small)) == 0
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "diffusion": {"step": 9}}))
    assert main(command(copy, folder, *small)) == 2
    assert "is not what it was when" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps has 0, expected at least 1"),
        (["--lengths", "8", "-2"], "--lengths has -2, expected at least 1"),
        (["--lengths", "256"], "takes 256 tokens, --length 256 and a start token are more"),
        (["--repeats", "0"], "--repeats has 0, expected at least 1"),
        (["--rules", "nonsense"], "--rules nonsense: expected random, "),
        (["--rules", "refresh_every=2"], "refresh_every is for a cache, and cache is None"),
        (["--base", "no/such/model"], "no/such/model cannot be loaded"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(tiny_checkpoint, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr("tools.paper_figures.speed.load", None)
    assert main(command(tiny_checkpoint, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_each_kind_of_model_in_its_place(tiny_checkpoint, base, tmp_path, capsys):
    assert main(command(base, tmp_path / "out")) == 2
    assert "is an autoregressive model (no mask_token_id" in capsys.readouterr().err
    assert main(command(tiny_checkpoint, tmp_path / "out", "--base", str(tiny_checkpoint))) == 2
    assert "--base" in capsys.readouterr().err
