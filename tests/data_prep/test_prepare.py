import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import config, digest, write_jsonl

from common.config import save_config
from common.errors import UserError
from data_prep import shards, verify
from data_prep.__main__ import main
from data_prep.config import SourceConfig
from data_prep.prepare import merge, prepare
from data_prep.unit_builder import is_validation


def all_rows(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = shards.ShardedRows(folder, getattr(shards.Manifest.load(folder).sources[0], split))
    return [rows.row(i) for i in range(len(rows))]


def test_rows_hold_the_tokenizers_ids_of_each_document_in_order(tmp_path, tokenizer_dir, tokenizer, tales):
    """Rows, put end to end, are `encode` of each document between BOS and EOS, in the order of the file.

    Held-out documents are whole; of the training ones, the last tokens fill no row and are dropped.
    """
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
        found = np.concatenate([row[: lengths.sum()] for row, lengths in rows])
        np.testing.assert_array_equal(found, ids[: len(found)])
        assert len(found) == (len(ids) if split == "validation" else len(ids) // 64 * 64)
        ends = set(np.cumsum([len(document) for document in expected]).tolist())
        stored = np.cumsum(np.concatenate([lengths for _, lengths in rows]))
        assert {end for end in stored.tolist() if end % 64} <= ends
        assert {end for end in ends if end <= len(found)} <= set(stored.tolist())
        total += len(ids)
    assert source.documents == 40 and source.tokens == total
    in_rows = sum(s.tokens for s in source.train + source.validation)
    assert source.tokens == source.dropped_tokens + in_rows - source.padding and source.padding < 64
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.slow
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


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, tokenizer_dir, tales):
    import fcntl

    path = write_jsonl(tmp_path / "a.jsonl", tales[:10])
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with open(tmp_path / "out" / ".work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)


def test_a_shard_file_is_closed_at_shard_mb_and_rows_are_found_across_files(tmp_path, tokenizer_dir, tales):
    """A full shard holds whole record batches."""
    path = write_jsonl(tmp_path / "a.jsonl", tales)
    manifest = prepare(config(tmp_path, tokenizer_dir, [path], seq_len=512, shard_mb=1), progress=False)
    assert next(shard.rows for shard in manifest.sources[0].train) == shards.BATCH_ROWS
    assert len(manifest.sources[0].train) >= 2
    ids, lengths = all_rows(tmp_path / "out", "train")[shards.BATCH_ROWS]
    second = datasets.Dataset.from_file(str(tmp_path / "out/s/train-00000-001.arrow"))
    assert ids.tolist() == second[0]["input_ids"] and lengths.tolist() == second[0]["document_lengths"]


def test_datasets_reads_the_same_rows_from_a_shard(corpus_dir):
    manifest = shards.Manifest.load(corpus_dir)
    shard = manifest.sources[0].train[0]
    table = datasets.Dataset.from_file(str(corpus_dir / shard.file))
    assert len(table) == shard.rows and len(table[0]["input_ids"]) == manifest.seq_len
    rows = shards.ShardedRows(corpus_dir, [shard])
    for i in range(shard.rows):
        ids, lengths = rows.row(i)
        assert (ids.tolist(), lengths.tolist()) == (table[i]["input_ids"], table[i]["document_lengths"])


def corrupt(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
    elif kind == "truncated":
        content = content[:-100]
    os.chmod(path, 0o644)
    path.write_bytes(content) if kind != "missing" else path.unlink()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_verify_names_the_bad_shard(tmp_path, tokenizer_dir, tales, kind, caplog):
    prepare(config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:10])]), progress=False)
    assert main(["verify", str(tmp_path / "out")]) == 0
    corrupt(tmp_path / "out" / "s" / "train-00000-000.arrow", kind)
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert any("train-00000-000.arrow" in message for message in caplog.messages)


def test_verify_checks_the_rows_even_if_the_hashes_match(tmp_path, tokenizer_dir, tales):
    prepare(config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:10])]), progress=False)
    out = tmp_path / "out"
    content = json.loads((out / "manifest.json").read_text())
    content["tokenizer"]["vocab_size"] = 5
    (out / "manifest.json").write_text(json.dumps(content))
    assert "outside the vocabulary" in verify.check(out, contents=True)[0]


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
        ({"validation_fraction": 1.0}, "expected 0 or more and less than 1"),
        ({"seq_len": 1}, "seq_len is 1, expected 2 or more"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5, expected 0 or more and at most 1"),
        ({"num_workers": -1}, "num_workers is -1, expected 0 or more"),
        ({"unit_mb": -1}, "unit_mb is -1, expected 0 or more"),
        ({"shard_mb": 0}, "shard_mb is 0, expected 1 or more"),
        ({"sources": [SourceConfig("a", [], weight=0)]}, "source a: weight is 0, expected more than 0"),
        ({"sources": [SourceConfig("../a", [])]}, "source name '../a': use letters"),
        ({"sources": [SourceConfig("a", []), SourceConfig("a", [])]}, "two sources have the same name"),
    ],
)
def test_settings_that_cannot_work_are_refused_and_no_manifest_is_written(
    tmp_path, tokenizer_dir, tales, change, message
):
    good = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:5])])
    for key, value in change.items():
        setattr(good, key, value)
    with pytest.raises(UserError, match=message):
        prepare(good, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("documents", "fraction"), [(3, 0.05), (40, 1e-6)])
def test_a_source_without_validation_rows_is_named_in_a_warning(
    tmp_path, tokenizer_dir, tales, caplog, capsys, documents, fraction
):
    """When it is prepared, when the same command finds it finished, when tasks are merged, and by `inspect`."""
    few = write_jsonl(tmp_path / "few.jsonl", tales[:documents])
    many = write_jsonl(tmp_path / "many.jsonl", tales)
    settings = config(tmp_path, tokenizer_dir, [few], validation_fraction=fraction, num_workers=1)
    if fraction > 1e-3:
        settings.sources.append(SourceConfig("many", [str(many)]))
    prepare(settings, progress=False)
    prepare(settings, progress=False)
    settings.output_dir = str(tmp_path / "tasks")
    prepare(settings, progress=False, task=0, num_tasks=2)
    prepare(settings, progress=False, task=1, num_tasks=2)
    manifest = merge(settings)
    source = manifest.sources[0]
    assert not source.validation and all(entry.validation for entry in manifest.sources[1:])
    expected = (
        f"source s has {documents} documents ({source.tokens:,} tokens) but gets no validation row: with "
        f"validation_fraction={fraction:g} none of them is held out; use a larger validation_fraction or more documents"
    )
    assert [message for message in caplog.messages if "validation row" in message] == [expected] * 3
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "s has no validation rows; to get some: a larger validation_fraction" in shown
    assert "many has no validation rows" not in shown
    assert main(["inspect", str(tmp_path / "out"), "--split", "validation"]) == 2
    assert "s has no validation rows in" in caplog.messages[-1]


def test_no_warning_when_nothing_should_be_held_out(tmp_path, tokenizer_dir, tales, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", tales[:3])
    prepare(config(tmp_path, tokenizer_dir, [path], validation_fraction=0), progress=False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_manifest_keeps_the_names_of_its_json(corpus_dir):
    """Finished corpora of earlier versions are read, and tools that read manifest.json go on working."""
    text = (corpus_dir / "manifest.json").read_text()
    content = json.loads(text)
    assert list(content) == [
        "seq_len", "dtype", "packing", "tokenizer", "recipe", "sources", "parts", "format", "version",
    ]  # fmt: skip
    assert list(content["sources"][0]) == [
        "name", "weight", "documents", "characters", "bytes", "bad", "filtered", "damaged", "ignored",
        "special_tokens", "not_read_bytes", "max_epochs", "tokens", "remainder", "padding", "train", "validation",
    ]  # fmt: skip
    manifest = shards.Manifest.load(corpus_dir)
    assert manifest.corpus_hash == content["recipe"]
    assert [source.dropped_tokens for source in manifest.sources] == [s["remainder"] for s in content["sources"]]
    assert json.dumps(shards._to_json(manifest), indent=1) + "\n" == text


def test_a_failing_disk_exits_with_1_and_says_that_the_same_command_continues(tmp_path, tokenizer_dir, tales, caplog):
    settings = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", tales[:5])])
    (tmp_path / "file").touch()
    settings.output_dir = str(tmp_path / "file" / "out")  # no folder can be made there
    save_config(settings, tmp_path / "config.yaml")
    assert main(["prepare", str(tmp_path / "config.yaml")]) == 1
    assert caplog.messages[-1].endswith("finished work is kept, and the same command continues from there")


def test_command_line_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("sources: []\ntokeniser: x\n")
    assert main(["prepare", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and "c.yaml" in error
    assert "unknown key 'tokeniser'" in error
    assert main(["prepare", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
