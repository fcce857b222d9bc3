"""Rows of another length from shards are the rows that the texts give."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import config, digest, write_jsonl

from common.errors import UserError
from data_prep import rechunk, shard_index, shards, verify
from data_prep.__main__ import main
from data_prep.config import SourceConfig
from data_prep.prepare import prepare

SETTINGS = {"validation_fraction": 0.1, "unit_mb": 0.03, "num_workers": 1, "add_bos": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_dir, tales):
    """`made(seq_len)`: the folder of a corpus of two sources and several units, made of the texts."""
    folder = tmp_path_factory.mktemp("rechunk")
    paths = [write_jsonl(folder / f"{n}.jsonl", part) for n, part in enumerate((tales[:120], tales[300:340]))]
    done: dict[tuple, Path] = {}

    def make(seq_len: int, **others) -> Path:
        key = (seq_len, *others.items())
        if key not in done:
            settings = config(folder / str(len(done)), tokenizer_dir, paths[:1], seq_len=seq_len, **SETTINGS, **others)
            settings.sources.append(SourceConfig("t", [str(paths[1])], weight=2.0, max_epochs=3))
            prepare(settings, progress=False)
            done[key] = folder / str(len(done)) / "out"
        return done[key]

    return make


def rows_by_unit(folder: Path, source: shards.SourceEntry, split: str) -> dict[int, list]:
    found: dict[int, list] = {}
    for shard in getattr(source, split):
        table = shard_index.index_of(np.fromfile(folder / shard.file, dtype=np.uint8), shards.BATCH_ROWS)[1]
        found.setdefault(shards.unit_of(shard.file), []).extend(row for batch in table for row in batch.to_pylist())
    return found


@pytest.mark.parametrize(("old_length", "new_length"), [(64, 24), (64, 128), (33, 100), (64, 64)])
def test_the_rows_are_those_that_the_texts_give(made, tmp_path, old_length, new_length):
    """Held-out rows to the byte; training rows up to the tokens that the old rows had dropped at the ends of units."""
    old, expected = made(old_length), made(new_length)
    rechunk.rechunk(old, new_length, tmp_path / "out", num_workers=1, progress=False)
    assert verify.check(tmp_path / "out", contents=True) == []
    before, after, texts = (shards.Manifest.load(folder) for folder in (old, tmp_path / "out", expected))
    assert after.seq_len == new_length and after.tokenizer == before.tokenizer
    units = 0
    for was, source, like in zip(before.sources, after.sources, texts.sources, strict=True):
        for name in ("name", "weight", "max_epochs", "documents", "characters", "bytes", "tokens", "bad", "filtered"):
            assert getattr(source, name) == getattr(was, name) == getattr(like, name)
        assert [shard.sha256 for shard in source.validation] == [shard.sha256 for shard in like.validation]
        rows, wanted = rows_by_unit(tmp_path / "out", source, "train"), rows_by_unit(expected, like, "train")
        old_rows = rows_by_unit(old, was, "train")
        for unit, found in rows.items():
            assert len(found) == len(old_rows[unit]) * old_length // new_length
            assert found == wanted[unit][: len(found)]
        units += len(rows)
        in_rows = sum(shard.tokens for shard in source.train + source.validation)
        assert source.dropped_tokens == source.tokens + source.padding - in_rows
    assert units > 4


def test_it_continues_where_it_was_stopped_and_the_bytes_are_the_same(made, tmp_path, monkeypatch):
    old = made(64)
    rechunk.rechunk(old, 40, tmp_path / "whole", num_workers=2, progress=False)
    real = rechunk.rechunk_unit
    calls = []

    def stops(*arguments):
        calls.append(arguments[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(rechunk, "rechunk_unit", stops)
    with pytest.raises(KeyboardInterrupt):
        rechunk.rechunk(old, 40, tmp_path / "out", num_workers=1, progress=False)
    for seq_len, shard_mb in ((41, 1024), (40, 1)):
        with pytest.raises(UserError, match="another, unfinished corpus"):
            rechunk.rechunk(old, seq_len, tmp_path / "out", num_workers=1, shard_mb=shard_mb, progress=False)
    rechunk.rechunk(old, 40, tmp_path / "out", num_workers=1, progress=False)
    assert calls[3] == calls[2] and len(set(calls)) == len(calls) - 1
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    calls.clear()
    rechunk.rechunk(old, 40, tmp_path / "out", num_workers=1, progress=False)  # finished: nothing to do
    assert not calls
    for seq_len, shard_mb in ((41, 1024), (40, 1)):
        with pytest.raises(UserError, match="holds another corpus"):
            rechunk.rechunk(old, seq_len, tmp_path / "out", num_workers=1, shard_mb=shard_mb, progress=False)


def test_what_cannot_be_rechunked_is_refused_and_nothing_is_written(made, tmp_path, caplog):
    old = made(64)
    out = tmp_path / "out"
    assert main(["rechunk", str(old), "--seq_len", "1", "--output_dir", str(out)]) == 2
    assert "--seq_len is 1" in caplog.messages[-1]
    assert main(["rechunk", str(old), "--seq_len", "8", "--output_dir", str(old)]) == 2
    assert "is the corpus itself" in caplog.messages[-1]
    assert main(["rechunk", str(made(64, packing="best_fit")), "--seq_len", "8", "--output_dir", str(out)]) == 2
    assert "packed with best_fit" in caplog.messages[-1]
    manifest = shards.Manifest.load(old)
    manifest.version = 1
    (tmp_path / "v1").mkdir()
    manifest.save(tmp_path / "v1")
    assert main(["rechunk", str(tmp_path / "v1"), "--seq_len", "8", "--output_dir", str(out)]) == 2
    assert "made by an earlier version" in caplog.messages[-1]
    assert not out.exists()
    with pytest.raises(UserError, match="source s fills no training row of 1000000 tokens"):
        rechunk.rechunk(old, 10**6, out, num_workers=1, progress=False)


def test_a_damaged_shard_is_named_and_not_hashed_anew(made, tmp_path):
    shutil.copytree(made(64), tmp_path / "old")
    path = tmp_path / "old" / shards.Manifest.load(tmp_path / "old").sources[1].train[0].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}: sha256"):
        rechunk.rechunk(tmp_path / "old", 16, tmp_path / "out", num_workers=1, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_command_says_what_was_dropped(made, tmp_path, caplog, capsys):
    old = made(64)
    assert (
        main(["rechunk", str(old), "--seq_len", "48", "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]) == 0
    )
    before = sum(source.dropped_tokens for source in shards.Manifest.load(old).sources)
    assert any(f"{before:,} were in none of the old ones" in message for message in caplog.messages)
    assert "rows of 48 tokens" in capsys.readouterr().out
