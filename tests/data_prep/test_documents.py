import glob
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data_prep import documents, work_list
from data_prep.config import SourceConfig
from data_prep.inputs import listing
from data_prep.inputs.document import Tally

TEXTS = ["one", "zwei\nLinien", "trois é", "four 四"]
LANGUAGES = ["en", "de", "fr", "en"]
JSONL = "".join(json.dumps({"text": t, "lang": lang}) + "\n" for t, lang in zip(TEXTS, LANGUAGES)).encode()
FORMATS = ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "stream.arrow", "file.arrow"]


def read_all(paths: list[Path], unit_bytes: int = 1 << 20, **settings) -> tuple[list[str], Tally]:
    tally, source = Tally(), SourceConfig("s", [str(p) for p in paths], **settings)
    return [text for unit in work_list.units(source, unit_bytes) for text in documents.read(unit, source, tally)], tally


def write(folder: Path, name: str) -> Path:
    path = folder / name
    table = pa.table({"id": range(4), "text": TEXTS, "lang": LANGUAGES})
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        new = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(JSONL))
    elif name.endswith(".zst"):
        half = len(JSONL) // 2  # two frames, as parallel compressors write
        path.write_bytes(zstandard.compress(JSONL[:half]) + zstandard.compress(JSONL[half:]))
    else:
        path.write_bytes(JSONL)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    assert read_all([write(tmp_path, name)]) == (TEXTS, Tally())


@pytest.mark.parametrize("name", FORMATS)
def test_filters_and_minimum_length_drop_documents_and_count_them(tmp_path, name):
    texts, tally = read_all([write(tmp_path, name)], filters={"lang": ["en", "fr"]}, min_characters=5)
    assert texts == ["trois é", "four 四"]
    assert tally.filtered == {"shorter than 5 characters": 1, "lang is not wanted": 1} and not tally.bad


def test_a_dotted_filter_looks_into_nested_records(tmp_path):
    lines = [{"text": "a", "meta": {"licence": "MIT"}}, {"text": "b", "meta": {"licence": "GPL"}}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts, tally = read_all([tmp_path / "a.jsonl"], filters={"meta.licence": ["MIT"]})
    assert texts == ["a"] and tally.filtered == {"meta.licence is not wanted": 2}


def test_a_folder_a_list_a_glob_and_a_url_give_the_same_documents(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "b/README.md", "b/deep/3.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name)
    folder, _ = read_all([tmp_path / "b"])
    assert folder == TEXTS * 3
    listing = tmp_path / "list.txt"
    listing.write_text(f"# two of them\n{tmp_path}/b/2.jsonl\n\n{tmp_path}/b/1.jsonl.gz\n")
    assert read_all([f"@{listing}"])[0] == TEXTS * 2
    assert read_all([tmp_path / "b" / "**" / "*.jsonl"])[0] == TEXTS
    for url in (f"file://{tmp_path}/b/2.jsonl", f"file://{tmp_path}/b/deep", f"file://{tmp_path}/b/*.gz"):
        assert read_all([url], unit_bytes=50)[0] == TEXTS


def test_a_saved_hugging_face_dataset_is_read_without_its_json_files(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "n": range(4)}).save_to_disk(tmp_path / "saved", num_shards=2)
    assert read_all([tmp_path / "saved"]) == (TEXTS, Tally())


def test_a_glob_on_a_remote_file_system_is_read():
    """With fsspec's in-memory file system, which needs no network."""
    import fsspec

    with fsspec.open("memory://bucket/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(JSONL))
    assert read_all(["memory://bucket/*.gz"])[0] == TEXTS
    with pytest.raises(UserError, match="nothing"):
        read_all(["memory://bucket/nothing.jsonl"])


def names_of(*paths: str) -> list[str]:
    """The files of a source with these paths, in the order of its work list."""
    return [name for names in listing.expand(SourceConfig("s", list(paths))) for name in names]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """The working folder: `data` with hidden files and links, and a second folder that it links to."""
    for name in ("data/b.jsonl", "data/a.jsonl.gz", "data/.hidden.jsonl", "data/.dot/c.jsonl", "data/deep [1]/d.txt",
                 "data/README.md", "data/state.json", "elsewhere/e.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JSONL)
    (tmp_path / "data" / "link.jsonl").symlink_to("b.jsonl")
    (tmp_path / "data" / "broken.jsonl").symlink_to("nowhere.jsonl")
    (tmp_path / "data" / "linked").symlink_to("../elsewhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["data", "./data", "data/", "data/.", "elsewhere/../data"])
def test_a_folder_gives_what_python_lists_sorted_and_as_relative_as_it_was_named(tree, path):
    """Hidden files and links to files included; linked folders, broken links and other kinds not."""
    expected = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and p.suffix not in (".md", ".json"))
    assert names_of(path) == expected
    assert [os.path.basename(p) for p in expected] == [
        "c.jsonl", ".hidden.jsonl", "a.jsonl.gz", "b.jsonl", "d.txt", "link.jsonl",
    ]  # fmt: skip
    absolute = names_of(str(tree / "data"))
    assert absolute == [str(tree / "data" / Path(p).relative_to(Path(path))) for p in expected]


@pytest.mark.parametrize("pattern", ["data/*.jsonl", "./data/**/*.jsonl", "data/*/*.jsonl", "data/.*", "data/[a-b]*"])
def test_a_pattern_gives_what_pythons_glob_gives(tree, pattern):
    """No hidden files unless named, and linked folders are entered."""
    assert names_of(pattern) == sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))


def test_a_file_keeps_the_path_that_the_user_wrote(tree):
    for path in ("data/b.jsonl", "./data/b.jsonl", "data/link.jsonl", str(tree / "data" / "b.jsonl")):
        (unit,) = work_list.units(SourceConfig("s", [path]), 1 << 20)
        assert [file.path for file in unit.files] == [path]
    assert names_of("data/deep [1]") == ["data/deep [1]/d.txt"]


@pytest.mark.parametrize(
    "path", ["", "data/broken.jsonl", "data/none.jsonl", "data/b.jsonl/", "none/*", "elsewhere/*.gz"]
)
def test_a_path_without_files_is_an_error_that_names_it(tree, path):
    with pytest.raises(UserError, match=f"no file matches '{path.replace('*', '[*]')}'"):
        names_of(path)


def test_the_work_list_depends_on_the_files_names_and_sizes_and_not_on_their_folder(tree, tmp_path):
    """The same files elsewhere, named by a URL or absolutely, are the same units."""
    here = [work_list.unit_key(unit) for unit in work_list.units(SourceConfig("s", ["data/deep [1]", "elsewhere"]), 60)]
    urls = [str(tree / "data" / "deep [1]"), f"file://{tree}/elsewhere/e.jsonl"]
    there = [work_list.unit_key(unit) for unit in work_list.units(SourceConfig("s", urls), 60)]
    assert here == there and len(here) == 1 + -(-len(JSONL) // 60)
    (tree / "elsewhere" / "e.jsonl").write_bytes(JSONL.replace(b"one", b"two"))


def test_a_file_written_again_has_another_stamp(tree):
    before = listing.look_at("elsewhere/e.jsonl")
    (tree / "elsewhere" / "e.jsonl").write_bytes(JSONL.replace(b"one", b"two"))
    after = listing.look_at("elsewhere/e.jsonl")
    assert (before.path, before.size) == (after.path, after.size) and before.stamp != after.stamp


def test_text_files_are_one_document_each(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert read_all([tmp_path / "*.txt"]) == (TEXTS, Tally())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20), st.integers(1, 200))
def test_byte_ranges_give_each_line_once_and_in_order(tmp_path_factory, texts, unit_bytes):
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    found, tally = read_all([path], unit_bytes)
    assert found == [text for text in texts if text and not text.isspace()]
    assert tally.filtered["empty"] == sum(not text or text.isspace() for text in texts) and not tally.bad


def test_what_cannot_be_used_is_counted_by_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": 5}',
        b'{"text": " \\n"}',
        b'{"other": "x"}',
        b"{broken",
        b'{"text": "\xff"}',
        b"[1]",
    ]
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    found, tally = read_all([path])
    assert found == ["good"]
    assert tally.bad == {
        "text is not a string": 1,
        "no field 'text'": 2,
        "not JSON: Expecting property name enclosed in double quotes": 1,
        "not UTF-8": 1,
    }
    assert tally.filtered == {"empty": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "stream.arrow", "file.arrow"])
def test_a_truncated_file_is_named(tmp_path, name):
    """What could be read of it is used, and the files after it."""
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-20])
    found, tally = read_all([path, write(tmp_path, "good.jsonl")])
    assert found[-4:] == TEXTS and found[:-4] == TEXTS[: len(found) - 4]
    assert not tally.bad and len(tally.damaged) == 1 and tally.damaged[0].startswith(str(path))


def test_errors_name_the_path_or_column_that_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*nothing\.jsonl"):
        read_all([tmp_path / "nothing.jsonl"])
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match="unknown kind of file"):
        read_all([tmp_path / "a.docx"])
    with pytest.raises(UserError, match="no column 'body'; it has id, text, lang"):
        read_all([write(tmp_path, "a.parquet")], text_field="body")
    with pytest.raises(UserError, match="named twice"):
        read_all([write(tmp_path, "a.jsonl"), tmp_path / "*.jsonl"])
