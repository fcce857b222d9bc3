"""The shard format: what other readers see, random rows, their lifetime, and what `verify` finds."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from helpers import ROOT, config, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.files import sha256_of
from data_prep import reading, shard_index, shards, verify
from data_prep.__main__ import main
from data_prep.packing import PackedRows
from data_prep.prepare import prepare
from data_prep.unit_builder import is_validation
from data_prep.writing import RowSettings, ShardWriter, SplitWriter

FINGERPRINT = "f" * 64
VOCABULARY = 300


def made_rows(count: int, seq_len: int, seed: int) -> list[tuple[list[int], list[int], bool]]:
    """(ids, lengths, continues) of `count` rows, full of documents of random lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        cuts = np.unique([*rng.integers(1, seq_len + 1, rng.integers(1, 6)), seq_len])
        rows.append((rng.integers(0, VOCABULARY, seq_len).tolist(), np.diff(cuts, prepend=0).tolist(), False))
    return [(ids, lengths, bool(rng.integers(2))) for ids, lengths, _ in rows]


def packed(rows: list[tuple[list[int], list[int], bool]]) -> PackedRows:
    lengths = [length for _, row, _ in rows for length in row]
    return PackedRows(
        np.array([ids for ids, *_ in rows]), np.array(lengths), np.array([len(row) for _, row, _ in rows]),
        np.array([continues for *_, continues in rows]),
    )  # fmt: skip


def write_corpus(folder: Path, by_shard: list[list], dtype: str = "uint16") -> shards.Manifest:
    """A corpus of one source whose shards have these rows, each of a unit of its own."""
    seq_len = len(by_shard[0][0][0])
    found = []
    for number, rows in enumerate(by_shard):
        writer = ShardWriter(folder, f"s/train-{number:05d}-000.arrow", shards.schema(seq_len, dtype, FINGERPRINT))
        for begin in range(0, len(rows), 700):
            writer.append(packed(rows[begin : begin + 700]))
        found.append(writer.close())
    entry = shards.SourceEntry("s", 1.0, tokens=sum(shard.tokens for shard in found), train=found)
    special = {"bos": None, "eos": 0, "pad": None}
    tokenizer = {"name": "t", "fingerprint": FINGERPRINT, "vocab_size": VOCABULARY, "special_ids": special}
    manifest = shards.Manifest(seq_len, dtype, "concat", tokenizer, "hash", [entry])
    manifest.save(folder)
    return manifest


def write_version_1(path: Path, rows: list) -> shards.Shard:
    """As 16eb258 wrote it: two columns, no index."""
    seq_len = len(rows[0][0])
    schema = shards.schema(seq_len, "uint16", FINGERPRINT, version=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for begin in range(0, len(rows), 1024):
            part = rows[begin : begin + 1024]
            columns = [pa.array([ids for ids, *_ in part], schema.types[0])]
            columns.append(pa.array([lengths for _, lengths, _ in part], schema.types[1]))
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return shards.Shard(f"s/{path.name}", len(rows), len(rows) * seq_len, 0, path.stat().st_size, "")


def assert_rows(read: shards.ShardedRows, rows: list, order) -> None:
    assert len(read) == len(rows)
    for i in order:
        ids, lengths = read.row(i)
        assert (ids.tolist(), lengths.tolist()) == rows[i][:2]
        assert not ids.flags.writeable and not lengths.flags.owndata


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from(["uint16", "uint32"]), st.integers(2, 9),
    st.integers(0, 1000),
)  # fmt: skip
def test_rows_are_read_in_any_order_by_us_and_in_order_by_arrow_and_datasets(tmp_path_factory, counts, dtype, L, seed):
    folder = tmp_path_factory.mktemp("corpus")
    by_shard = [made_rows(count, L, seed + i) for i, count in enumerate(counts)]
    manifest = write_corpus(folder, by_shard, dtype)
    everything = [row for rows in by_shard for row in rows]
    order = np.random.default_rng(seed).permutation(len(everything)).tolist()
    assert_rows(shards.ShardedRows(folder, manifest.sources[0].train), everything, order)
    for rows, shard in zip(by_shard, manifest.sources[0].train):
        expected = [dict(zip(("input_ids", "document_lengths", "last_continues"), row)) for row in rows]
        assert pa.ipc.open_stream(pa.memory_map(str(folder / shard.file))).read_all().to_pylist() == expected
    assert datasets.Dataset.from_file(str(folder / shard.file)).to_list() == expected
    assert verify.check(folder, contents=True) == []


def test_rows_of_several_batches_and_of_version_1(tmp_path):
    rows = made_rows(2500, 8, 0)
    manifest = write_corpus(tmp_path, [rows, rows[:1024], rows[:1]])
    old = [write_version_1(tmp_path / "s" / f"old-{n:05d}-000.arrow", part) for n, part in ((0, rows), (1, rows[:7]))]
    places = [0, 1023, 1024, 2047, 2048, 2499]
    assert_rows(
        shards.ShardedRows(tmp_path, manifest.sources[0].train), rows + rows[:1024] + rows[:1], [*places, 3523, 3524]
    )
    assert_rows(shards.ShardedRows(tmp_path, old), rows + rows[:7], [*places, 2506])
    mixed = [old[1], manifest.sources[0].train[0]]
    assert_rows(shards.ShardedRows(tmp_path, mixed), rows[:7] + rows, [0, 6, 7, 2506])


def test_long_rows_have_small_batches(tmp_path):
    """A writer holds no more than BATCH_BYTES of ids."""
    rows = made_rows(300, 1 << 16, 0)
    manifest = write_corpus(tmp_path, [rows])
    content = reading.map_file(tmp_path / manifest.sources[0].train[0].file)
    index = shard_index.stored_index(content)
    assert index is not None and index.batch_rows == 128
    assert [len(batch) for batch in shard_index.index_of(content, 128)[1]] == [128, 128, 44]
    assert_rows(shards.ShardedRows(tmp_path, manifest.sources[0].train), rows, [299, 0, 127, 128])


FEW_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
from data_prep import shards
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
rows = shards.ShardedRows(Path(sys.argv[1]), shards.Manifest.load(sys.argv[1]).sources[0].train)
total = sum(int(rows.row(i)[0].sum()) for i in range(len(rows)))
before = len(os.listdir("/proc/self/fd"))
child = os.fork()
if not child:
    os._exit(sum(int(rows.row(i)[0].sum()) for i in range(len(rows))) != total)
assert os.waitpid(child, 0)[1] == 0
print(total, before < 20)
"""


def test_many_shards_need_no_descriptors_and_a_forked_process_reads_on(tmp_path):
    by_shard = [made_rows(2, 8, n) for n in range(700)]
    write_corpus(tmp_path, by_shard)
    command = [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path)]
    outcome = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    total = sum(sum(ids) for rows in by_shard for ids, *_ in rows)
    assert outcome.stdout.split() == [str(total), "True"], outcome.stderr


def mapped_files(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_arrays_stay_valid_after_their_reader_and_are_unmapped_with_the_last(tmp_path):
    by_shard = [made_rows(3, 8, n) for n in range(4)]
    manifest = write_corpus(tmp_path, by_shard)
    before = shards.ShardedRows._mapped
    read = shards.ShardedRows(tmp_path, manifest.sources[0].train)
    ids, lengths = read.row(4)
    read.row(0)
    assert mapped_files(tmp_path) == 2 and shards.ShardedRows._mapped > before
    for shard in manifest.sources[0].train:
        (tmp_path / shard.file).unlink()  # a mapped file lives on
    del read
    gc.collect()
    assert (ids.tolist(), lengths.tolist()) == by_shard[1][1][:2]
    assert shards.ShardedRows._mapped == before
    del ids, lengths
    gc.collect()
    assert mapped_files(tmp_path) == 0


def test_beyond_the_most_mappings_rows_are_still_read(tmp_path, monkeypatch):
    by_shard = [made_rows(3, 8, n) for n in range(40)]
    manifest = write_corpus(tmp_path, by_shard)
    monkeypatch.setattr(shards.ShardedRows, "_most_mapped", shards.ShardedRows._mapped + 9)
    read = shards.ShardedRows(tmp_path, manifest.sources[0].train)
    everything = [row for rows in by_shard for row in rows]
    assert_rows(read, everything, [*range(119, -1, -1), *range(120)])
    assert mapped_files(tmp_path) <= 10


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    index = shard_index.stored_index(np.frombuffer(bytes(content), dtype=np.uint8))
    assert index is not None
    table = len(content) - index.size
    if how == "shorter":
        content = content[:-8]
    elif how == "longer":
        content += bytes(8)
    elif how == "empty":
        content.clear()
    elif how == "garbage":
        content[:] = os.urandom(len(content))
    elif how == "index beyond the file":
        content[table + 8 : table + 16] = (1 << 40).to_bytes(8, "little")
    elif how == "index before the file":
        content[table : table + 8] = (-64).to_bytes(8, "little", signed=True)
    elif how == "trailer":
        content[-48:-40] = (1 << 50).to_bytes(8, "little")
        content[200:400] = bytes(200)
    elif how == "lengths beyond the file":
        offsets = int.from_bytes(content[table + 8 : table + 16], "little")
        content[offsets : offsets + 8] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(content) if how != "missing" else path.unlink()


@pytest.mark.parametrize(
    "how",
    ["shorter", "longer", "empty", "garbage", "missing", "index beyond the file", "index before the file", "trailer",
     "lengths beyond the file"],
)  # fmt: skip
def test_a_damaged_shard_is_a_sentence_for_the_reader_and_for_verify(tmp_path, how):
    manifest = write_corpus(tmp_path, [made_rows(50, 16, n) for n in range(3)])
    shard = manifest.sources[0].train[1]
    damage(tmp_path / shard.file, how)
    read = shards.ShardedRows(tmp_path, manifest.sources[0].train)
    read.row(0)
    read.row(149)
    with pytest.raises(UserError, match=r"train-00001-000\.arrow is not a complete shard") as error:
        read.row(50)
    assert "\n" not in str(error.value)
    problems = verify.check(tmp_path, contents=True)
    assert problems and all("train-00001-000.arrow" in problem and "\n" not in problem for problem in problems)


def rewrite(folder: Path, manifest: shards.Manifest, rows: list, split: str = "train", **changes) -> list[str]:
    """What verify says of a corpus whose only shard has these rows, with right hashes."""
    made = write_corpus(folder, [rows])
    made.packing = manifest.packing
    entry = made.sources[0]
    if split == "validation":
        entry.validation = entry.train
        entry.train = []
    entry.padding = sum(len(ids) - sum(lengths) for ids, lengths, _ in rows)
    entry.tokens -= entry.padding
    for name, value in changes.items():
        setattr(made, name, value)
    made.save(folder)
    return verify.check(folder, contents=True)


def test_verify_names_the_row_of_each_fault(tmp_path):
    good = made_rows(1500, 8, 0)
    manifest = write_corpus(tmp_path, [good])
    ids = good[0][0]

    def problems(row: int, *bad, **others) -> str:
        rows = [*good]
        rows[row] = bad
        found = rewrite(tmp_path, manifest, rows, **others)
        return "; ".join(found)

    file = tmp_path / "s" / "train-00000-000.arrow"
    assert problems(1400, ids, [8], False) == ""
    assert problems(1400, [*ids[:7], VOCABULARY], [8], False) == (
        f"{file}: row 1400: token id {VOCABULARY} is outside the vocabulary"
    )
    assert problems(3, ids, [4, 5], False).startswith(f"{file}: row 3: document lengths sum to more than 8")
    assert problems(3, ids, [4, 0, 4], False) == f"{file}: row 3: a document of no tokens"
    assert problems(3, ids, [4, 3], False) == f"{file}: row 3: document lengths sum to less than 8"
    # only the last row of a unit may be padded, and only where documents are held out
    assert "row 1499: document lengths sum to less" in problems(1499, ids, [4, 3], False)
    assert problems(1499, ids, [4, 3], False, split="validation") == ""
    assert "row 1498: document lengths sum to less" in problems(1498, ids, [4, 3], False, split="validation")
    assert "row 1499: last_continues is true" in problems(1499, ids, [4, 3], True, split="validation")
    assert "row 1499: last_continues is true" in problems(1499, ids, [8], True, split="validation")
    manifest.packing = "best_fit"
    assert "last_continues is true, but nothing follows" in problems(1499, ids, [8], True)
    good = [(*row[:2], False) for row in good]
    assert problems(3, ids, [4, 3], False) == ""
    assert "row 3: a document of no tokens" in problems(3, ids, [], False)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("rows", "20 rows, the manifest says 19"),
        ("documents", "pieces of documents, the manifest says 1"),
        ("tokenizer", "its schema differs from the manifest's seq_len, dtype or tokenizer"),
        ("bytes behind the rows", "no end marker where its rows end"),
    ],
)
def test_a_shard_of_right_size_and_hash_is_compared_with_the_manifest(tmp_path, other, expected):
    manifest = write_corpus(tmp_path, [made_rows(20, 8, 0)])
    shard = manifest.sources[0].train[0]
    path = tmp_path / shard.file
    assert verify.check(tmp_path, contents=True) == []
    if other == "rows":
        shard.rows = 19
        with pytest.raises(UserError, match="20 rows of 8 tokens, the manifest says 19 rows"):
            shards.ShardedRows(tmp_path, [shard]).row(0)
    elif other == "documents":
        shard.documents = 1
    elif other == "tokenizer":
        manifest.tokenizer["fingerprint"] = "e" * 64
    else:
        index = shard_index.stored_index(np.fromfile(path, dtype=np.uint8))
        assert index is not None
        content = path.read_bytes()
        path.write_bytes(content[: -index.size] + bytes(8) + content[-index.size :])
        shard.bytes, shard.sha256 = path.stat().st_size, sha256_of(path)
    manifest.save(tmp_path)
    (problem,) = verify.check(tmp_path, contents=True)
    assert expected in problem and shard.file in problem


def test_two_processes_that_write_one_shard_do_not_write_into_one_file(tmp_path, monkeypatch):
    """One that was believed dead may still write; whoever ends last has a whole shard."""
    rows = [made_rows(20, 8, seed) for seed in range(2)]
    writers = []
    for process in range(2):
        monkeypatch.setattr(os, "getpid", lambda process=process: 10**6 + process)
        writers.append(ShardWriter(tmp_path, "s/train-00000-000.arrow", shards.schema(8, "uint16", FINGERPRINT)))
    monkeypatch.undo()
    for writer, own in zip(writers, rows):
        writer.append(packed(own))
    for writer, own in zip(writers, rows):
        shard = writer.close()
        assert shard.sha256 == sha256_of(tmp_path / shard.file)
        read = shards.ShardedRows(tmp_path, [shard])
        assert [read.row(i)[0].tolist() for i in range(20)] == [ids for ids, *_ in own]
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["train-00000-000.arrow"]


def test_a_shard_whose_rows_have_another_length_is_not_read_as_one_of_the_others(tmp_path):
    """Each is whole, and what the manifest says of it; together they are no source."""
    (first,) = write_corpus(tmp_path / "a", [made_rows(20, 8, 0)]).sources[0].train
    (other,) = write_corpus(tmp_path / "b", [made_rows(10, 16, 1)]).sources[0].train
    first.file, other.file = f"a/{first.file}", f"b/{other.file}"
    read = shards.ShardedRows(tmp_path, [first, other])
    assert len(read.row(19)[0]) == 8
    with pytest.raises(UserError, match=f"{other.file} is not a complete shard .its rows are laid out otherwise"):
        read.row(20)


def test_the_fingerprint_is_that_of_all_that_a_run_reads(tmp_path):
    """Of the shards for training and the held-out ones, their order and the weights."""

    def changed(change: Callable[[shards.SourceEntry], object]) -> str:
        manifest = write_corpus(tmp_path, [made_rows(9, 8, n) for n in range(4)])
        entry = manifest.sources[0]
        entry.train, entry.validation = entry.train[:2], entry.train[2:]
        change(entry)
        return manifest.fingerprint

    found = [
        changed(lambda entry: None),
        changed(lambda entry: entry.train.reverse()),
        changed(lambda entry: entry.validation.reverse()),
        changed(lambda entry: entry.validation.pop()),
        changed(lambda entry: entry.train.pop()),
        changed(lambda entry: setattr(entry, "weight", 2.0)),
    ]
    assert len(set(found)) == len(found)
    assert found[0] == changed(lambda entry: setattr(entry, "documents", 9))


def test_only_the_last_shard_of_a_units_held_out_rows_may_end_in_padding(tmp_path):
    """Verify tells from the names which shards one unit made."""
    rows = made_rows(20, 8, 0)
    rows[-1] = (rows[-1][0], [4, 3], False)
    for second, expected in (("00000-001", [0]), ("00001-000", [])):
        manifest = write_corpus(tmp_path, [rows, made_rows(20, 8, 1)])
        entry = manifest.sources[0]
        for shard, number in zip(entry.train, ("00000-000", second)):
            renamed = f"s/validation-{number}.arrow"
            (tmp_path / shard.file).rename(tmp_path / renamed)
            shard.file = renamed
        entry.train, entry.validation = [], entry.train
        entry.padding, entry.tokens = 1, entry.tokens - 1
        manifest.save(tmp_path)
        problems = verify.check(tmp_path, contents=True)
        assert [f"validation-00000-00{i}.arrow: row 19: document lengths sum to less" in line
                for i, line in zip(expected, problems, strict=True)] == [True] * len(expected)  # fmt: skip


def test_verify_compares_what_the_manifest_counts(tmp_path):
    manifest = write_corpus(tmp_path, [made_rows(20, 8, 0)])
    rows = made_rows(20, 8, 0)
    assert rewrite(tmp_path, manifest, rows) == []
    assert "uint8 cannot hold the ids of a vocabulary of 300" in rewrite(tmp_path, manifest, rows, dtype="uint8")[0]
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["dtype"] = "uint16"
    for change, expected in (({"padding": 3, "tokens": 157}, "0 padding in its rows, the manifest says 3"),
                             ({"tokens": 3}, "3 tokens + 0 padding, but 160 in rows")):  # fmt: skip
        changed = {**content, "sources": [{**content["sources"][0], **change}]}
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        problems = verify.check(tmp_path, contents=True)
        assert any(expected in problem for problem in problems), problems


def test_verify_in_tasks_and_processes_finds_what_one_process_finds(tmp_path, capsys):
    manifest = write_corpus(tmp_path, [made_rows(20, 8, n) for n in range(7)])
    for number in (2, 5):
        path = tmp_path / manifest.sources[0].train[number].file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    seen = []
    alone = verify.check(tmp_path, contents=True, progress=seen.append)
    assert len(alone) >= 2 and len(seen) == 7
    assert verify.check(tmp_path, contents=True, num_workers=2) == alone
    tasks = [verify.check(tmp_path, contents=True, task=task, num_tasks=3) for task in range(3)]
    assert sorted(problem for task in tasks for problem in task) == sorted(alone)
    codes = [
        main(["verify", str(tmp_path), "--num_workers", "1", "--task", str(i), "--num_tasks", "3"]) for i in range(3)
    ]
    assert codes == [0, 0, 1]  # shards 2 and 5 are both of task 2
    assert "the 3 shards of task 0 match" in capsys.readouterr().out
    assert main(["verify", str(tmp_path), "--task", "3", "--num_tasks", "3"]) == 2


def test_no_held_out_document_is_lost(tmp_path, tokenizer_dir, tokenizer, tales):
    """With many small units and a small fraction, all held-out tokens are in rows."""
    path = write_jsonl(tmp_path / "a.jsonl", tales)
    settings = config(tmp_path, tokenizer_dir, [path], seq_len=512, validation_fraction=0.02, unit_mb=0.02)
    manifest = prepare(settings, progress=False)
    assert manifest is not None
    held_out = [text for text in tales if is_validation(text, 0.02)]
    read = shards.ShardedRows(tmp_path / "out", manifest.sources[0].validation)
    rows = [read.row(i) for i in range(len(read))]
    found = [ids[: lengths.sum()] for ids, lengths in rows]
    expected = [[*tokenizer.encode(text, add_special_tokens=False), 0] for text in held_out]
    assert sum(map(len, found)) == sum(map(len, expected))
    assert sorted(np.concatenate(found).tolist()) == sorted(np.concatenate(expected).tolist())
    assert len(manifest.sources[0].validation) > 2
    assert verify.check(tmp_path / "out", contents=True) == []


def test_an_id_that_the_stored_type_cannot_hold_is_an_error_and_does_not_wrap(tmp_path):
    settings = RowSettings("concat", 4, "uint16", 0, FINGERPRINT, 1)
    writer = SplitWriter(tmp_path, "s", 0, "train", settings)
    writer.add(np.array([65535, 0]), np.array([2]))
    for wrong in (70_001, -1):
        with pytest.raises(ValueError, match="do not fit uint16"):
            writer.add(np.array([1, wrong]), np.array([2]))
