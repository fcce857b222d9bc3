"""Of equal documents the first of the work list stays: whatever the units, processes, tasks and interruptions."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, config, digest, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import save_config
from common.errors import UserError
from data_prep import deduplication, retrying
from data_prep.__main__ import main
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.deduplication import deduplicate
from data_prep.inputs.document import Tally
from data_prep.inputs.files import ReadFailed
from data_prep.job import Job, load_job
from data_prep.prepare import merge, prepare

FEW = st.integers(0, 12).map(lambda number: f"text {number}")  # so that most are repeated
SOURCES = st.lists(st.lists(st.lists(FEW, max_size=6), min_size=1, max_size=5), min_size=1, max_size=3)


def make_config(folder: Path, tokenizer_dir: Path, sources: list[list[list[str]]], **more) -> PrepareConfig:
    """A source for each list of lists of documents; each list of documents is a compressed file, so one unit."""
    made = []
    for number, files in enumerate(sources):
        inputs = folder / f"in{number}"
        inputs.mkdir(parents=True, exist_ok=True)
        for i, texts in enumerate(files):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (inputs / f"{i:05d}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        made.append(SourceConfig(f"s{number}", [str(inputs)]))
    return PrepareConfig(
        made, str(tokenizer_dir), seq_len=8, output_dir=str(folder / "out"),
        **{"deduplicate": "exact", "unit_mb": 1e-6, "num_workers": 1, **more},
    )  # fmt: skip


def first_ones(sources: list[list[list[str]]]) -> list[list[str]]:
    """What stays of every unit, by a plain set."""
    seen, found = set(), []
    for texts in (texts for files in sources for texts in files):
        found.append([])
        for text in texts:
            if text not in seen:
                seen.add(text)
                found[-1].append(text)
    return found


def staying(job: Job, sources: list[list[list[str]]]) -> list[list[str]]:
    """What `drop_duplicates` leaves of every unit; it counts the others."""
    found = []
    for unit, texts in zip(job.units, [texts for files in sources for texts in files], strict=True):
        tally = Tally()
        found.append(list(deduplication.drop_duplicates(iter(texts), job.directory, unit, tally)))
        assert tally.filtered.total() == len(texts) - len(found[-1])
    return found


def choose_with_parts(job: Job, parts_at_most: int) -> None:
    """The choice as for so many documents that there are as many parts."""
    total = sum(deduplication._documents(deduplication.hashes_path(job.directory, unit)) for unit in job.units)
    deduplication.choose(job.units, job.directory, 1, False, at_once=max(1, total // parts_at_most))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sources=SOURCES, tasks=st.sampled_from([1, 3]), parts=st.sampled_from([1, 7, 1000]))
def test_what_stays_is_what_a_set_chooses(tmp_path_factory, tokenizer_dir, sources, tasks, parts):
    job = load_job(make_config(tmp_path_factory.mktemp("random"), tokenizer_dir, sources))
    assert len(job.units) == sum(map(len, sources))
    if tasks > 1:
        for task in reversed(range(tasks)):
            deduplicate(job.config, False, task, tasks)
    else:
        deduplication.hash_units(job, job.units, False)
    assert not deduplication.is_done(job.directory)
    choose_with_parts(job, parts)
    assert staying(job, sources) == first_ones(sources)
    deduplicate(job.config, False)  # what is chosen stays
    assert staying(job, sources) == first_ones(sources)
    assert deduplication.is_done(job.directory) and not list(job.directory.rglob("*.hashes"))


@pytest.mark.parametrize("place", ["hashing", "choice", "removal"])
def test_it_goes_on_wherever_it_was_interrupted(tmp_path, tokenizer_dir, monkeypatch, place):
    sources = [[[f"text {(7 * i + 3 * j) % 40}" for j in range(9)] for i in range(12)]] * 2
    made = make_config(tmp_path, tokenizer_dir, sources)
    monkeypatch.setattr(deduplication.choose, "__defaults__", (8,))  # 27 parts
    function = {"hashing": "write_hashes", "choice": "choose_part", "removal": "hashes_path"}[place]
    original, calls = getattr(deduplication, function), []

    def interrupted(*arguments):
        calls.append(arguments)
        if place == "removal" and not deduplication.is_done(Path(made.output_dir)):
            calls.clear()
        if len(calls) > 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(deduplication, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        deduplicate(made, False)
    counted = []
    monkeypatch.setattr(deduplication, function, lambda *arguments: counted.append(1) or original(*arguments))
    deduplicate(made, False)
    if place != "removal":
        assert len(counted) == {"hashing": 24, "choice": 27}[place] - 5  # what was done is not done again
    monkeypatch.setattr(deduplication, function, original)
    assert staying(load_job(made), sources) == first_ones(sources)


def test_a_unit_with_other_documents_than_were_hashed_is_an_error(tmp_path, tokenizer_dir):
    job = load_job(make_config(tmp_path, tokenizer_dir, [[["a", "b", "c"]]]))
    deduplicate(job.config, False)
    for texts in (["a", "b"], ["a", "b", "c", "d"], []):
        with pytest.raises(UserError, match="s0 unit 0 changed since its documents were hashed: it had 3"):
            list(deduplication.drop_duplicates(iter(texts), job.directory, job.units[0], Tally()))


def test_a_file_that_is_edited_while_it_is_hashed_is_named_and_leaves_no_hashes(tmp_path, tokenizer_dir, monkeypatch):
    job = load_job(make_config(tmp_path, tokenizer_dir, [[["a", "b"]]]))
    original = deduplication.documents.of_unit

    def edited(unit, *arguments):
        yield from original(unit, *arguments)
        os.utime(unit.files[0].path, ns=(1, 1))

    monkeypatch.setattr(deduplication.documents, "of_unit", edited)
    with pytest.raises(UserError, match=r"00000\.jsonl\.gz was written again"):
        deduplicate(job.config, False)
    assert not list(job.directory.rglob("*.hashes"))


def test_failed_reads_are_tried_again(tmp_path, tokenizer_dir, monkeypatch):
    sources = [[["a", "b", "a"], ["b", "c"]]]
    job = load_job(make_config(tmp_path, tokenizer_dir, sources, read_retries=2))
    waited, original = [], deduplication.documents.of_unit

    def failing(unit, *arguments):
        yield from list(original(unit, *arguments))[:1]
        if len(waited) < 2:
            raise ReadFailed(unit.files[0].path, OSError("the network is away"))
        yield from list(original(unit, *arguments))[1:]

    monkeypatch.setattr(retrying, "sleep", waited.append)
    monkeypatch.setattr(deduplication.documents, "of_unit", failing)
    deduplicate(job.config, False)
    assert waited == [1, 2] and staying(job, sources) == first_ones(sources)


def test_tasks_hash_and_one_more_command_chooses(tmp_path, tokenizer_dir, tales):
    """By the verbs; the bytes are those of one process."""
    sources = [[tales[i : i + 12] for i in range(0, 40, 10)]] * 2
    sources[1] = [*sources[1], tales[60:64]]
    found = []
    for name in ("whole", "tasks"):
        made = make_config(tmp_path / name, tokenizer_dir, sources)
        path = str(tmp_path / name / "config.yaml")
        save_config(made, path)
        if name == "tasks":
            for task in ("0", "2", "1"):
                assert main(["deduplicate", path, "--task", task, "--num_tasks", "3"]) == 0
                assert not deduplication.is_done(Path(made.output_dir))
            with pytest.raises(UserError, match="run `python -m data_prep deduplicate CONFIG` before the tasks"):
                prepare(made, progress=False, task=0, num_tasks=2)
            assert main(["deduplicate", path]) == 0
            for task in (0, 1):
                prepare(made, progress=False, task=task, num_tasks=2)
        manifest = merge(made) if name == "tasks" else prepare(made, progress=False)
        kept = first_ones(sources)
        assert manifest.sources[0].documents == sum(map(len, kept[:4]))
        assert manifest.sources[1].filtered["duplicate"] == sum(map(len, sources[1])) - sum(map(len, kept[4:]))
        shards = digest(Path(made.output_dir))
        found.append({file: value for file, value in shards.items() if file.endswith(".arrow")})
    assert found[0] == found[1] and found[0]


@pytest.mark.slow
def test_no_file_stays_open_for_each_unit(tmp_path, tokenizer_dir):
    """1,500 units where a process may have 256 files open."""
    sources = [[[f"text {i % 100}", f"own {i}"] for i in range(1500)]]
    made = make_config(tmp_path, tokenizer_dir, sources, num_workers=2)
    save_config(made, tmp_path / "config.yaml")
    program = f'ulimit -n 256; exec "{sys.executable}" -m data_prep deduplicate "{tmp_path}/config.yaml"'
    outcome = subprocess.run(
        ["bash", "-c", program], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    job = load_job(made)
    assert len(job.units) == 1500
    assert int((job.directory / ".work" / "unique").read_text()) == 1400
    parts = [np.load(path) for path in (job.directory / ".work" / "duplicates").glob("*.npy")]
    assert sum(map(len, parts)) == 1400
    for unit, stays in ((job.units[99], 2), (job.units[100], 1), (job.units[1499], 1)):
        texts = sources[0][unit.index]
        assert len(list(deduplication.drop_duplicates(iter(texts), job.directory, unit, Tally()))) == stays


@pytest.mark.slow
def test_of_equal_documents_only_the_first_stays_wherever_they_are(tmp_path, tokenizer_dir, tales):
    """Whatever the number of processes, tasks and units."""
    texts = [*tales[:30], *tales[10:40], tales[5], tales[5]]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    found = {}
    for name, workers, tasks in (("one", 1, 1), ("two", 2, 1), ("tasks", 1, 2)):
        settings = config(
            tmp_path / name, tokenizer_dir, [path], deduplicate="exact", unit_mb=0.005, num_workers=workers
        )  # fmt: skip
        if tasks > 1:
            with pytest.raises(UserError, match="run `python -m data_prep deduplicate CONFIG` before the tasks"):
                prepare(settings, progress=False, task=0, num_tasks=2)
            deduplicate(settings, progress=False)
            for task in range(tasks):
                prepare(settings, progress=False, task=task, num_tasks=tasks)
            manifest = merge(settings)
        else:
            manifest = prepare(settings, progress=False)
        assert manifest.sources[0].documents == 40 and manifest.sources[0].filtered == {"duplicate": 22}
        found[name] = digest(tmp_path / name / "out")
    assert found["one"] == found["two"] == found["tasks"]
    plain = prepare(
        config(tmp_path / "plain", tokenizer_dir, [write_jsonl(tmp_path / "b.jsonl", tales[:40])]), progress=False
    )
    assert plain.sources[0].tokens == manifest.sources[0].tokens
