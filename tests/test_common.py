"""The ground floor: command lines, the log, files that appear whole, and settings."""

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from common import files
from common.cli import command, make_parser, resumable_command
from common.config import check_bounds, fixed_settings, load_config, save_config, setting, walk
from common.errors import UserError
from common.files import atomic_folder, force_to_disk, sha256_of, write_atomically
from common.log import log, set_up_logging, this_rank

CONTINUES = "; finished work is kept, and the same command continues from there"


@pytest.fixture(autouse=True)
def restored_log():
    """A command sets the project's log up; other tests find it as it was."""
    before = log.handlers[:], log.level
    yield
    log.handlers[:], _ = before
    log.setLevel(before[1])


def raising(error: BaseException | None):
    def main(argv: list[str] | None = None) -> int:
        """What it does."""
        if error:
            raise error
        return len(argv or [])

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 3, ""),
        (UserError("x is 3, expected 4"), 2, "error: x is 3, expected 4\n"),
        (OSError(28, "No space left on device", "f"), 1, "error: [Errno 28] No space left on device: 'f'{hint}\n"),
        (KeyboardInterrupt(), 130, "error: interrupted{hint}\n"),
    ],
    ids=["fine", "user", "machine", "interrupted"],
)
@pytest.mark.parametrize(("decorate", "hint"), [(command, ""), (resumable_command, CONTINUES)])
def test_how_a_command_ends(decorate, hint, error, code, line, capsys):
    main = decorate(raising(error))
    if isinstance(error, OSError) and not hint:  # what did not fail by the user's doing keeps its traceback
        with pytest.raises(OSError, match="No space"):
            main([])
        return
    assert main(["a", "b", "c"]) == code
    printed = capsys.readouterr()
    assert printed.err == line.format(hint=hint) and printed.out == ""


def test_our_own_mistakes_keep_their_traceback():
    for decorate in (command, resumable_command):
        with pytest.raises(ZeroDivisionError):
            decorate(raising(ZeroDivisionError()))([])


@pytest.mark.parametrize(("rank", "line"), [("0", "error: wrong\n"), ("1", ""), ("7", "")])
def test_of_all_ranks_that_raise_the_same_error_the_first_speaks(rank, line, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    assert command(raising(UserError("wrong")))([]) == 2
    assert capsys.readouterr().err == line


def test_a_command_keeps_its_name_and_description():
    main = command(raising(None))
    assert main.__name__ == "main" and main.__doc__ == "What it does."


def test_a_help_page_shows_the_docstring_as_it_is_written(capsys):
    with pytest.raises(SystemExit) as end:
        make_parser("python -m tools.x", "First line.\n\n    indented\n").parse_args(["--help"])
    assert end.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: python -m tools.x") and "First line.\n\n    indented\n" in page


def test_the_log_has_a_prefix_from_warnings_on_and_errors_go_to_stderr(capsys):
    set_up_logging()
    log.debug("unseen")
    log.info("step %d", 3)
    log.warning("step %d is not saved", 4)
    log.error("it failed")
    printed = capsys.readouterr()
    assert printed.out == "step 3\nwarning: step 4 is not saved\n" and printed.err == "error: it failed\n"


def test_other_ranks_are_heard_only_when_something_failed(capsys, monkeypatch):
    set_up_logging()
    monkeypatch.setenv("RANK", "2")
    assert this_rank() == 2
    for say in (log.info, log.warning, log.error):
        say("here")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "error: here\n"
    monkeypatch.delenv("RANK")
    assert this_rank() == 0


def test_setting_the_log_up_twice_changes_nothing(capsys):
    set_up_logging()
    set_up_logging()
    log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_the_log_leaves_other_libraries_alone():
    set_up_logging()
    assert not any(handler in logging.getLogger().handlers for handler in log.handlers)


class Crash(Exception):
    pass


def test_a_file_is_written_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_crash_in_between_leaves_the_old_file(tmp_path, monkeypatch, at):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def crash(*args):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(files.os, at, crash)
        with pytest.raises(Crash):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_its_content_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: done.append(("fsync", os.fstat(handle).st_size)))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append(("replace", b)), replace(a, b)))
    write_atomically(path, b"12345")
    assert done == [("fsync", 5), ("replace", path)]


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_a_folder_appears_as_a_whole(tmp_path, there):
    target = tmp_path / "out"
    if there == "an empty folder":
        target.mkdir()
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not (target / "a").exists()
    assert (target / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_after_an_error_nothing_is_at_its_place_and_what_is_left_does_no_harm(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(Crash), atomic_folder(target) as folder:
        (folder / "half").write_text("1")
        raise Crash
    assert not target.exists()
    with atomic_folder(target) as folder:
        assert list(folder.iterdir()) == []
        (folder / "whole").write_text("1")
    assert [p.name for p in target.iterdir()] == ["whole"]


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("keep")
    with pytest.raises(OSError, match="not empty"), atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    assert [p.name for p in target.iterdir()] == ["mine"]


def test_sha256_of_a_file(tmp_path):
    for size in (0, 1, 1 << 20):
        content = os.urandom(size)
        (tmp_path / "a").write_bytes(content)
        assert sha256_of(tmp_path / "a") == sha256_of(str(tmp_path / "a")) == hashlib.sha256(content).hexdigest()


def test_files_and_folders_are_forced_to_disk_and_their_handles_closed(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("1")
    forced = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: forced.append((handle, os.fstat(handle).st_ino)))
    force_to_disk(path)
    force_to_disk(tmp_path)
    assert [inode for _, inode in forced] == [path.stat().st_ino, tmp_path.stat().st_ino]
    for handle, _ in forced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)
    with pytest.raises(FileNotFoundError):
        force_to_disk(tmp_path / "nowhere")


@dataclass
class Inner:
    rate: float = setting(0.5, above=0, at_most=1)
    many: list[float] = setting([0.1], above=0, below=1)
    names: dict[str, int] = setting({"a": 1})
    limit: int | None = setting(None, at_least=2)
    how: Literal["slow", "fast"] = setting("slow", formerly="inner.speed")


@dataclass
class Free:
    limit: int | None = setting(None, at_least=2)


@dataclass
class Outer:
    place: str = setting("here", may_change=True)
    count: int = setting(3, formerly="number")
    inner: Inner = setting(Inner)
    free: Free = setting(Free, may_change=True)


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("count: 5\ninner: {rate: 0.25, limit: 9}\n")
    found = load_config(Outer, path, ["inner.rate=0.75", "place=there"])
    assert (found.count, found.inner.rate, found.inner.limit, found.place) == (5, 0.75, 9, "there")
    assert found.inner.how == "slow" and load_config(Outer, None) == Outer()
    assert load_config(Outer, path, ["count=6", "count=7"]).count == 7  # the last one counts


def test_what_is_saved_is_what_is_loaded(tmp_path):
    config = load_config(Outer, None, ["inner.many=[0.2, 0.3]", "inner.names={b: 2}", "inner.limit=4", "place=a, b"])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(Outer, tmp_path / "c.yaml") == config


@dataclass
class Texts:
    place: str = "here"
    many: list[str] = setting([])
    names: dict[str, Any] = setting({})


def test_dollars_are_text_where_nothing_is_interpolated_but_the_environment_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/here")
    path = tmp_path / "c.yaml"
    lines = ["${oc.env:PLACE}/a", "/b/${x}/${c", r"\${d}", "$e", "${oc.env:PLACE}/${f:g}"]
    path.write_text("place: '${place}'\nmany: [" + ", ".join(f"'{text}'" for text in lines) + "]\n")
    found = load_config(Texts, path, ["names.z=${h}"], interpolate=False)
    assert (found.place, found.names) == ("${place}", {"z": "${h}"})
    assert found.many == ["/here/a", "/b/${x}/${c", "${d}", "$e", "/here/${f:g}"]
    with pytest.raises(UserError, match=r"count: Value '\$\{c\}' of type 'str' could not be converted to Integer"):
        load_config(Outer, None, ["count=${c}"], interpolate=False)
    monkeypatch.delenv("PLACE")
    with pytest.raises(UserError, match="Environment variable 'PLACE' not found"):
        load_config(Texts, path, interpolate=False)


def test_instances_do_not_share_their_defaults():
    one, other = Outer(), Outer()
    one.inner.rate = 0.1
    one.inner.many.append(0.2)
    one.inner.names["b"] = 2
    assert other == Outer() and other.inner.many == [0.1] and other.inner.names == {"a": 1}


def test_walk_names_every_setting_once_in_order():
    assert [(name, value) for name, _, value in walk(Outer())] == [
        ("place", "here"), ("count", 3),
        ("inner.rate", 0.5), ("inner.many", [0.1]), ("inner.names", {"a": 1}), ("inner.limit", None),
        ("inner.how", "slow"),
        ("free.limit", None),
    ]  # fmt: skip
    assert all(f.name == name.rpartition(".")[2] for name, f, _ in walk(Outer()))


def test_what_a_resumed_run_must_not_change_leaves_out_what_may_change_and_sections_that_may():
    assert list(fixed_settings(Outer())) == ["count", *(f"inner.{name}" for name in Inner.__dataclass_fields__)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rate=0", "inner.rate is 0.0, expected more than 0 and at most 1"),
        ("inner.rate=1.5", "inner.rate is 1.5, expected more than 0 and at most 1"),
        ("inner.many=[0.5, 1]", "inner.many is [0.5, 1.0], expected more than 0 and less than 1"),
        ("free.limit=1", "free.limit is 1, expected 2 or more"),
    ],
)
def test_what_lies_outside_its_bounds_is_named_with_them(override, message):
    with pytest.raises(UserError) as error:
        check_bounds(load_config(Outer, None, [override]))
    assert str(error.value) == message


@pytest.mark.parametrize("override", ["inner.rate=1", "inner.many=[]", "inner.limit=null", "inner.limit=2"])
def test_bounds_hold_their_edges_empty_lists_and_null(override):
    check_bounds(load_config(Outer, None, [override]))


def test_a_renamed_key_works_in_files_and_on_the_command_line(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    path.write_text("number: 8\ninner: {speed: fast}\n")
    with caplog.at_level("WARNING", log.name):
        found = load_config(Outer, path)
        assert (found.count, found.inner.how) == (8, "fast")
        assert load_config(Outer, None, ["inner.speed=fast"]).inner.how == "fast"
    assert caplog.messages == [
        f"{path}: number is now called count",
        f"{path}: inner.speed is now called inner.how",
        "inner.speed is now called inner.how",
    ]
    path.write_text("inner: {speed: fast, how: slow}\n")
    with pytest.raises(UserError, match=r"both inner\.speed and inner\.how are set; inner\.speed is the old name"):
        load_config(Outer, path)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, [], "no configuration file at "),
        ("inner: {rates: 1}", [], "unknown key 'inner.rates'; known here: rate, many, names, limit, how"),
        ("count: x", [], "'x' of type 'str' could not be converted to Integer"),
        ("- 1", [], "expected `key: value` lines at the top level"),
        ("a: [", [], "is not valid YAML"),
        ("{}", ["count"], "override 'count': expected key=value"),
        ("{}", ["counts=1"], "override 'counts=1': unknown key 'counts'"),
        ("{}", ["inner.how=other"], "override 'inner.how=other'"),
    ],
)
def test_errors_are_one_line_that_names_file_and_key(tmp_path, text, overrides, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(Outer, path, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert overrides or str(path) in str(error.value)
