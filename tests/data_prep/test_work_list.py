"""The units of work: how files are cut, and that a list of them is made once and belongs to one configuration."""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import config, digest, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data_prep import job, shards, work_list
from data_prep.config import SourceConfig
from data_prep.estimate import estimate
from data_prep.inputs.listing import InputFile, Listing
from data_prep.prepare import prepare


def units_of(*paths: object, unit_bytes: int = 1 << 20) -> list[work_list.Unit]:
    return work_list.units(SourceConfig("s", [str(path) for path in paths]), unit_bytes)


def saved_list(folder: Path) -> Path:
    return job.work_list_path(folder / "out")


# How files are cut


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 60))
def test_neighbours_are_joined_while_they_fit(sizes, limit):
    parts = work_list._cut(np.array(sizes, np.int64), limit)
    assert [i for start, end, _ in parts for i in range(start, end)] == list(range(len(sizes)))
    for start, end, size in parts:
        assert size == sum(sizes[start:end]) and (size <= limit or end == start + 1)
    assert all(sum(sizes[start:end]) > limit for (start, _, _), (_, end, _) in pairwise(parts))


def test_a_parquet_file_is_cut_at_its_row_groups(tmp_path):
    """Every row group in one unit, in order, and each unit of about the size asked for."""
    path = tmp_path / "a.parquet"
    texts = [random.Random(i).randbytes(200).hex() for i in range(3000)]
    pa.parquet.write_table(pa.table({"text": texts, "n": range(3000)}), path, row_group_size=50)
    units = units_of(path, unit_bytes=100_000)
    assert [i for unit in units for i in range(unit.start, unit.end)] == list(range(60))
    assert sum(unit.size for unit in units) == pytest.approx(path.stat().st_size, rel=0.1)
    assert all(50_000 < unit.size <= 100_000 for unit in units[:-1])
    (whole,) = units_of(path, unit_bytes=10_000_000)
    assert (whole.start, whole.end, whole.size) == (0, -1, path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-500])  # its reader will say that it is damaged
    assert [(unit.start, unit.end) for unit in units_of(path, unit_bytes=100_000)] == [(0, -1)]


@pytest.mark.parametrize("name", ["a.bin", "a.ds"])
def test_a_token_file_is_cut_between_documents(tmp_path, monkeypatch, name):
    lengths = np.array([random.Random(i).randint(0, 50) for i in range(500)])
    reader = types.ModuleType("data_prep.inputs.tokens")
    reader.documents_in = lambda path: lengths
    reader.token_bytes = lambda path: 2
    monkeypatch.setitem(sys.modules, "data_prep.inputs.tokens", reader)
    monkeypatch.setattr("data_prep.inputs.tokens", reader, raising=False)
    (tmp_path / name).write_bytes(bytes(2 * int(lengths.sum())))
    (tmp_path / "a.idx").touch()
    (tmp_path / "a.ds.index").touch()
    units = units_of(tmp_path / name, unit_bytes=1000)
    assert [i for unit in units for i in range(unit.start, unit.end)] == list(range(500))
    assert all(unit.size == 2 * lengths[unit.start : unit.end].sum() <= 1000 for unit in units)


def test_the_work_list_depends_on_the_files_names_and_sizes_and_not_on_their_folder(tmp_path):
    """The same files elsewhere, named by a URL or absolutely, are the same units."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            write_jsonl(tmp_path / folder / f"{i}.jsonl", ["word"] * 9 * i)
    here = [work_list.unit_key(unit) for unit in units_of(tmp_path / "here", unit_bytes=200)]
    there = [work_list.unit_key(unit) for unit in units_of(f"file://{tmp_path}/there", unit_bytes=200)]
    assert here == there and len(here) > 4
    write_jsonl(tmp_path / "there" / "2.jsonl", ["word"] * 19)
    assert here != [work_list.unit_key(unit) for unit in units_of(tmp_path / "there", unit_bytes=200)]


def test_the_work_list_depends_on_the_size_of_each_file_of_a_unit():
    def corpus_hash(*sizes: int) -> str:
        inputs = tuple(InputFile(f"x/{number}.jsonl", size, "") for number, size in enumerate(sizes))
        unit = work_list.Unit("s", 0, inputs, 0, -1, sum(sizes))
        return work_list.WorkList({}, [work_list.SourceList("s", ["x"], {}, {}, [unit])]).corpus_hash()

    assert corpus_hash(10, 20) == corpus_hash(10, 20) != corpus_hash(20, 10)


@pytest.mark.parametrize("name", ["a.jsonl", "a b.jsonl", "四.jsonl", os.fsdecode(b"\xff.jsonl")])
def test_a_saved_list_is_the_list(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a"}\n' * 100)
    units = units_of(tmp_path / name, unit_bytes=100)
    made = work_list.WorkList({"a": 1}, [work_list.SourceList("s", ["x"], {"b": [1]}, {".md": 2}, units)])
    made.save(tmp_path / "list.json")
    assert work_list.load(tmp_path / "list.json") == made
    for content, message in (
        (b"{", "is no work list"),
        (b"[]", "is no work list"),
        (b'{"format": 1, "version": 2}', "found"),
    ):
        (tmp_path / "list.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            work_list.load(tmp_path / "list.json")


def test_parts_are_joined_and_what_they_have_is_not_listed_again(tmp_path, tokenizer_dir):
    settings = config(tmp_path, tokenizer_dir, [tmp_path / "in"], unit_mb=0.001)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "b.jsonl", ["word"] * 200)
    first = job.load_job(settings, save=False)
    write_jsonl(tmp_path / "in" / "a.jsonl", ["word"] * 300)
    second = job.make_work_list(settings, first.tokenizer, before=first.work)
    assert {file.path for unit in second.units for file in unit.files} == {str(tmp_path / "in" / "a.jsonl")}
    both = work_list.join([first.work, second]).units
    assert [unit.index for unit in both] == list(range(len(both))) and both[: len(first.units)] == first.units
    assert job.make_work_list(settings, first.tokenizer, before=work_list.join([first.work, second])).units == []


def files(*pairs: tuple[str, str]) -> list[InputFile]:
    return [InputFile(path, 1, stamp) for path, stamp in pairs]


def test_of_files_that_look_the_same_as_many_are_new_as_there_are_more():
    """Files with one ETag and one name, such as empty ones in many folders: each counts."""
    listing = Listing([files(("x/a", "1"), ("y/a", "1")), files(("z/a", "1"), ("z/b", "1"))], {})
    for known, left in (
        ("o/a", ["y/a", "z/a", "z/b"]),
        ("z/b", ["x/a", "y/a", "z/a"]),
        ("o/c", ["x/a", "y/a", "z/a", "z/b"]),
    ):
        found = work_list.without(listing, files((known, "1")))
        assert [file.path for group in found.groups for file in group] == left


def test_the_first_change_is_the_one_that_matters_most():
    then = files(("x/a", "1"), ("x/b", "1"), ("x/c", "1"))
    assert work_list.first_change(then, files(("y/a", "1"), ("y/c", "1"), ("y/b", "1"))) is None
    for now, expected in (
        (files(("x/a", "1"), ("x/b", "2"), ("x/d", "1")), ("was written again", "x/b")),
        (files(("x/a", "1"), ("x/b", "1"), ("x/d", "1")), ("was removed", "x/c")),
        (files(("x/a", "1"), ("x/b", "1"), ("x/c", "1"), ("x/d", "1")), ("was added", "x/d")),
    ):
        what, file = work_list.first_change(then, now)
        assert (what, file.path) == expected


# That it is made once


def test_a_list_is_made_once_and_later_tasks_do_not_list(tmp_path, tokenizer_dir, tales, monkeypatch):
    settings = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:50])], unit_mb=0.01)
    made = job.load_job(settings)
    assert saved_list(tmp_path).exists()
    monkeypatch.setattr(job, "list_files", lambda source: pytest.fail("listed again"))
    again = job.load_job(settings)
    assert again.units == made.units and again.corpus_hash == made.corpus_hash


def load(settings, start, results) -> None:
    real = job.make_work_list

    def counted(*arguments):
        results.put("made")
        time.sleep(0.3)
        return real(*arguments)

    job.make_work_list = counted
    start.wait()
    results.put([asdict(unit) for unit in job.load_job(settings).units])


@pytest.mark.slow
def test_64_tasks_that_start_together_make_one_list(tmp_path, tokenizer_dir, tales):
    settings = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:50])], unit_mb=0.01)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    tasks = [context.Process(target=load, args=(settings, start, results)) for _ in range(64)]
    for task in tasks:
        task.start()
    start.set()
    found = [results.get(timeout=120) for _ in range(65)]
    for task in tasks:
        task.join(60)
    assert found.count("made") == 1
    lists = [units for units in found if units != "made"]
    assert len(lists) == 64 and all(units == lists[0] for units in lists)


def test_threads_that_start_together_make_one_list_and_say_that_they_wait(
    tmp_path, tokenizer_dir, tales, monkeypatch, caplog
):
    settings = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:50])])
    made = []
    real = job.make_work_list

    def slowly(*arguments):
        made.append(1)
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(job, "make_work_list", slowly)
    caplog.set_level("INFO")
    with ThreadPoolExecutor(4) as pool:
        hashes = {found.corpus_hash for found in pool.map(lambda _: job.load_job(settings), range(4))}
    assert len(made) == 1 and len(hashes) == 1
    assert "another task lists the files; waiting for its list" in caplog.messages


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 32}, {"packing": "best_fit"}, {"add_bos": True}, {"add_eos": False}, {"separator": "<bos>"},
     {"special_tokens_in_text": "special"}, {"max_document_mb": 1}, {"validation_fraction": 0.5},
     {"deduplicate": "exact"}, {"unit_mb": 1}, {"shard_mb": 5}],
)  # fmt: skip
def test_an_unfinished_corpus_names_the_setting_that_is_another(tmp_path, tokenizer_dir, tales, change):
    paths = [write_jsonl(tmp_path / "a.jsonl", tales[:50])]
    job.load_job(config(tmp_path, tokenizer_dir, paths))
    with pytest.raises(
        UserError, match=rf"unfinished corpus made from other settings or files \({next(iter(change))} was"
    ):
        job.load_job(config(tmp_path, tokenizer_dir, paths, **change))


@pytest.mark.parametrize(
    "change",
    [{"text_field": "body"}, {"min_characters": 2}, {"filters": {"a": ["b"]}}, {"tokens_field": "ids"},
     {"boundaries": "eos"}, {"max_tokens": 5}],
)  # fmt: skip
def test_settings_of_a_source_that_decide_its_documents_belong_to_the_recipe(tmp_path, tokenizer_dir, tales, change):
    settings = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:50])])
    before = job.load_job(settings).corpus_hash
    setattr(settings.sources[0], *next(iter(change.items())))
    with pytest.raises(UserError, match=rf"other settings or files \(s: {next(iter(change))} was"):
        job.load_job(settings)
    assert job.load_job(settings, save=False).corpus_hash != before
    settings.sources[0].name = "t"
    with pytest.raises(UserError, match=r"\(source t is new\)"):
        job.load_job(settings)


def test_an_unfinished_corpus_goes_on_with_the_same_files_in_another_folder_and_no_others(
    tmp_path, tokenizer_dir, tales
):
    (tmp_path / "one").mkdir()
    write_jsonl(tmp_path / "one" / "a.jsonl", tales[:50])
    before = job.load_job(config(tmp_path, tokenizer_dir, [tmp_path / "one"]))
    shutil.move(tmp_path / "one", tmp_path / "two")
    moved = job.load_job(config(tmp_path, tokenizer_dir, [tmp_path / "two"]))
    assert moved.corpus_hash == before.corpus_hash and moved.units[0].files[0].path == str(tmp_path / "two" / "a.jsonl")
    write_jsonl(tmp_path / "two" / "b.jsonl", tales[:5])
    other = config(tmp_path, tokenizer_dir, [tmp_path / "two" / "*.jsonl"])
    with pytest.raises(UserError, match=r"other settings or files \(paths name other files\)"):
        job.load_job(other)


def test_an_unfinished_corpus_of_an_earlier_version_is_refused(tmp_path, tokenizer_dir, tales):
    settings = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:50])])
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "recipe").write_text("0")
    with pytest.raises(UserError, match="an unfinished corpus made by an earlier version"):
        job.load_job(settings)


def test_a_whole_number_has_one_hash(tmp_path, tokenizer_dir, tales):
    paths = [write_jsonl(tmp_path / "a.jsonl", tales[:50])]
    jobs = [
        job.load_job(config(tmp_path, tokenizer_dir, paths, unit_mb=unit_mb, validation_fraction=fraction), save=False)
        for unit_mb, fraction in ((0, 0), (0.0, 0.0))
    ]
    assert jobs[0].corpus_hash == jobs[1].corpus_hash


# Of a corpus that is finished


@pytest.fixture
def finished(tmp_path, tokenizer_dir, tales):
    """The settings of a corpus of a folder with two files."""
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", tales[:50])
    write_jsonl(tmp_path / "in" / "b.jsonl", tales[50:99])
    (tmp_path / "in" / "README.md").write_text("x")
    settings = config(tmp_path, tokenizer_dir, [tmp_path / "in"], num_workers=1)
    prepare(settings, progress=False)
    return settings


def test_a_finished_corpus_keeps_its_list_and_what_was_left_out(finished, tmp_path):
    manifest = shards.Manifest.load(tmp_path / "out")
    assert manifest.sources[0].ignored == {".md": 1}
    assert [asdict(part) for part in manifest.parts] == [
        {"corpus_hash": manifest.corpus_hash, "inputs": "inputs/000.json", "units": {"s": 1}, "cut": {}}
    ]
    before = digest(tmp_path / "out")
    assert prepare(finished, progress=False).corpus_hash == manifest.corpus_hash
    assert digest(tmp_path / "out") == before
    finished.sources[0].weight, finished.sources[0].max_epochs = 3.0, 2.0
    for manifest in (prepare(finished, progress=False), shards.Manifest.load(tmp_path / "out")):
        assert (manifest.sources[0].weight, manifest.sources[0].max_epochs) == (3.0, 2.0)


def test_a_finished_corpus_names_the_file_that_is_another(finished, tmp_path, tales):
    b = tmp_path / "in" / "b.jsonl"
    content, times = b.read_bytes(), b.stat()
    b.write_bytes(content.replace(b"a", b"e"))  # of the same size
    with pytest.raises(UserError, match=r"b.jsonl was written again\); choose another"):
        prepare(finished, progress=False)
    b.unlink()
    with pytest.raises(UserError, match=r"b.jsonl was removed\)"):
        prepare(finished, progress=False)
    b.write_bytes(content)
    os.utime(b, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(finished, progress=False)
    write_jsonl(tmp_path / "in" / "c.jsonl", tales[:5])
    with pytest.raises(UserError, match=r"c.jsonl was added; .*use `python -m data_prep append CONFIG`\)"):
        prepare(finished, progress=False)
    assert job.change(job.load_job(finished), adding=True) is None
    (tmp_path / "in" / "c.jsonl").unlink()
    finished.sources.append(SourceConfig("new", [str(b)]))
    assert job.change(job.load_job(finished), adding=True) is None
    with pytest.raises(UserError, match=r"source new is new; .*append CONFIG`\)"):
        prepare(finished, progress=False)
    del finished.sources[1]
    finished.add_bos = True
    assert job.change(job.load_job(finished), adding=True) == "add_bos was False and is True"
    with pytest.raises(UserError, match=r"\(add_bos was False and is True\)"):
        prepare(finished, progress=False)


def test_a_corpus_of_more_sources_is_another_one(finished, tmp_path, tales):
    one = list(finished.sources)
    finished.sources.append(SourceConfig("t", [str(write_jsonl(tmp_path / "t.jsonl", tales[:40]))]))
    finished.output_dir = str(tmp_path / "two")
    prepare(finished, progress=False)
    before = digest(tmp_path / "two")
    finished.sources = one
    with pytest.raises(UserError, match=r"\(source t is not there any more\)"):
        prepare(finished, progress=False)
    assert digest(tmp_path / "two") == before


def test_a_corpus_of_an_earlier_version_is_finished_where_its_manifest_agrees(finished, tmp_path, caplog):
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    del content["parts"]
    path.write_text(json.dumps({**content, "version": 1, "recipe": "of that version"}))
    shutil.rmtree(tmp_path / "out" / "inputs")
    assert prepare(finished, progress=False).corpus_hash == "of that version"
    assert any("was made by an earlier version" in message for message in caplog.messages)
    assert "2 files" in estimate(finished)
    finished.packing = "best_fit"
    with pytest.raises(UserError, match="packing was 'concat' and is 'best_fit'"):
        prepare(finished, progress=False)


def test_a_dry_run_says_what_is_left_out_and_what_is_enough(tmp_path, tokenizer_dir, tales):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", tales[:50])
    (tmp_path / "in" / "B.CSV").write_text("x")
    settings = config(tmp_path, tokenizer_dir, [tmp_path / "in"])
    settings.sources[0].max_tokens = 1000
    page = estimate(settings)
    assert "left out, as no documents: 1 .csv" in page and "; max_tokens 1,000" in page
    assert "about 0.0M tokens = 16 rows" in page  # of 64 tokens
    assert not (tmp_path / "out").exists()
