import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import config, digest, write_jsonl

from common.errors import UserError
from data_prep import shards
from data_prep.__main__ import main
from data_prep.prepare import prepare
from data_prep.unit import is_validation


def all_rows(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = shards.Rows(folder, getattr(shards.Manifest.load(folder).sources[0], split))
    return [rows.row(i) for i in range(len(rows))]


def test_rows_are_what_the_tokenizer_gives(tmp_path, tokenizer_dir, tokenizer, tales):
    """Rows, put end to end, are `encode` of each document between BOS and EOS, in the order of the file."""
    manifest = prepare(
        config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:40])], add_bos=True,
               validation_fraction=0.2), progress=False,
    )  # fmt: skip
    source = manifest.sources[0]
    total = 0
    for split in shards.SPLITS:
        texts = [text for text in tales[:40] if is_validation(text, 0.2) == (split == "validation")]
        assert texts  # both splits are exercised
        expected = [[1, *tokenizer.encode(text, add_special_tokens=False), 0] for text in texts]
        ids = np.concatenate(expected)
        rows = all_rows(tmp_path / "out", split)
        np.testing.assert_array_equal(np.concatenate([row for row, _ in rows]), ids[: len(rows) * 64])
        assert len(ids) - len(rows) * 64 < 64
        ends = set(np.cumsum([len(document) for document in expected]).tolist())
        found = np.cumsum(np.concatenate([lengths for _, lengths in rows]))
        assert {end for end in found.tolist() if end % 64} <= ends
        assert {end for end in ends if end <= len(rows) * 64} <= set(found.tolist())
        total += len(ids)
    assert source.documents == 40 and source.tokens == total
    assert source.tokens == source.remainder + sum(s.tokens for s in source.train + source.validation)
    assert not (tmp_path / "out" / ".work").exists()


def test_the_number_of_processes_changes_no_byte(tmp_path, tokenizer_dir, tales):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", tales[i * 20 : i * 20 + 20]) for i in range(3)]
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        prepare(
            config(folder, tokenizer_dir, paths, num_workers=workers, unit_mb=0.01, validation_fraction=0.1),
            progress=False,
        )
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_the_same_command_again_does_nothing_and_another_is_refused(tmp_path, tokenizer_dir, tales):
    path = write_jsonl(tmp_path / "a.jsonl", tales[:10])
    prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)
    before = digest(tmp_path / "out")
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*"))]
    prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)
    assert times == [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*"))]
    with pytest.raises(UserError, match="made from other settings or files"):
        prepare(config(tmp_path, tokenizer_dir, [path], seq_len=32), progress=False)
    write_jsonl(path, tales[1:11])
    with pytest.raises(UserError, match="made from other settings or files"):
        prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)
    assert digest(tmp_path / "out") == before


def test_two_processes_on_one_folder(tmp_path, tokenizer_dir, tales):
    import fcntl

    path = write_jsonl(tmp_path / "a.jsonl", tales[:10])
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with open(tmp_path / "out" / ".work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)


def test_large_shards_are_cut(tmp_path, tokenizer_dir, tales):
    """Shards hold whole record batches, and rows are found across files."""
    path = write_jsonl(tmp_path / "a.jsonl", tales)
    manifest = prepare(config(tmp_path, tokenizer_dir, [path], seq_len=512, shard_mb=1), progress=False)
    assert next(shard.rows for shard in manifest.sources[0].train) == shards.BATCH_ROWS
    assert len(manifest.sources[0].train) >= 2
    row = all_rows(tmp_path / "out", "train")[shards.BATCH_ROWS][0]
    np.testing.assert_array_equal(row, shards.ShardReader(tmp_path / "out/s/train-00000-001.arrow").row(0)[0])


def test_other_tools_read_a_shard(corpus_dir):
    manifest = shards.Manifest.load(corpus_dir)
    shard = manifest.sources[0].train[0]
    table = datasets.Dataset.from_file(str(corpus_dir / shard.file))
    assert len(table) == shard.rows and len(table[0]["input_ids"]) == manifest.seq_len
    np.testing.assert_array_equal(table[3]["input_ids"], shards.ShardReader(corpus_dir / shard.file).row(3)[0])


def corrupt(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
    elif kind == "truncated":
        content = content[:-100]
    os.chmod(path, 0o644)
    path.write_bytes(content) if kind != "missing" else path.unlink()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_verify_names_the_bad_shard(tmp_path, tokenizer_dir, tales, kind, capsys):
    prepare(config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:10])]), progress=False)
    assert main(["verify", str(tmp_path / "out")]) == 0
    corrupt(tmp_path / "out" / "s" / "train-00000-000.arrow", kind)
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert "train-00000-000.arrow" in capsys.readouterr().err


def test_verify_looks_into_rows_whose_hash_was_renewed(tmp_path, tokenizer_dir, tales):
    prepare(config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:10])]), progress=False)
    out = tmp_path / "out"
    content = json.loads((out / "manifest.json").read_text())
    content["tokenizer"]["vocab_size"] = 5
    (out / "manifest.json").write_text(json.dumps(content))
    assert "outside the vocabulary" in shards.check(out, contents=True)[0]


def test_inspect_shows_a_row(corpus_dir, capsys):
    assert main(["inspect", str(corpus_dir), "--source", "long", "--row", "1"]) == 0
    shown = capsys.readouterr().out
    assert "training rows" in shown and "long/train row 1" in shown
    assert main(["inspect", str(corpus_dir), "--row", "999999"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 10**6}, "gives no row of 1000000 tokens"),
        ({"tokenizer": "nowhere"}, "no tokenizer could be loaded from 'nowhere'"),
        ({"sources": []}, "sources is empty"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"seq_len": 1}, "seq_len is 1"),
    ],
)
def test_errors(tmp_path, tokenizer_dir, tales, change, message):
    good = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:5])])
    for key, value in change.items():
        setattr(good, key, value)
    with pytest.raises(UserError, match=message):
        prepare(good, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_command_line_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("sources: []\ntokeniser: x\n")
    assert main(["prepare", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown key 'tokeniser'" in error and "c.yaml" in error
    assert main(["prepare", str(tmp_path / "none.yaml")]) == 2
    assert main(["verify", str(tmp_path)]) == 2
