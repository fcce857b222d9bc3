"""A source that ends at max_tokens: which documents it has, and that the bytes follow from the settings alone."""

import json
from collections import Counter
from itertools import accumulate, permutations

import numpy as np
import pytest
from helpers import config, digest, write_jsonl

from common.errors import UserError
from data_prep import merging, shards, unit_builder, verify, worker
from data_prep.config import SourceConfig
from data_prep.job import load_job
from data_prep.prepare import merge, prepare
from data_prep.repair import repair

DOCUMENTS = 150


@pytest.fixture
def job(tmp_path, tokenizer_dir, tales):
    """`job(name, max_tokens, **settings)`: some fifteen units of a source with a limit, and a source without."""
    path = write_jsonl(tmp_path / "a.jsonl", tales[:DOCUMENTS])
    other = write_jsonl(tmp_path / "b.jsonl", tales[:20])

    def make(name, max_tokens, **settings):
        made = config(tmp_path / name, tokenizer_dir, [path], **{
            "unit_mb": 0.012, "num_workers": 1, "validation_fraction": 0.1, "engine": "tokenizers", **settings
        })  # fmt: skip
        made.sources[0].max_tokens = max_tokens
        made.sources.append(SourceConfig("other", [str(other)]))
        return made

    return make


@pytest.fixture
def totals(tokenizer, tales) -> list[int]:
    """Tokens of the first 1, 2, 3, ... documents, each with its EOS."""
    lengths = (len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in tales[:DOCUMENTS])
    return list(accumulate(lengths))


@pytest.mark.parametrize("count", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("more", [0, 1, -1])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_documents_are_the_first_ones_that_fit_whole(job, totals, tmp_path, count, more, packing):
    """Also where the limit is the end of a document to the token, one more, or one less."""
    limit = totals[int(count * DOCUMENTS)] + more
    fits = int(np.searchsorted(totals, limit, side="right"))
    settings = job("limited", limit, packing=packing)
    source, other = prepare(settings, progress=False).sources
    assert (source.documents, source.tokens) == (fits, totals[fits - 1]) and source.tokens <= limit
    assert other.documents == 20 and other.not_read_bytes == 0
    starts = np.cumsum([0, *map(len, (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True))])
    last = starts[fits - 1 if totals[fits - 1] == limit else fits]  # of the documents that were looked at
    beyond = [unit for unit in load_job(settings).units if unit.source == "s" and unit.start > last]
    assert source.not_read_bytes == sum(unit.size for unit in beyond) > 0
    assert verify.check(tmp_path / "limited" / "out", contents=True) == []


def test_a_long_document_is_left_out_whole(tmp_path, tokenizer_dir, tokenizer, tales, monkeypatch):
    monkeypatch.setattr(unit_builder, "LONG_CHARACTERS", 5000)
    texts = [*tales[:20], "\n\n".join(tales[:40]), *tales[20:25]]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for extra, documents in ((-1, 20), (0, 21)):
        settings = config(tmp_path / str(extra), tokenizer_dir, [path], num_workers=1)
        settings.sources[0].max_tokens = sum(lengths[:21]) + extra
        source = prepare(settings, progress=False).sources[0]
        assert (source.documents, source.tokens) == (documents, sum(lengths[:documents]))


@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
def test_tasks_in_any_order_give_the_bytes_of_one_process(job, totals, tmp_path, order):
    limit = totals[DOCUMENTS // 2] - 1
    prepare(job("one", limit), progress=False)
    settings = job("tasks", limit)
    for task in order:
        prepare(settings, progress=False, task=task, num_tasks=3)
    merge(settings, progress=False)
    assert digest(tmp_path / "tasks" / "out") == digest(tmp_path / "one" / "out")


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(job, totals, tmp_path):
    limit = totals[DOCUMENTS // 3] - 1
    for name, workers in (("one", 1), ("two", 2)):
        prepare(job(name, limit, num_workers=workers), progress=False)
    assert digest(tmp_path / "one" / "out") == digest(tmp_path / "two" / "out")


def test_one_process_makes_nothing_beyond_and_no_unit_twice(job, totals, monkeypatch):
    made: Counter = Counter()
    real = worker._make_shards

    def counted(unit, *arguments):
        made[unit.source, unit.index] += 1
        return real(unit, *arguments)

    monkeypatch.setattr(worker, "_make_shards", counted)
    settings = job("out", totals[DOCUMENTS // 3] - 1)
    prepare(settings, progress=False)
    numbers = sorted(index for source, index in made if source == "s")
    assert set(made.values()) == {1} and numbers == list(range(len(numbers)))
    assert 3 < len(numbers) < len([unit for unit in load_job(settings).units if unit.source == "s"]) - 3


@pytest.mark.parametrize("moment", ["making", "record", "_entries", "remove_unfinished", "_remove_other_shards"])
def test_a_merge_that_is_killed_at_any_step_is_done_again(job, totals, tmp_path, monkeypatch, moment):
    """Also between the shards of the unit that is cut, which are made again in place, and their record."""
    limit = totals[DOCUMENTS // 2] - 1
    prepare(job("one", limit), progress=False)
    settings = job("killed", limit)
    for task in (2, 1, 0):  # so that units beyond the limit are made, and the one that is cut is whole
        prepare(settings, progress=False, task=task, num_tasks=3)
    out = tmp_path / "killed" / "out"
    assert len(list(out.glob(".work/s-*.json"))) > len({*(tmp_path / "one" / "out" / "s").glob("train-*")})

    def killed(*_, **__):
        raise RuntimeError("killed")

    real = worker._make_shards

    def made_then_killed(*arguments):
        real(*arguments)
        killed()

    places = {"making": (worker, "_make_shards", killed), "record": (worker, "_make_shards", made_then_killed)}
    with monkeypatch.context() as patched:
        patched.setattr(*places.get(moment, (merging, moment, killed)))
        with pytest.raises(RuntimeError, match="killed"):
            merge(settings, progress=False)
    assert not (out / "manifest.json").exists()
    merge(settings, progress=False)
    assert digest(out) == digest(tmp_path / "one" / "out")


@pytest.mark.parametrize("place", [0, -1])
def test_a_bad_shard_of_a_limited_source_is_repaired_to_the_same_bytes(job, totals, tmp_path, place):
    """Also one of the unit that was cut, whose limit the manifest keeps."""
    settings = job("out", totals[DOCUMENTS // 2] - 1)
    manifest = prepare(settings, progress=False)
    out = tmp_path / "out" / "out"
    before = digest(out)
    last = shards.unit_of(manifest.sources[0].train[-1].file)
    assert manifest.parts[0].cut["s"][0] == last
    (out / manifest.sources[0].train[place].file).unlink()
    repair(settings, progress=False)
    assert digest(out) == before


def test_max_tokens_too_small_for_a_row_is_an_error(job, tmp_path):
    with pytest.raises(UserError, match=r"source s gives no row .*max_tokens"):
        prepare(job("small", 10), progress=False)
    assert not (tmp_path / "small" / "out" / "manifest.json").exists()


def test_a_document_beyond_the_limit_does_not_drop_another_sources(job, totals, tmp_path):
    """`other` has 20 documents of which the limited source, which stands before it, has the first five."""
    settings = job("out", totals[4], deduplicate="exact", validation_fraction=0.0, unit_mb=100.0)
    limited, other = (entry for entry in prepare(settings, progress=False).sources)
    assert other.documents == 20 and not other.filtered
    assert limited.filtered == {"duplicate": 20} and limited.documents > 0 and limited.tokens <= totals[4]
    out = tmp_path / "out" / "out"
    before = digest(out)
    (out / other.train[0].file).unlink()
    (out / limited.train[0].file).unlink()
    repair(settings, progress=False)
    assert digest(out) == before


@pytest.mark.parametrize("characters", [400, 1 << 20], ids=["small batches", "one batch"])
def test_nothing_beyond_the_limit_is_looked_at_or_counted(
    tmp_path, tokenizer_dir, tokenizer, tales, monkeypatch, characters
):
    """However far documents are read ahead: unusable lines, special tokens, damage. What lies before is counted."""
    monkeypatch.setattr(unit_builder, "BATCH_CHARACTERS", characters)
    texts = [text[:120] for text in tales[:6]]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[1:1] = ['{"text": 7}', '{"text": ""}']
    lines += ['{"text": 8}', '{"text": ""}', json.dumps({"text": "a </s> b <|endoftext|>"})] * 5
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    settings = config(tmp_path / "c", tokenizer_dir, [path], num_workers=1, seq_len=8, max_bad_fraction=0.3,
                      special_tokens_in_text="error")  # fmt: skip
    settings.sources[0].max_tokens = sum(len(tokenizer.encode(t, add_special_tokens=False)) + 1 for t in texts[:4]) + 1
    source = prepare(settings, progress=False).sources[0]
    assert source.documents == 4
    assert (source.bad, source.filtered, source.special_tokens) == ({"text is not a string": 1}, {"empty": 1}, {})
