"""kill -9 of the parent, of a worker or of both, in the middle of long units: relaunched, the bytes are equal."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT, config, digest, wait_for, write_jsonl

from common.config import save_config
from common.errors import UserError
from data_prep import locks, merging, shards, verify, worker
from data_prep.job import load_job
from data_prep.prepare import merge, prepare


def settings_of(folder: Path, tokenizer: Path, path: Path, **settings):
    made = config(folder, tokenizer, [path], **{"num_workers": 2, "engine": "tokenizers", **settings})
    folder.mkdir(parents=True, exist_ok=True)
    save_config(made, folder / "config.yaml")
    return made


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_prep", "prepare", str(folder / "config.yaml"), *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def processes(session: int) -> dict[int, int]:
    """{pid: parent} of what runs in a session."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found[int(folder.name)] = int(parent)
    return found


def workers(session: int) -> list[int]:
    """The processes that the fork server started."""
    found = processes(session)
    return sorted(pid for pid, parent in found.items() if found.get(parent) == session and parent != session) or sorted(
        pid for pid, parent in found.items() if parent in found and parent != session
    )


@pytest.fixture(scope="module")
def long_units(tmp_path_factory, tokenizer_dir, tales):
    """Three units of some seconds each, and the bytes of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("kills")
    path = write_jsonl(folder / "a.jsonl", tales * 8)
    settings = {"unit_mb": path.stat().st_size / 3 / 2**20 + 0.001, "validation_fraction": 0.1}
    prepare(settings_of(folder / "whole", tokenizer_dir, path, **settings), progress=False)
    return path, settings, digest(folder / "whole" / "out")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("moment", range(10))
def test_killed_in_the_middle_of_long_units_and_relaunched_at_once(tmp_path, tokenizer_dir, long_units, moment):
    path, settings, expected = long_units
    out = Path(settings_of(tmp_path, tokenizer_dir, path, **settings).output_dir)
    whom = ("parent", "worker", "both")[moment % 3]
    with start(tmp_path) as process:
        try:
            wait_for(lambda: list(out.glob("s/*.tmp")), 120, "a shard that is being written")
            time.sleep(random.Random(moment).random())
            victims = [process.pid] if whom != "worker" else []
            if whom != "parent":
                victims.append(random.Random(moment).choice(workers(process.pid)))
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            if whom == "worker":
                printed, _ = process.communicate(timeout=60)
                assert process.returncode == 2 and "a worker process was killed" in printed
            with start(tmp_path) as again:
                printed, _ = again.communicate(timeout=120)
            assert again.returncode == 0, printed
            wait_for(lambda: not processes(process.pid), 30, "the end of workers without a parent")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert digest(out) == expected
    assert verify.check(out, contents=True) == []


# What holds without kills


@pytest.fixture
def units(tmp_path, tokenizer_dir, tales):
    """`units(folder)`: the settings of some twenty small units."""
    path = write_jsonl(tmp_path / "a.jsonl", tales[:200])
    return lambda folder: settings_of(folder, tokenizer_dir, path, unit_mb=0.01, num_workers=1)


def test_launches_with_other_numbers_of_tasks_make_every_unit_once(tmp_path, units, monkeypatch):
    """Five tasks of two launches together: two of two, three of three."""
    prepare(units(tmp_path / "whole"), progress=False)
    made: Counter = Counter()
    real = worker._make_shards

    def counted(unit, *arguments):
        made[unit.index] += 1
        time.sleep(0.01)
        return real(unit, *arguments)

    monkeypatch.setattr(worker, "_make_shards", counted)
    settings = units(tmp_path / "tasks")
    with ThreadPoolExecutor(5) as pool:
        tasks = [(task, number) for number in (2, 3) for task in range(number)]
        list(pool.map(lambda t: prepare(settings, progress=False, task=t[0], num_tasks=t[1]), tasks))
    assert set(made.values()) == {1} and len(made) == len(load_job(settings).units) > 10
    merge(settings, progress=False)
    assert digest(tmp_path / "tasks" / "out") == digest(tmp_path / "whole" / "out")


def test_a_unit_that_another_process_makes_is_waited_for_and_taken_as_it_is(tmp_path, units):
    settings = units(tmp_path)
    job = load_job(settings)
    unit = job.units[0]
    arguments = (unit, settings, job.tokenizer, "tokenizers", True)
    with ThreadPoolExecutor(1) as pool:
        with locks.unit_lock(job.directory, unit):
            later = pool.submit(worker.process_unit, *arguments)
            time.sleep(0.2)
            assert not later.done() and not (job.directory / "s").exists()
            worker.record_path(job.directory, unit).write_text('{"cut": false, "tokens": 7, "engine": "tokenizers 0"}')
        assert later.result(60)["tokens"] == 7 and not (job.directory / "s").exists()


def test_what_a_killed_process_left_of_a_unit_is_removed_before_it_is_made_again(tmp_path, units):
    settings = units(tmp_path)
    job = load_job(settings)
    folder = job.directory / "s"
    folder.mkdir()
    left = [folder / name for name in ("train-00000-000.arrow.host-1.tmp", "train-00000-007.arrow")]
    other = folder / "train-00001-000.arrow.host-1.tmp"
    for path in [*left, other]:
        path.touch()
    with locks.unit_lock(job.directory, job.units[0]):
        pass
    worker.process_unit(job.units[0], settings, job.tokenizer, "tokenizers", True)
    assert not any(path.exists() for path in left) and other.exists()
    halves = [job.directory / name for name in ("manifest.json.host-1.tmp", "inputs/000.json.host-1.tmp")]
    (job.directory / "inputs").mkdir()
    for half in halves:
        half.touch()
    prepare(settings, progress=False)
    assert not any(half.exists() for half in halves)
    named = [shard.file for source in shards.Manifest.load(job.directory).sources
             for shard in source.train + source.validation]  # fmt: skip
    assert sorted(f"s/{path.name}" for path in folder.iterdir()) == sorted(named)


@pytest.mark.parametrize("moment", ["_remove_other_shards", "work_list_path", "warn_without_validation"])
def test_a_merge_that_was_killed_is_done_again_and_leaves_nothing_behind(tmp_path, units, monkeypatch, moment):
    """Before the manifest is written, after it, and when only the folder .work is left."""
    prepare(units(tmp_path / "whole"), progress=False)
    settings = units(tmp_path / "killed")

    def killed(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(merging, moment, killed)
        patched.setattr(locks, "_remove_unused", lambda directory: None)  # a killed process does not clean up
        with pytest.raises(RuntimeError, match="killed"):
            prepare(settings, progress=False)
    out = tmp_path / "killed" / "out"
    assert (out / ".work").exists() and (out / "manifest.json").exists() == (moment != "_remove_other_shards")
    prepare(settings, progress=False)
    assert digest(out) == digest(tmp_path / "whole" / "out") and not (out / ".work").exists()


def test_a_folder_that_another_process_works_in_is_left_alone(tmp_path, units):
    settings = units(tmp_path)
    out = tmp_path / "out"
    with locks.lock(out, 0, 1):
        for make in (lambda: prepare(settings, progress=False), lambda: merge(settings, progress=False)):
            with pytest.raises(UserError, match="another process is preparing"):
                make()
    prepare(settings, progress=False)
    with locks.lock(out, 0, 1):
        assert prepare(settings, progress=False)
        assert (out / ".work" / "lock").exists()
    assert not (out / ".work").exists()


def test_a_task_does_not_run_twice_at_a_time_and_others_run_beside_it(tmp_path, units):
    settings = units(tmp_path)
    with locks.lock(tmp_path / "out", 1, 3):
        for task, num_tasks in ((1, 3), (0, 1)):
            with pytest.raises(locks.Locked, match="another process is preparing"):
                prepare(settings, progress=False, task=task, num_tasks=num_tasks)
        assert not list(tmp_path.glob("out/.work/s-*.json"))
        prepare(settings, progress=False, task=0, num_tasks=3)
    made = [unit.index for unit in load_job(settings).units if worker.is_made(tmp_path / "out", unit)]
    assert made and all(index % 3 == 0 for index in made)


def test_every_file_is_on_disk_before_it_gets_its_name(tmp_path, units, monkeypatch):
    """So a power cut leaves no shard, record or manifest of which only the name was written."""
    synced = set()
    renamed = []
    real_fsync, real_replace = os.fsync, os.replace

    def state(status: os.stat_result) -> tuple:
        return status.st_ino, status.st_size, status.st_mtime_ns

    def fsync(file):
        real_fsync(file)
        synced.add(state(os.fstat(file)))

    def replace(source, target):
        assert state(os.stat(source)) in synced, f"{target} was not on disk"
        renamed.append(Path(target).name)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    manifest = prepare(units(tmp_path), progress=False)
    assert manifest
    made = {Path(shard.file).name for shard in manifest.sources[0].train + manifest.sources[0].validation}
    assert made <= set(renamed) and {"manifest.json", "000.json", "work_list.json", "s-00000.json"} <= set(renamed)


def test_a_file_system_without_locks_is_named(tmp_path, units, monkeypatch):
    import errno
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    settings = units(tmp_path)
    load_job(settings)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"has no locks \(flock: No locks available\).*use another output_dir"):
        prepare(settings, progress=False)


@pytest.mark.slow
def test_5000_units_with_256_open_files(tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "a.jsonl", [f"{i} " + "word " * 20 for i in range(5000)])
    each = path.stat().st_size / 5000 / 2**20
    settings_of(tmp_path, tokenizer_dir, path, unit_mb=each, seq_len=8, num_workers=2, validation_fraction=0.0)
    for verb, *more in (("prepare", str(tmp_path / "config.yaml")), ("verify", str(tmp_path / "out"))):
        command = f"ulimit -n 256; exec {sys.executable} -m data_prep {verb} {' '.join(more)}"
        outcome = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    assert len(list((tmp_path / "out" / "s").glob("*.arrow"))) >= 4900
