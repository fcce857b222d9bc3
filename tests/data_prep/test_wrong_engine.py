"""A fast engine that turns out wrong late: the bytes are the reference's, whatever was made before and by whom."""

from itertools import permutations

import pytest
from helpers import config, digest, write_jsonl

from data_prep import making, tokenizing, unit_builder, worker
from data_prep.job import load_job
from data_prep.prepare import merge, prepare


class Wrong:
    """Gives other ids than the reference, which is noticed on the one document that is compared."""

    name, version = "gigatoken", "0"
    batches = 0

    def __init__(self, spec):
        self.reference = tokenizing.Reference(spec)

    def encode(self, texts):
        Wrong.batches += 1
        ids, lengths = self.reference.encode(texts)
        return ids ^ 1, lengths


@pytest.fixture
def job(tmp_path, tokenizer_dir, tales, monkeypatch):
    """`job(name, **settings)`: the settings of a dozen units, of which one has the document whose ids are compared."""
    path = write_jsonl(tmp_path / "a.jsonl", tales[:150])
    real = unit_builder.engine_of
    monkeypatch.setattr(worker, "engine_of", lambda name, spec, *more: Wrong(spec) if name == Wrong.name else
                        real(name, spec, *more))  # fmt: skip
    monkeypatch.setattr(making, "select_engine", lambda job: (
        (Wrong(job.tokenizer), "the ids agree so far") if job.config.engine == "auto" else
        (tokenizing.Reference(job.tokenizer), "asked for")))  # fmt: skip

    def make(name, compared=tales[100], **settings):
        monkeypatch.setattr(unit_builder, "CHECK_ONE_IN", unit_builder.hash_of(compared))  # divides no other hash
        return config(
            tmp_path / name, tokenizer_dir, [path], unit_mb=0.015, num_workers=1, validation_fraction=0.1, **settings
        )

    return make


@pytest.fixture
def expected(job, tmp_path):
    prepare(job("reference", engine="tokenizers"), progress=False)
    return digest(tmp_path / "reference" / "out")


def test_an_engine_that_is_never_found_wrong_gives_wrong_bytes(job, expected, tmp_path):
    """So the other tests here mean something."""
    prepare(job("wrong", compared="no document"), progress=False)
    assert digest(tmp_path / "wrong" / "out").keys() == expected.keys()
    assert digest(tmp_path / "wrong" / "out") != expected


@pytest.mark.parametrize("compared", [0, 100, 149])
def test_one_process_makes_everything_again(job, expected, tmp_path, tales, caplog, compared):
    prepare(job("auto", compared=tales[compared]), progress=False)
    assert digest(tmp_path / "auto" / "out") == expected
    warnings = [message for message in caplog.messages if message.startswith("gigatoken is not used any more")]
    assert len(warnings) == 1 and repr(tales[compared][:60]) in warnings[0]


@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
def test_tasks_in_any_order_use_the_reference_from_then_on_and_merge_makes_the_rest_again(
    job, expected, tmp_path, order
):
    settings = job("tasks")
    found = False
    for task in order:
        Wrong.batches = 0
        prepare(settings, progress=False, task=task, num_tasks=3)
        assert not (found and Wrong.batches)
        found = worker.reference_only(tmp_path / "tasks" / "out") is not None
    assert found
    Wrong.batches = 0
    merge(settings, progress=False)
    assert not Wrong.batches and digest(tmp_path / "tasks" / "out") == expected


def test_a_merge_that_is_killed_while_it_makes_units_again_is_done_again(job, expected, tmp_path, monkeypatch):
    settings = job("killed")
    for task in (1, 0):  # the document is in a unit of task 0
        prepare(settings, progress=False, task=task, num_tasks=2)
    work = load_job(settings)
    exact = [worker.is_made(work.directory, unit) for unit in work.units]
    assert exact.count(False) >= 3  # those that task 1 made before
    real, left = worker._make_shards, [2]

    def killed(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(worker, "_make_shards", killed)
        with pytest.raises(RuntimeError, match="killed"):
            merge(settings, progress=False)
    assert not (work.directory / "manifest.json").exists()
    merge(settings, progress=False)
    assert digest(work.directory) == expected


def test_long_documents_are_compared_too(job, expected, tmp_path, monkeypatch):
    """Which are tokenized in parts, by themselves."""
    settings = job("long", compared="no document")
    monkeypatch.setattr(unit_builder, "CHECK_ONE_IN", 1)
    monkeypatch.setattr(unit_builder, "LONG_CHARACTERS", 1)
    prepare(settings, progress=False)
    assert digest(tmp_path / "long" / "out") == expected
