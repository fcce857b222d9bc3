"""What a run does with inputs that fail, are damaged or change while it reads them: nothing of it is silent."""

import errno
import gzip
import os
import re
from pathlib import Path

import pytest
from helpers import config, digest, write_jsonl

from common.config import save_config
from common.errors import UserError
from data_prep import making, pool, retrying, worker
from data_prep.__main__ import main
from data_prep.config import SourceConfig
from data_prep.inputs import files
from data_prep.inputs.files import ReadFailed
from data_prep.job import load_job
from data_prep.prepare import merge, prepare


def records(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Of every finished unit: what its record says, and when it was written."""
    found = sorted((folder / "out" / ".work").glob("s-*.json"))
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def written_shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "out" / "s").glob("*.arrow*"))}


# Files that cannot be read


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long it would have been waited for."""
    found: list[float] = []
    monkeypatch.setattr(retrying, "sleep", found.append)
    return found


@pytest.fixture
def failing(monkeypatch):
    """`failing(name, times, error)`: files of that name fail in their middle so many times; gives each failure."""
    real = files._Fetched.readinto
    failed: list[str] = []

    def start(name: str, times: int, error: Exception) -> list[str]:
        def readinto(self, buffer) -> int:
            if self._path.endswith(name) and self._file.tell() > 0 and len(failed) < times:
                failed.append(self._path)
                with files._reading(self._path):
                    raise error
            return real(self, buffer)

        monkeypatch.setattr(files, "BUFFER_BYTES", 4096)
        monkeypatch.setattr(files._Fetched, "readinto", readinto)
        return failed

    return start


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "denied"), TimeoutError("slow")]
)
def test_what_fails_for_a_moment_is_read_again_and_gives_the_same_bytes(
    tmp_path, tokenizer_dir, tales, failing, waits, caplog, error
):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", tales[:60]) for name in "ab"]
    settings = {"num_workers": 1, "unit_mb": 0.001, "validation_fraction": 0.1}
    prepare(config(tmp_path / "whole", tokenizer_dir, paths, **settings), progress=False)
    failed = failing("b.jsonl", 3, error)
    source = prepare(config(tmp_path, tokenizer_dir, paths, **settings), progress=False).sources[0]
    assert len(failed) == 3 and waits in ([1, 2, 4], [1, 1, 2], [1, 2, 1], [1, 1, 1])
    assert not source.bad and not source.damaged and source.documents == 120
    assert digest(tmp_path / "out") == digest(tmp_path / "whole" / "out")
    warnings = [message for message in caplog.messages if "cannot read" in message]
    assert len(warnings) == 3 and all("b.jsonl" in message and str(error) in message for message in warnings)


def test_what_goes_on_failing_ends_the_run_with_no_record_and_the_same_command_continues(
    tmp_path, tokenizer_dir, tales, failing, waits, caplog
):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", tales[:60]) for name in "ab"]
    settings = {"num_workers": 1, "unit_mb": paths[0].stat().st_size / 2**20, "read_retries": 3}
    prepare(config(tmp_path / "whole", tokenizer_dir, paths, **settings), progress=False)
    made = config(tmp_path, tokenizer_dir, paths, **settings)
    save_config(made, tmp_path / "config.yaml")
    failed = failing("b.jsonl", 4, OSError(errno.EIO, "Input/output error"))
    assert main(["prepare", str(tmp_path / "config.yaml")]) == 1
    assert len(failed) == 4 and waits == [1, 2, 4]
    last = caplog.messages[-1]
    assert "b.jsonl: [Errno 5] Input/output error" in last and "the same command continues" in last
    kept = written_shards(tmp_path)
    assert list(records(tmp_path)) == ["s-00000.json"] and all("-00000-" in name for name in kept)
    assert main(["prepare", str(tmp_path / "config.yaml")]) == 0
    assert kept.items() <= written_shards(tmp_path).items()
    assert digest(tmp_path / "out") == digest(tmp_path / "whole" / "out")


def test_only_failed_reads_are_tried_again(waits):
    def gone():
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        retrying.with_retries(gone, 3, "reading")
    assert waits == []

    def fails():
        raise ReadFailed("a", "no network")

    with pytest.raises(ReadFailed, match="cannot read a: no network"):
        retrying.with_retries(fails, 4, "reading")
    assert waits == [1, 2, 4, 8]


# Files that change


def test_a_file_that_is_edited_between_two_tasks_is_named_and_no_corpus_mixes_two_versions(
    tmp_path, tokenizer_dir, tales
):
    """Of the same size, and equal in its first and last 64 KiB."""
    path = write_jsonl(tmp_path / "a.jsonl", tales)
    settings = config(tmp_path, tokenizer_dir, [path], unit_mb=0.02, num_workers=1)
    prepare(settings, progress=False, task=0, num_tasks=2)
    content = bytearray(path.read_bytes())
    middle = content.index(b" the ", len(content) // 2)
    content[middle : middle + 5] = b" THE "
    assert len(content) > 3 << 16
    path.write_bytes(content)
    stamp = path.stat()
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"a\.jsonl was written again since the work list was made"):
        prepare(settings, progress=False, task=1, num_tasks=2)
    with pytest.raises(UserError, match="units are not made yet"):
        merge(settings, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_that_is_edited_while_a_unit_reads_it_leaves_no_record_and_no_shard(
    tmp_path, tokenizer_dir, tales, monkeypatch
):
    path = write_jsonl(tmp_path / "a.jsonl", tales[:100])
    settings = config(tmp_path, tokenizer_dir, [path], num_workers=1, unit_mb=1)
    real = worker.batches

    def edited(found):
        for batch in real(found):
            yield batch
            os.utime(path, ns=(1, 1))

    monkeypatch.setattr(worker, "batches", edited)
    with pytest.raises(UserError, match=r"a\.jsonl was written again"):
        prepare(settings, progress=False)
    assert not records(tmp_path) and not written_shards(tmp_path)


# Limits of what is unusable


@pytest.fixture
def damaged(tmp_path, tokenizer_dir, tales):
    """Two files that are whole and two that are cut off, each a unit."""
    for name in "abcd":
        content = gzip.compress(write_jsonl(tmp_path / f"{name}.jsonl", tales[:200]).read_bytes())
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content[: -2000 if name in "bd" else None])
    paths = [tmp_path / f"{name}.jsonl.gz" for name in "abcd"]
    return lambda folder, **settings: config(
        folder, tokenizer_dir, paths, **{"unit_mb": 0.001, "num_workers": 1, **settings}
    )


def test_more_damaged_files_than_allowed_fail_and_raising_the_limit_makes_nothing_again(tmp_path, damaged):
    """A unit with more than allowed fails at once; that two units together have more shows in the end."""
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: .*max_damaged_files") as error:
        prepare(damaged(tmp_path), progress=False)
    assert "\n" not in str(error.value)
    assert "source s: 1 damaged or cut off, more than max_damaged_files=0" in str(error.value)
    first = records(tmp_path)
    assert list(first) == ["s-00000.json"]
    assert all("-00000-" in name for name in written_shards(tmp_path))
    with pytest.raises(UserError, match=r"2 damaged or cut off, more than max_damaged_files=1: .*b\.jsonl\.gz"):
        prepare(damaged(tmp_path, max_damaged_files=1), progress=False)
    second, kept = records(tmp_path), written_shards(tmp_path)
    assert len(second) == 4 and first.items() <= second.items()
    source = prepare(damaged(tmp_path, max_damaged_files=2), progress=False).sources[0]
    assert [re.search(r"([abcd])\.jsonl\.gz: \S", line)[1] for line in source.damaged] == ["b", "d"]
    assert written_shards(tmp_path) == kept
    prepare(damaged(tmp_path / "at_once", max_damaged_files=9), progress=False)
    assert digest(tmp_path / "at_once" / "out") == digest(tmp_path / "out")


def test_a_source_with_too_many_unusable_documents_fails_and_raising_the_limit_makes_nothing_again(
    tmp_path, tokenizer_dir, tales
):
    """The limit is that of a source: all bad documents may be in one unit. Empty texts are filtered out, not bad."""
    path = write_jsonl(tmp_path / "a.jsonl", [*tales[:300], "", ""])
    other = write_jsonl(tmp_path / "b.jsonl", tales[:20])
    path.write_text(path.read_text() + '{"text": 7}\n' * 9)

    def settings(limit: float, **more):
        made = config(tmp_path, tokenizer_dir, [path], unit_mb=0.01, num_workers=1, max_bad_fraction=limit, **more)
        made.sources.append(SourceConfig("other", [str(other)]))
        return made

    with pytest.raises(UserError, match=r"source s: 9 of 309 documents cannot be used .*max_bad_fraction=0\.029"):
        prepare(settings(0.029), progress=False)
    kept = written_shards(tmp_path)
    manifest = prepare(settings(0.0292), progress=False)  # of all documents: 9 of 309, not 9 of 300
    assert written_shards(tmp_path) == kept
    assert manifest.sources[0].bad == {"text is not a string": 9} and not manifest.sources[1].bad
    assert sum(manifest.sources[0].filtered.values()) == 2 and manifest.sources[0].documents == 300


def test_a_source_that_seems_unusable_is_named_once_while_it_is_made(tmp_path, tokenizer_dir, caplog, monkeypatch):
    monkeypatch.setattr(making, "MIN_DOCUMENTS_TO_WARN", 100)
    path = write_jsonl(tmp_path / "a.jsonl", ["word " * 20] * 400)
    path.write_text(path.read_text().replace('"text"', '"texts"', 150))
    settings = config(tmp_path, tokenizer_dir, [path], unit_mb=0.005, num_workers=1, max_bad_fraction=0.1)
    with pytest.raises(UserError, match="150 of 400 documents cannot be used"):
        prepare(settings, progress=False)
    warnings = [message for message in caplog.messages if "the corpus cannot be finished" in message]
    assert len(warnings) == 1 and re.match(r"source s: (\d+) of the first \1 documents cannot be used", warnings[0])
    assert len(records(tmp_path)) == len(load_job(settings).units) > 5


def test_limits_do_not_belong_to_the_recipe(tmp_path, tokenizer_dir, tales):
    path = write_jsonl(tmp_path / "a.jsonl", tales[:50])
    prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)
    before = digest(tmp_path / "out")
    other = config(tmp_path, tokenizer_dir, [path], max_bad_fraction=0.5, max_damaged_files=3, read_retries=0)
    prepare(other, progress=False)
    assert digest(tmp_path / "out") == before


# Processes


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_there_are_no_more_workers_than_cpus_that_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert pool.worker_count(0, 99) == 1
        assert pool.worker_count(3, 99) == 3 and pool.worker_count(3, 2) == 2 and pool.worker_count(0, 0) == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert pool.worker_count(0, 10**6) == len(allowed)
