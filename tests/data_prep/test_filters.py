"""What a source wants: conditions on columns, nested ones too, and a hook in Python."""

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from reading import read_unit

from common.errors import UserError
from data_prep.config import PrepareConfig, SourceConfig, check_prepare
from data_prep.inputs import filters

RECORDS = [
    {"text": "a", "score": 2, "meta": {"licence": "MIT", "year": 2019}},
    {"text": "b", "score": 3, "meta": {"licence": "unknown", "year": 2020}},
    {"text": "c", "score": 3.5, "meta": {"licence": "GPL", "year": None}},
    {"text": "d", "score": None, "meta": {"licence": None, "year": 2021}},
]
KINDS = ["a.jsonl", "a.parquet", "a.arrow"]


def write(folder: Path, name: str, records: list[dict] = RECORDS) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path
    table = pa.Table.from_pylist(records)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"score": ">= 3"}, "bc"),
        ({"score": ">3"}, "c"),
        ({"score": " < 3.5 "}, "ab"),
        ({"score": "<= 2e0"}, "a"),
        ({"score": "== 3"}, "b"),
        ({"score": "!= 3"}, "ac"),  # where there is none, nothing is known to differ
        ({"score": 3}, "b"),
        ({"score": [2, 3.5]}, "ac"),
        ({"score": [None, 2]}, "ad"),
        ({"meta.licence": "MIT"}, "a"),
        ({"meta.licence": "!= unknown"}, "ac"),
        ({"meta.licence": "> H"}, "ab"),
        ({"meta.licence": ">= 3"}, ""),  # no number
        ({"meta.year": ">= 2020", "score": "> 0"}, "b"),
        ({"meta.licence": ["MIT", "GPL"], "score": "> 2"}, "c"),
        ({"meta.licence": "M"}, ""),  # not a part of a text
    ],
)
def test_conditions_choose_records_of_every_kind(tmp_path, name, wanted, expected):
    found, tally = read_unit([write(tmp_path, name)], filters=wanted)
    assert "".join(found) == expected
    assert tally.filtered.total() == 4 - len(expected) and not tally.bad
    assert set(tally.filtered) <= {f"{key} is not wanted" for key in wanted}


@given(st.sampled_from([">=", "<=", ">", "<", "==", "!="]), st.floats(allow_nan=False, allow_infinity=False),
       st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none(), st.lists(st.integers())))  # fmt: skip
def test_a_comparison_with_a_number_is_that_of_numbers(sign, number, value):
    passes = filters.compile_filters({"n": f"{sign} {number!r}"})["n"](value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number:
        expected = {">=": value >= number, "<=": value <= number, ">": value > number, "<": value < number,
                    "==": value == number, "!=": value != number}[sign]  # fmt: skip
    else:
        is_same_text = value == repr(number)
        expected = {"==": is_same_text, "!=": value is not None and not is_same_text}.get(sign, False)
    assert passes == expected


def test_true_is_not_one_and_text_is_not_a_number():
    test = filters.compile_filters({"a": 1, "b": True, "c": "1", "d": [0, "x"]})
    assert [test["a"](v) for v in (1, 1.0, True, "1", None)] == [True, True, False, False, False]
    assert [test["b"](v) for v in (True, 1, False)] == [True, False, False]
    assert [test["c"](v) for v in ("1", 1)] == [True, False]
    assert [test["d"](v) for v in (0, False, "x", "xx", math.nan)] == [True, False, True, False, False]


def settings_of(**source) -> PrepareConfig:
    return PrepareConfig([SourceConfig("s", ["a.jsonl"], **source)], "t", seq_len=8, output_dir="o")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"n": ">="}, "filters.n is '>=', expected a value, a list of values, or a comparison such as '>= 3'"),
        ({"n": "=> 3"}, "filters.n is '=> 3', expected a value"),
        ({"n": "= 3"}, "filters.n is '= 3', expected"),
        ({"n": "<> 3"}, "filters.n is '<> 3', expected"),
        ({"n": {"a": 1}}, "filters.n is {'a': 1}, expected"),
        ({"n": []}, "filters.n is [], expected a list of one or more values"),
        ({"n": [[1]]}, "filters.n is [[1]], expected a list of one"),
        ({"n": [">= 3", "< 5"]}, "filters.n has '>= 3' in a list"),
        ({"": 3}, "filters has the key ''"),
    ],
)
def test_filters_that_mean_nothing_are_refused_before_anything_is_read(wanted, message):
    with pytest.raises(UserError) as caught:
        check_prepare(settings_of(filters=wanted))
    assert str(caught.value).startswith(f"source s: {message}")


def test_a_value_that_looks_like_an_operator_goes_into_a_list():
    test = filters.compile_filters({"a": ["<unk>", "=x"]})["a"]
    assert test("<unk>") and test("=x") and not test("unk>")


@pytest.mark.parametrize("name", KINDS)
def test_a_nested_text_is_read_and_a_column_that_is_not_there_is_an_error(tmp_path, name):
    records = [{"id": i, "data": {"body": {"text": text}, "n": i}} for i, text in enumerate(["x", "y", None])]
    path = write(tmp_path, name, records)
    found, tally = read_unit([path], text_field="data.body.text", filters={"data.n": "!= 1"})
    assert found == ["x"] and tally.bad == {"text is not a string": 1} and tally.filtered == {"data.n is not wanted": 1}
    if name != "a.jsonl":
        for settings in ({"text_field": "data.body.txt"}, {"text_field": "id", "filters": {"data.m": 1}}):
            with pytest.raises(UserError, match=r"no column 'data\..*'; it has id, data\.body\.text, data\.n"):
                read_unit([path], **settings)
    else:
        assert read_unit([path], text_field="data.text")[1].bad == {"no field 'data.text'": 3}


@pytest.mark.parametrize("name", KINDS)
def test_a_column_whose_name_has_a_dot_wins(tmp_path, name):
    path = write(tmp_path, name, [{"a.b": "exact", "a": {"b": "nested"}, "text": "-"}])
    assert read_unit([path], text_field="a.b")[0] == ["exact"]
    assert read_unit([path], filters={"a.b": "nested"})[0] == []


HOOK = """
def keep(record):
    return record["score"] is not None and record["meta"]["year"] != 2020 and record["text"] < "c"
def mute(record):
    pass
def fails(record):
    return record["nothing here"]
number = 5
"""


@pytest.fixture
def hooks(tmp_path, monkeypatch, request) -> str:
    """The name of a module in the current folder."""
    name = "hooks_" + hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    (tmp_path / f"{name}.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return name


@pytest.mark.parametrize("name", KINDS)
def test_a_hook_sees_each_record_whole_and_decides(tmp_path, hooks, name):
    path = write(tmp_path, name)
    check_prepare(settings_of(filter=f"{hooks}:keep"))
    found, tally = read_unit([path], filter=f"{hooks}:keep", filters={"score": ">= 1"})
    assert found == ["a"]
    assert tally.filtered == {f"hook {hooks}:keep": 2, "score is not wanted": 1}
    with pytest.raises(UserError, match=rf"{name}: filter {hooks}:fails raised KeyError: 'nothing here'"):
        read_unit([path], filter=f"{hooks}:fails")
    with pytest.raises(UserError, match=rf"filter {hooks}:mute returned NoneType, expected True or False"):
        read_unit([path], filter=f"{hooks}:mute")


def test_a_hook_that_cannot_be_used_is_refused_before_anything_is_read(hooks):
    for name, message in (
        ("keep", "expected module:function"),
        (f"{hooks}:", "expected module:function"),
        (f"{hooks}:nothing", "cannot be imported: AttributeError"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        (f"{hooks}:number", "is a int, expected a function"),
        ("time:time", "is in no file"),
    ):
        with pytest.raises(UserError, match=f"source s: filter .*{message}"):
            check_prepare(settings_of(filter=name))


def test_a_hook_is_given_a_long_text_file_too_unless_it_is_longer_than_a_document_may_be(tmp_path, hooks, monkeypatch):
    from data_prep.inputs import text

    (tmp_path / f"{hooks}.py").write_text("def keep(record): return record['text'].endswith('z')")
    (tmp_path / "a.txt").write_text("y" * 999 + "z")
    monkeypatch.setattr(text, "LONG_FILE_BYTES", 100)
    (document,), tally = read_unit([tmp_path / "a.txt"], filter=f"{hooks}:keep", max_bytes=1000)
    assert document.characters == 1000
    found, tally = read_unit([tmp_path / "a.txt"], filter=f"{hooks}:keep", max_bytes=999)
    assert not found and tally.bad == {"longer than max_document_mb": 1}
    assert len(read_unit([tmp_path / "a.txt"], max_bytes=999)[0]) == 1
    (tmp_path / "b.txt").write_text("é" * 500 + "z", encoding="utf-8")  # 501 characters, 1001 bytes
    assert len(read_unit([tmp_path / "b.txt"], filter=f"{hooks}:keep", max_bytes=1001)[0]) == 1
    found, tally = read_unit([tmp_path / "b.txt"], filter=f"{hooks}:keep", max_bytes=1000)
    assert not found and tally.bad == {"longer than max_document_mb": 1}


def test_the_recipe_changes_with_the_filters_and_with_the_hooks_source(tmp_path, hooks):
    source = SourceConfig("s", [], filters={"n": ">= 3"}, filter=f"{hooks}:keep")
    before = filters.recipe(source)
    assert json.loads(json.dumps(before)) == before
    assert filters.hook_source(source) == hashlib.sha256(HOOK.encode()).hexdigest()
    (tmp_path / f"{hooks}.py").write_text(HOOK + "# other")
    changed = [filters.recipe(source)]
    changed.append(filters.recipe(SourceConfig("s", [], filters={"n": ">= 4"}, filter=f"{hooks}:keep")))
    changed.append(filters.recipe(SourceConfig("s", [], filters={"n": ">= 3"}, filter=f"{hooks}:fails")))
    changed.append(filters.recipe(SourceConfig("s", [])))
    distinct = Counter(json.dumps(recipe, sort_keys=True) for recipe in [before, *changed])
    assert len(distinct) == 5
    assert filters.hook_source(SourceConfig("s", [])) == ""


@pytest.mark.slow
def test_a_hook_in_the_current_folder_filters_a_run_of_two_processes(tmp_path, tokenizer_dir, tales):
    (tmp_path / "my_filters.py").write_text("def is_long(record): return len(record['text']) > record['least']")
    lines = "".join(json.dumps({"text": text, "least": 500}) + "\n" for text in tales[:60])
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "config.yaml").write_text(
        "sources: [{name: s, paths: [a.jsonl], filter: my_filters:is_long}]\n"
        f"tokenizer: {tokenizer_dir}\nseq_len: 32\noutput_dir: out\nnum_workers: 2\nunit_mb: 0.01\n"
    )
    command = [sys.executable, "-m", "data_prep", "prepare", "config.yaml"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert outcome.returncode == 0, outcome.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    kept = sum(len(text) > 500 for text in tales[:60])
    assert 0 < kept < 60 and manifest["sources"][0]["documents"] == kept
    assert manifest["sources"][0]["filtered"] == {"hook my_filters:is_long": 60 - kept}
