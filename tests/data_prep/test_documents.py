import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep import documents
from data_prep.config import SourceConfig, UserError

TEXTS = ["one", "zwei\nLinien", "trois é", "four 四"]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read_all(paths: list[Path], unit_bytes: int = 1 << 20, field: str = "text") -> tuple[list[str], Counter]:
    skipped: Counter = Counter()
    units = documents.units(SourceConfig("s", [str(p) for p in paths], field), unit_bytes)
    return [text for unit in units for text in documents.read(unit, skipped)], skipped


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({"id": range(4), "text": TEXTS}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(JSONL))
    elif name.endswith(".zst"):
        half = len(JSONL) // 2  # two frames, as parallel compressors write
        path.write_bytes(zstandard.compress(JSONL[:half]) + zstandard.compress(JSONL[half:]))
    else:
        path.write_bytes(JSONL)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    assert read_all([write(tmp_path, name)]) == (TEXTS, Counter())


def test_text_files_are_one_document_each(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert read_all([tmp_path / "*.txt"]) == (TEXTS, Counter())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20), st.integers(1, 200))
def test_byte_ranges_give_each_line_once_and_in_order(tmp_path_factory, texts, unit_bytes):
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    found, skipped = read_all([path], unit_bytes)
    assert found == [text for text in texts if text.strip()]
    assert skipped["empty"] == sum(not text.strip() for text in texts)


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
    found, skipped = read_all([path])
    assert found == ["good"]
    assert skipped == {
        "text is not a string": 1,
        "empty": 1,
        "no field 'text'": 2,
        "not JSON": 1,
        "not UTF-8": 1,
    }


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, name):
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=name):
        read_all([path])


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*nothing\.jsonl"):
        read_all([tmp_path / "nothing.jsonl"])
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match="unknown kind of file"):
        read_all([tmp_path / "a.docx"])
    with pytest.raises(UserError, match="no column 'body'; it has id, text"):
        read_all([write(tmp_path, "a.parquet")], field="body")
    with pytest.raises(UserError, match="named twice"):
        read_all([write(tmp_path, "a.jsonl"), tmp_path / "*.jsonl"])
