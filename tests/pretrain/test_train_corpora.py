"""A real run of seconds on two corpora, one of which runs out, also stopped and gone on with."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import assert_same_metrics, config, error_lines, run_all, write_jsonl

from data_prep.prepare import prepare
from pretrain.data import TrainData
from pretrain.runtime.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def made(tiny_run, corpus_dir, tokenizer_dir, tales, tmp_path_factory) -> dict[str, Path]:
    """Folders of the runs, and the second corpus."""
    folder = tmp_path_factory.mktemp("second")
    prepare(config(folder, tokenizer_dir, [write_jsonl(folder / "s.jsonl", tales[100:110])], seq_len=32), False)
    shutil.copytree(folder / "out", folder / "moved")
    paths = {str(corpus_dir): 0.25, str(folder / "out"): 0.75}
    settings = {"data.path": paths, "train.steps": STEPS, "data.max_epochs": {"s": limit_of(folder / "out")}}
    runs = {
        "whole": tiny_run("corpora", **settings),
        "stopped": tiny_run("corpora_stopped", **settings, **{"train.exit_interval": 2}),
    }
    run_all(1, list(runs.values()))
    stopped, where = runs["stopped"]
    shutil.copytree(where, where.with_name("corpora_other"))
    other = [f"run_dir={where.with_name('corpora_other')}", f"data.path={[*paths]}"]
    refused = run_all(1, [([*stopped, *other], where)], expected=2)
    moved = f"data.path={ {str(corpus_dir): 1, str(folder / 'moved'): 3} }"
    run_all(1, [(stopped, where), ([*stopped, moved], where)])
    (where / "refused").write_text(error_lines(refused)[0])
    return {name: found for name, (_, found) in runs.items()} | {"second": folder / "out"}


def limit_of(folder: Path) -> float:
    """Epochs after which a source has given 20 rows: in the middle of the run."""
    return 20 / sum(map(len, TrainData(str(folder), 0).train)) + 1e-9


def test_a_run_on_two_corpora_is_the_same_when_it_was_stopped(made):
    """Twice, and the second time the corpora had other places and equal shares written in another way."""
    whole, stopped = (read_metrics(made[name]) for name in ("whole", "stopped"))
    assert [line["step"] for line in whole] == list(range(STEPS + 1))
    assert_same_metrics(whole, stopped)
    assert whole[-1]["val_nelbo"] < whole[0]["val_nelbo"]


def test_a_source_that_has_run_out_left_its_share_to_the_others(made):
    for name in ("whole", "stopped"):
        about = json.loads((made[name] / f"checkpoints/step_{STEPS:08}/checkpoint.json").read_text())
        assert about["rows"]["s"] == 20 and sum(about["rows"].values()) == STEPS * 8


def test_other_shares_are_other_data(made):
    line = (made["stopped"] / "refused").read_text()
    assert "was trained on other shards than" in line and f", {made['second']} has now (at the time: " in line
    assert f"(0.25), {made['second']} (0.75)); take those" in line
