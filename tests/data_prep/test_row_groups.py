"""Parquet is read by row groups, in memory that does not grow with them, nor with what one line or value weighs."""

import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from reading import read_unit

TEXTS = [f"{i} {'x' * (i % 7 * 10)}" for i in range(100)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    path = tmp_path_factory.mktemp("groups") / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": TEXTS, "n": range(100)}), path, row_group_size=9)
    return path


@given(cuts=st.lists(st.integers(0, 12), max_size=4))
def test_ranges_of_row_groups_give_each_row_once_and_in_order(groups, cuts):
    ends = [*sorted(cuts), 12]
    found = []
    for start, end in zip([0, *ends], ends):
        found += read_unit([groups], start, end)[0]
    assert found == TEXTS


def test_a_range_is_of_row_groups(groups):
    assert read_unit([groups], 2, 3)[0] == TEXTS[18:27]
    assert read_unit([groups], 11)[0] == TEXTS[99:]


def texts_of(text_type: pa.DataType) -> pa.Array:
    array = pa.array(["short", "x" * 1001, None, "y" * 1000, "", "short"])
    return array.dictionary_encode() if text_type == "dictionary" else array.cast(text_type)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"], ids=str)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_longer_values_than_allowed_are_counted(tmp_path, name, kind, nested):
    array = texts_of(kind)
    table = pa.table({"text": pa.StructArray.from_arrays([array], ["in"]) if nested else array})
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    field = "text.in" if nested else "text"
    found, tally = read_unit([path], text_field=field, max_bytes=1001)
    assert found == ["short", "x" * 1001, "y" * 1000, "short"]
    assert tally.bad == {"text is not a string": 1} and tally.filtered == {"empty": 1}
    found, tally = read_unit([path], text_field=field, max_bytes=1000)
    assert found == ["short", "y" * 1000, "short"]
    assert tally.bad == {"longer than max_document_mb": 1, "text is not a string": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_rows_that_are_not_utf8_are_counted_one_by_one_in_any_column(tmp_path, name):
    raw = pa.Array.from_buffers(pa.string(), 4, pa.array([b"good", b"\xff", b"fine", b"last"]).buffers())
    other = pa.Array.from_buffers(pa.string(), 4, pa.array([b"a", b"b", b"\xfe", b"d"]).buffers())
    table = pa.table({"text": raw, "other": other})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    found, tally = read_unit([tmp_path / name])
    assert found == ["good", "fine", "last"] and tally.bad == {"not UTF-8": 1} and not tally.damaged
    found, tally = read_unit([tmp_path / name], filters={"other": "!= d"})
    assert found == ["good"] and tally.bad == {"not UTF-8": 2} and tally.filtered == {"other is not wanted": 1}


PEAK = """
import sys
sys.path.insert(0, "tests/data_prep")
from reading import read_unit
from data_prep import documents
from data_prep.config import SourceConfig
from data_prep.inputs.document import Tally
from data_prep.inputs.listing import InputFile
from data_prep.work_list import Unit
def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
path, limit = sys.argv[1], int(sys.argv[2])
before = peak()
count = 0
tally = Tally()
unit = Unit("s", 0, (InputFile(path, 0, ""),), 0, -1, 0)
for document in documents.read(unit, SourceConfig("s", [path]), tally, limit << 20):
    count += 1
print(peak() - before, count, tally.bad.total())
"""


def peak_of_reading(path, limit: int) -> tuple[int, int, int]:
    """(MB that the reading adds to a process, documents, bad ones)."""
    command = [sys.executable, "-c", PEAK, str(path), str(limit)]
    outcome = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=300)
    assert outcome.returncode == 0, outcome.stderr
    return tuple(map(int, outcome.stdout.split()))


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_row_group_of_300_mb_takes_little_memory(tmp_path, compression):
    rng = random.Random(1)
    texts = [rng.randbytes(1500).hex() for _ in range(1000)]
    table = pa.table({"text": [f"{i} {texts[i % 1000]}" for i in range(100_000)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression=compression, row_group_size=1 << 20)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    peak, count, bad = peak_of_reading(path, 256)
    assert (count, bad) == (100_000, 0)
    assert peak < 80, peak


@pytest.mark.slow
def test_a_line_beyond_the_limit_is_never_in_memory_as_a_whole(tmp_path):
    """300 MB at a limit of 32."""
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        file.write('{"text": "')
        for i in range(300):
            file.write(f"{i} ".ljust(1_000_000, "x"))
        file.write('"}\n' + json.dumps({"text": "good"}) + "\n")
    peak, count, bad = peak_of_reading(path, 32)
    assert (count, bad) == (1, 1)
    assert peak < 60, peak
