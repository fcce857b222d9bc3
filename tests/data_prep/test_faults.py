"""What can go wrong in a long run, done for real: kills, Ctrl-C, a full disk, damaged files, a wrong engine."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpora import varied_documents
from helpers import ROOT, SHARED, config, digest, write_jsonl

from common.config import save_config
from common.errors import UserError
from data_prep import engines, shards, tokenizing, unit_builder, verify
from data_prep.__main__ import main
from data_prep.estimate import estimate
from data_prep.prepare import merge, prepare


@pytest.fixture(scope="module")
def job(tmp_path_factory, tokenizer_dir, tales):
    """`job(out, **settings)`: a configuration of 50 units, its YAML, and the bytes of an undisturbed run."""
    folder = tmp_path_factory.mktemp("faults")
    path = write_jsonl(folder / "a.jsonl", tales[:200] * 3)

    def make(out: Path, **settings):
        made = config(
            out, tokenizer_dir, [path], **{"unit_mb": 0.015, "num_workers": 1, "validation_fraction": 0.1, **settings}
        )
        out.mkdir(parents=True, exist_ok=True)
        save_config(made, out / "config.yaml")
        return made

    whole = make(folder / "whole")
    prepare(whole, progress=False)
    return make, digest(folder / "whole" / "out")


def run(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder), cwd=ROOT, check=False, capture_output=True, text=True, timeout=240)


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "data_prep", "prepare", str(folder / "config.yaml"), *more]


def wait_for_records(process: subprocess.Popen, out: Path, count: int, seconds: float = 120) -> None:
    """Until `count` units are done, or the process has ended. Fails when neither happens in time."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and len(list(out.glob(".work/s-*.json"))) < count:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"{count} units were not done within {seconds} s")
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(job, tmp_path, workers):
    """kill -9 of the whole process group, five times, each time when a few more units are done."""
    make, expected = job
    out = Path(make(tmp_path, num_workers=workers).output_dir)
    rng = random.Random(workers)
    kills = 0
    for _ in range(5):
        target = len(list(out.glob(".work/s-*.json"))) + rng.randint(1, 4)
        with subprocess.Popen(
            command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            wait_for_records(process, out, target)
            time.sleep(rng.random() * 0.01)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
        kept = {path: path.stat().st_mtime_ns for path in out.glob(".work/s-*.json")}
    assert kills >= 3
    outcome = run(tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert digest(out) == expected
    assert kept  # something had been finished before the last run


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_continues_and_it_does(job, tmp_path):
    make, _ = job
    small = {"unit_mb": 0.003}  # some 300 units, so that it is not done before the signal comes
    prepare(make(tmp_path / "whole", **small), progress=False)
    out = Path(make(tmp_path, **small).output_dir)
    with subprocess.Popen(
        command(tmp_path), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:  # fmt: skip
        wait_for_records(process, out, 1)
        process.send_signal(signal.SIGINT)
        try:
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "error: interrupted; finished work is kept, and the same command continues from there" in error
    assert main(["prepare", str(tmp_path / "config.yaml")]) == 0
    assert digest(out) == digest(tmp_path / "whole" / "out")


def test_any_number_of_tasks_gives_the_same_bytes(job, tmp_path):
    make, expected = job
    settings = make(tmp_path)
    for task in (2, 0, 1):
        assert prepare(settings, progress=False, task=task, num_tasks=3) is None
        if task != 1:
            with pytest.raises(UserError, match=r"of \d+ units are not made yet"):
                merge(settings)
    merge(settings)
    assert digest(tmp_path / "out") == expected
    assert merge(settings).corpus_hash == shards.Manifest.load(tmp_path / "out").corpus_hash
    with pytest.raises(UserError, match="task is 3 of num_tasks 3, expected 0 to 2"):
        prepare(settings, task=3, num_tasks=3)


def test_an_unfinished_corpus_is_not_continued_with_other_settings(job, tmp_path):
    make, _ = job
    prepare(make(tmp_path), progress=False, task=0, num_tasks=2)
    with pytest.raises(UserError, match="an unfinished corpus made from other settings or files"):
        prepare(make(tmp_path, add_bos=True), progress=False, task=1, num_tasks=2)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the small file system that gets full")
def test_a_full_disk_is_one_line_of_error_and_the_same_command_continues_later(job, tmp_path):
    make, expected = job
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=False, timeout=30)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        settings = make(tmp_path)
        settings.output_dir = str(disk / "out")
        save_config(settings, tmp_path / "config.yaml")
        outcome = run(tmp_path)
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
        assert outcome.returncode == 1 and len(errors) == 1 and "No space left on device" in errors[0]
        assert "the same command continues" in errors[0]
        assert not list((disk / "out").glob("s/*.tmp")) and not (disk / "out" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True, timeout=30)
        assert run(tmp_path).returncode == 0
        assert digest(disk / "out") == expected
    finally:
        subprocess.run(["umount", str(disk)], check=False, timeout=30)


def test_a_truncated_archive_is_named_and_fails_the_run_unless_max_damaged_files_allows_it(
    tmp_path, tokenizer_dir, tales
):
    import gzip

    good = write_jsonl(tmp_path / "good.jsonl", tales[:99])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(good.read_bytes())[:-5000])
    settings = config(tmp_path, tokenizer_dir, [good, cut], max_bad_fraction=0)
    with pytest.raises(UserError, match=r"1 damaged or cut off, more than max_damaged_files=0: .*cut.jsonl.gz"):
        prepare(settings, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()
    settings.max_damaged_files = 1
    source = prepare(settings, progress=False).sources[0]
    assert not source.bad and "cut.jsonl.gz" in source.damaged[0]
    assert 99 < source.documents < 198


def test_an_engine_that_gives_wrong_ids_during_the_run_is_replaced_and_its_unit_made_again(
    job, tmp_path, monkeypatch, caplog
):
    make, expected = job

    class Late:
        """Right on the texts that it is checked on before the run, wrong on the documents that come later."""

        name, version = "gigatoken", "0"

        def __init__(self, spec, parallel=True):
            self.reference = tokenizing.Reference(spec)

        def encode(self, texts):
            ids, lengths = self.reference.encode(texts)
            return (ids, lengths) if len(texts) > 200 else (np.where(ids == 70, 71, ids), lengths)

    monkeypatch.setattr(engines, "Gigatoken", Late)
    monkeypatch.setattr(unit_builder, "CHECK_ONE_IN", 1)
    unit_builder.engine_of.cache_clear()
    manifest = prepare(make(tmp_path, engine="auto"), progress=False)
    unit_builder.engine_of.cache_clear()
    assert manifest.tokenizer["engine"] == f"tokenizers {tokenizers.__version__}"
    assert sum(message.startswith("gigatoken is not used any more") for message in caplog.messages) == 1
    found = digest(tmp_path / "out")
    assert {k: v for k, v in found.items() if k != "manifest.json"} == {
        k: v for k, v in expected.items() if k != "manifest.json"
    }


def check_best_fit_fills_rows(folder: Path, tokenizer: Path, path: Path) -> None:
    """No token is dropped, and less than 0.5% of the places are padding."""
    settings = config(
        folder, tokenizer, [path], packing="best_fit", seq_len=2048, num_workers=1, validation_fraction=0.0
    )  # fmt: skip
    source = prepare(settings, progress=False).sources[0]
    in_rows = sum(shard.tokens for shard in source.train + source.validation)
    assert source.dropped_tokens == 0 and source.padding / in_rows < 0.005
    assert not verify.check(folder / "out", contents=True)


def test_best_fit_fills_rows_of_varied_documents(tmp_path, tokenizer_dir):
    texts = list(varied_documents(3_000_000))
    lengths = sorted(map(len, texts))
    assert lengths[len(lengths) // 2] < 400 and lengths[-1] > 50_000  # many short, few long
    check_best_fit_fills_rows(tmp_path, tokenizer_dir, write_jsonl(tmp_path / "a.jsonl", texts))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real corpora are not in ../shared")
@pytest.mark.parametrize("name", ["books", "web_usgov", "python", "tech_peps", "world_factbook"])
def test_best_fit_fills_rows_of_real_corpora(tmp_path, name):
    path = SHARED / "data" / "corpora" / f"{name}.jsonl.gz"
    check_best_fit_fills_rows(tmp_path, SHARED / "data" / "tokenizers" / "gpt2", path)


def test_a_dry_run_writes_nothing_and_estimates_the_tokens(job, tmp_path):
    make, _ = job
    settings = make(tmp_path)
    page = estimate(settings)
    assert not (tmp_path / "out").exists()
    whole = prepare(settings, progress=False).sources[0].tokens
    estimated = float(page.split("about ")[1].split("M tokens")[0]) * 1e6
    assert estimated == pytest.approx(whole, rel=0.15)
