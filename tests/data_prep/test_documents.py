import gzip
import json
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


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    with pytest.raises(UserError, match="no column 'body'; it has id, text, lang"):
        read_all([write(tmp_path, "a.parquet")], text_field="body")
