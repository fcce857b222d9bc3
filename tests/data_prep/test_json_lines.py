"""What a line of JSONL may hold, and what is said of one that cannot be used; byte order marks; lines without end."""

import codecs
import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import read_unit

from data_prep.inputs import document, text

BOM = codecs.BOM_UTF8


@pytest.mark.parametrize(
    "value",
    ["NaN", "-Infinity", "1e999", "9" * 30, "9" * 5000, r'"\ud800"', '"\\ude00 \\ud83d"', "[" * 900 + "]" * 900],
)
def test_a_value_in_another_field_that_orjson_refuses_costs_no_document(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(f'{{"n": {value}, "text": "kept"}}\n' * 2)
    found, tally = read_unit([tmp_path / "a.jsonl"])
    assert found == ["kept"] * 2 and not tally.bad


def test_such_values_can_be_compared(tmp_path):
    numbers = ["NaN", "Infinity", "9" * 5000, "-" + "9" * 400, "5"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {n}, "text": "{i}"}}\n' for i, n in enumerate(numbers)))
    assert read_unit([tmp_path / "a.jsonl"], filters={"n": "> 3"})[0] == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON: Expecting"),
        (b"plain words", "not JSON: Expecting value"),
        (b'{"text": "a\tb"}', "not JSON: Invalid control character"),
        (b'{"text": "x"} {"text": "y"}', "not JSON: Extra data"),
        (b'{"n": ' + b"[" * 3000 + b"]" * 3000 + b', "text": "x"}', "not JSON: nested too deeply"),
        (rb'{"text": "half a pair: \ud83d"}', "lone surrogates"),
        (b'{"text": "\xed\xa0\xbd"}', "not UTF-8"),
        (b'{"n": NaN, "other": 1}', "no field 'text'"),
        (b"null", "no field 'text'"),
        (b'"text"', "no field 'text'"),
    ],
)
def test_a_line_that_cannot_be_used_has_a_reason_and_its_neighbours_are_read(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "\\ud83d\\ude00"}\n')
    found, tally = read_unit([tmp_path / "a.jsonl"])
    assert found == ["before", "\U0001f600"]
    assert tally.bad.total() == 1 and next(iter(tally.bad)).startswith(reason)


def test_reasons_are_few_whatever_the_lines_say(tmp_path):
    rng = random.Random(1)
    good = json.dumps({"text": 'a "b" \\ \n é', "n": [1, {"x": None}]}).encode()
    lines = []
    for _ in range(3000):
        line = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            line[rng.randrange(len(line))] = rng.choice(b'{}[]":,\\xu09 e\xff')
        lines.append(bytes(line))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, tally = read_unit([tmp_path / "a.jsonl"])
    assert len(found) + tally.bad.total() + tally.filtered.total() == 3000
    assert tally.bad.total() > 1000 and len(tally.bad) < 16


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "long.txt", "long.txt.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_document(tmp_path, monkeypatch, name):
    """Nor of its hash; one elsewhere stays."""
    first = "é\ufeff" + "x" * 50
    plain = first.encode() if "txt" in name else json.dumps({"text": first}).encode() + b'\n{"text": "second"}\n'
    if name.startswith("long"):
        monkeypatch.setattr(text, "LONG_FILE_BYTES", 10)
        for module in (text, document):
            monkeypatch.setattr(module, "BLOCK_BYTES", 2)

    def read(content: bytes) -> list[tuple[str, bytes, int]]:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        found, tally = read_unit([tmp_path / name])
        assert not tally.bad
        return [(d if isinstance(d, str) else "".join(d.blocks()), document.digest(d), len(d)) for d in found]

    assert read(BOM + plain) == read(plain)
    assert read(plain)[0][0] == first and read(plain)[0][2] == len(first)


def test_a_file_that_is_only_a_mark_is_empty(tmp_path):
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(BOM)
    found, tally = read_unit([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    assert not found and not tally.bad and tally.filtered == {"empty": 1}


def test_empty_documents_are_filtered_and_not_bad(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n\\t"}\n{"text": "x"}\n\n  \n')
    assert read_unit([tmp_path / "a.jsonl"])[0] == ["x"]
    _, tally = read_unit([tmp_path / "a.jsonl"])
    assert tally.filtered == {"empty": 2} and not tally.bad


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_longer_lines_than_allowed_are_counted_and_the_others_read_in_any_unit(
    tmp_path_factory, lengths, line_bytes, most, ends
):
    """Whatever part of a line is read at once, and wherever the units begin."""
    lines = [json.dumps({"text": f"{i}" + "x" * length}) for i, length in enumerate(lengths)]
    content = "\n".join(lines) + "\n" * ends
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "LINE_BYTES", line_bytes)
        found = []
        bad = 0
        for start in range(0, max(1, len(content)), 37):
            part, tally = read_unit([path], start, min(start + 37, len(content)), max_bytes=most)
            found += part
            bad += tally.bad["longer than max_document_mb"]
            assert tally.bad.total() == tally.bad["longer than max_document_mb"]
    assert found == [json.loads(line)["text"] for line in lines if len(line) <= most]
    assert bad == sum(len(line) > most for line in lines)
