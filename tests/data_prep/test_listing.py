"""Which files a source's paths name: folders, patterns, lists, links; what is left out is counted."""

import glob
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data_prep import documents, work_list
from data_prep.config import SourceConfig
from data_prep.inputs import listing
from data_prep.inputs.document import Tally
from data_prep.inputs.files import ReadFailed
from data_prep.inputs.kinds import kind

JSONL = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two", "three", "four"))


def listed(*paths: object) -> listing.Listing:
    return listing.list_files(SourceConfig("s", [str(path) for path in paths]))


def names_of(*paths: object) -> list[str]:
    """The files of a source with these paths, in order."""
    return [file.path for group in listed(*paths).groups for file in group]


def texts_of(*paths: object, unit_bytes: int = 1 << 20) -> list[str]:
    source = SourceConfig("s", [str(path) for path in paths])
    units = work_list.units(source, unit_bytes)
    return [text for unit in units for text in documents.read(unit, source, Tally())]


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JSONL)
    return folder


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """The working folder: `data` with hidden files and links, and a second folder that it links to."""
    put(tmp_path, "data/b.jsonl", "data/a.jsonl.gz", "data/.hidden.jsonl", "data/.dot/c.jsonl", "data/deep [1]/d.txt",
        "data/README.md", "data/state.json", "elsewhere/e.jsonl", "more/m.jsonl")  # fmt: skip
    (tmp_path / "data" / "link.jsonl").symlink_to("../more/m.jsonl")
    (tmp_path / "data" / "broken.jsonl").symlink_to("nowhere.jsonl")
    (tmp_path / "data" / "linked").symlink_to("../elsewhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["data", "./data", "data/", "data/.", "elsewhere/../data"])
def test_a_folder_gives_what_python_lists_sorted_and_as_relative_as_it_was_named(tree, path):
    """Hidden files, and links to files and folders, included; broken links and other kinds not, but counted."""
    walked = [Path(folder, name) for folder, _, names in os.walk(Path(path), followlinks=True) for name in names]
    expected = sorted(str(p) for p in walked if p.is_file() and p.suffix not in (".md", ".json"))
    assert names_of(path) == expected
    assert [os.path.basename(p) for p in expected] == [
        "c.jsonl", ".hidden.jsonl", "a.jsonl.gz", "b.jsonl", "d.txt", "link.jsonl", "e.jsonl",
    ]  # fmt: skip
    assert listed(path).ignored == {".md": 1, "state.json": 1, "broken link": 1}
    absolute = names_of(tree / "data")
    assert absolute == [str(tree / "data" / Path(p).relative_to(Path(path))) for p in expected]


def test_item_6_every_file_of_a_folder_is_read_or_counted(tmp_path):
    """The folder of data.md, of which the first version read one file and said nothing of the others."""
    put(tmp_path, "a.jsonl", "B.JSONL", "c.jsonl.bz2", "d.jsonl.xz", "e.json.gzip", "f.csv", "g.parq", "h.md")
    assert names_of(tmp_path) == [str(tmp_path / name) for name in ("B.JSONL", "a.jsonl", "c.jsonl.bz2", "d.jsonl.xz")]
    assert listed(tmp_path).ignored == {".csv": 1, ".json.gzip": 1, ".md": 1, ".parq": 1}


SUFFIXES = st.sampled_from(
    [".jsonl", ".JSON", ".ndjson", ".txt", ".txt.xz", ".parquet", ".Parquet.gz", ".arrow", ".bin", ".idx", ".ds",
     ".ds.index", ".ds.metadata", ".mds", ".mds.zstd", ".jsonl.GZ", ".csv", ".csv.gz", "", ".", ".md"]
)  # fmt: skip
STEMS = st.sampled_from(["a", "b", ".c", "index.json", "state", "state.json", "cache-1", "dataset_info.json"])
NAMES = st.builds(
    lambda folder, stem, suffix: folder + stem + suffix, st.sampled_from(["", "x/", "x/y/"]), STEMS, SUFFIXES
)


def belongs(path: Path) -> bool:
    """Whether a file is a part of another: an index, or what a library keeps beside its data."""
    name = str(path)
    beside = {p.name for p in path.parent.iterdir()}
    if path.name in ("state.json", "dataset_info.json"):
        return any(p.lower().endswith(".arrow") for p in beside)
    if path.name == "index.json":
        return any(p.name.endswith((".mds", ".mds.zstd")) for p in path.parent.rglob("*"))
    if name.endswith(".idx"):
        return path.with_suffix(".bin").name in beside
    if name.endswith(".mds.zstd"):
        return path.name[: -len(".zstd")] in beside
    return any(name.endswith(".ds" + s) and path.name[: -len(s)] in beside for s in (".index", ".metadata"))


@given(st.sets(NAMES, min_size=1))
def test_every_file_is_read_or_counted_or_belongs_to_another(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("any")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_dir():
            (folder / name).write_bytes(b"{}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    try:
        found = listed(folder)
        read, ignored = found.groups[0], found.ignored
    except UserError as error:  # nothing to read
        assert "no file matches" in str(error)
        read, ignored = [], Counter({"": sum(not belongs(path) for path in files)})
    assert len(read) + sum(ignored.values()) == sum(not belongs(path) for path in files)
    assert all(kind(file.path) and not belongs(Path(file.path)) for file in read)
    assert not [
        file.path for file in read if Path(file.path).name.startswith("cache-") and file.path.endswith(".arrow")
    ]


def test_many_suffixes_are_counted_together(tmp_path):
    put(tmp_path, "a.jsonl", *(f"log.{i}" for i in range(50)), "b.md", "c.md")
    ignored = listed(tmp_path).ignored
    assert ignored.pop("others") == 31 and sum(ignored.values()) == 21 and ignored[".md"] == 2


def test_links_to_folders_are_followed_once(tmp_path):
    """Also those that lead back up, or to what is there already; what they repeat is counted."""
    put(tmp_path, "data/2024/a.jsonl", "other/b.jsonl")
    for name, target in (
        ("data/2024/up", ".."),
        ("data/latest", "2024"),
        ("data/other", "../other"),
        ("other/round", "../data"),
    ):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "data" / "again.jsonl").symlink_to("2024/a.jsonl")
    found = listed(tmp_path / "data")
    assert [Path(file.path).relative_to(tmp_path / "data") for file in found.groups[0]] == [
        Path("2024/a.jsonl"), Path("other/b.jsonl"),
    ]  # fmt: skip
    assert found.ignored == {"link to a folder that is listed already": 3, "link to a file that is listed already": 1}


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    put(tmp_path, "a.jsonl", "closed/b.jsonl")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ReadFailed, match=r"cannot read .*closed: .*Permission denied"):
        listed(tmp_path)


def test_a_saved_hugging_face_dataset_is_the_files_that_its_state_lists(tmp_path):
    """And not the caches beside them."""
    import datasets

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(saved, num_shards=2)
    datasets.load_from_disk(saved).map(lambda row: {"text": row["text"] * 2})  # writes cache-*.arrow
    (saved / "old.arrow").write_bytes((saved / "data-00000-of-00002.arrow").read_bytes())
    assert list(saved.glob("cache-*.arrow"))
    for path in (saved, tmp_path, f"file://{saved}"):
        assert texts_of(path) == ["a", "b", "c"]
        assert listed(path).ignored == {"cache-*.arrow": 1, ".arrow that state.json does not list": 1}
    assert listed(saved / "data*.arrow").ignored == {} and len(names_of(saved / "data*.arrow")) == 2
    assert listed(saved / "*[!d].arrow").ignored == {"cache-*.arrow": 1}
    assert len(names_of(next(saved.glob("cache-*.arrow")))) == 1  # where the user names it
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state.json lists data-00001-of-00002.arrow, which is not there"):
        listed(saved)


def test_a_dataset_dict_is_refused_with_its_splits(tmp_path):
    import datasets

    split = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "dict")
    for path in (tmp_path / "dict", tmp_path, f"file://{tmp_path}/dict", tmp_path / "dict" / "**"):
        with pytest.raises(
            UserError, match=r"source s: .*dict holds a DatasetDict, of the splits train, test; .*dict/train\]"
        ):
            listed(path)
    assert texts_of(tmp_path / "dict" / "train") == ["a", "b"]


def test_token_files_are_found_with_what_belongs_to_them(tmp_path):
    put(tmp_path, "m/a.bin", "m/a.idx", "m/model.bin", "m/lone.idx", "d/b.ds", "d/b.ds.index", "d/b.ds.metadata",
        "d/b.ds.loss", "d/c.ds", "s/index.json", "s/t/index.json", "s/t/shard.0.mds", "s/t/shard.0.mds.zstd",
        "s/t/shard.1.mds.zstd", "j/index.json")  # fmt: skip
    found = listed(tmp_path)
    assert {os.path.relpath(file.path, tmp_path): kind(file.path) for file in found.groups[0]} == {
        "m/a.bin": "megatron", "d/b.ds": "datatrove", "s/t/shard.0.mds": "mds", "s/t/shard.1.mds.zstd": "mds",
        "j/index.json": "jsonl",
    }  # fmt: skip
    assert found.ignored == {".bin without .idx": 1, ".idx": 1, ".ds without .ds.index": 1}
    assert names_of(tmp_path / "d" / "b*") == [str(tmp_path / "d" / "b.ds")]
    with pytest.raises(UserError, match=r"model.bin: its index model.idx is not beside it"):
        listed(tmp_path / "m" / "model.bin")
    before = listing.look_at(str(tmp_path / "m" / "a.bin"))
    os.utime(tmp_path / "m" / "a.idx", ns=(1, 1))
    with pytest.raises(UserError, match="was written again"):
        listing.check_unchanged([before])


@pytest.mark.parametrize("pattern", ["data/*.jsonl", "./data/**/*.jsonl", "data/*/*.jsonl", "data/.*", "data/[a-b]*"])
def test_a_pattern_gives_what_pythons_glob_gives(tree, pattern):
    """No hidden files unless named, and linked folders are entered."""
    assert names_of(pattern) == sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))


def test_item_7_a_path_that_is_there_is_no_pattern(tmp_path):
    put(tmp_path, "part[1].jsonl", "part1.jsonl", "what?.jsonl", "what1.jsonl", "all*/a.jsonl", "allies/b.jsonl")
    for path in (tmp_path, f"file://{tmp_path}"):
        for name in ("part[1].jsonl", "what?.jsonl"):
            assert names_of(f"{path}/{name}") == [f"{path}/{name}"]
        assert names_of(f"{path}/all*") == [f"{path}/all*/a.jsonl"]
        assert names_of(f"{path}/part[12].jsonl") == [f"{path}/part1.jsonl"]


def test_item_8_one_file_under_two_names_is_an_error_that_gives_both(tree):
    url = f"file://{tree}/data/b.jsonl"
    aliases = ["./data/b.jsonl", str(tree / "data/b.jsonl"), url, "alias.jsonl", "to_data", "elsewhere/../data/b*"]
    (tree / "alias.jsonl").symlink_to("data/b.jsonl")
    (tree / "to_data").symlink_to("data")
    for other in aliases:
        with pytest.raises(
            UserError, match=r"source s: data/b.jsonl is named twice in paths, also as .*: they are one file"
        ):
            listed("data/b.jsonl", other)
    with pytest.raises(UserError, match=r"data/b.jsonl is named twice in paths$"):
        listed("data/b.jsonl", "data")
    (tree / "list.txt").write_text("data/b.jsonl\nalias.jsonl\n")
    with pytest.raises(UserError, match=r"data/b.jsonl is named twice in paths, also as alias.jsonl"):
        listed("@list.txt")


def test_a_list_gives_its_lines_in_order(tree):
    (tree / "list.txt").write_text("# two of them\ndata/b.jsonl\n\ndata/a.jsonl.gz\n")
    assert names_of("@list.txt") == ["data/b.jsonl", "data/a.jsonl.gz"]
    (tree / "list.txt").write_text("data/b.jsonl\ndata/none.jsonl\n")
    with pytest.raises(UserError, match=r"no file matches 'data/none.jsonl'"):
        names_of("@list.txt")
    with pytest.raises(UserError, match=r"source s: no file list at nothing.txt"):
        names_of("@nothing.txt")


def test_a_folder_a_list_a_glob_and_a_url_give_the_same_documents(tree):
    assert texts_of("data/b.jsonl", "elsewhere") == ["one", "two", "three", "four"] * 2
    urls = (f"file://{tree}/data/b.jsonl", f"file://{tree}/elsewhere", f"file://{tree}/more/*.jsonl")
    for url in urls:
        assert texts_of(url, unit_bytes=25) == ["one", "two", "three", "four"]


def test_a_file_keeps_the_path_that_the_user_wrote(tree):
    for path in ("data/b.jsonl", "./data/b.jsonl", "data/link.jsonl", str(tree / "data" / "b.jsonl")):
        assert names_of(path) == [path]
    assert names_of("data/deep [1]") == ["data/deep [1]/d.txt"]


@pytest.mark.parametrize(
    "path", ["", "data/broken.jsonl", "data/none.jsonl", "data/b.jsonl/", "none/*", "elsewhere/*.gz"]
)
def test_a_path_without_files_is_an_error_that_names_it(tree, path):
    with pytest.raises(UserError, match=f"no file matches '{path.replace('*', '[*]')}'"):
        names_of(path)


def test_a_folder_without_documents_is_an_error_that_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .* \(it holds 1 .csv, 2 .md\)"):
        names_of(put(tmp_path, "a.md", "b.md", "c.csv"))


def test_a_file_of_unknown_kind_that_is_named_is_an_error(tmp_path):
    put(tmp_path, "a.docx", "a.parquet.gz")
    for path in (tmp_path / "a.docx", tmp_path / "*.docx"):
        with pytest.raises(UserError, match=r"a.docx: unknown kind of file; expected .jsonl"):
            listed(path)
    with pytest.raises(UserError, match=r"parquet files compress inside"):
        listed(tmp_path / "a.parquet.gz")


def test_item_5_a_file_written_again_with_the_same_size_is_noticed(tree):
    before = listed("elsewhere", "data/b.jsonl").groups
    listing.check_unchanged([*before[0], *before[1]])
    (tree / "elsewhere" / "e.jsonl").write_bytes(JSONL.replace(b"one", b"six"))
    with pytest.raises(UserError, match=r"elsewhere/e.jsonl was written again since the work list was made"):
        listing.check_unchanged(before[0])
    (tree / "data" / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"data/b.jsonl is gone; it was there when the work list was made"):
        listing.check_unchanged(before[1])


def test_a_file_system_that_does_not_answer_is_no_change(tree, monkeypatch):
    (before,) = listed("data/b.jsonl").groups

    def fails(path, **_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "stat", fails)
    with pytest.raises(ReadFailed, match=r"cannot read data/b.jsonl: .*Input/output error"):
        listing.check_unchanged(before)


def test_the_order_does_not_depend_on_threads(tmp_path, monkeypatch):
    put(tmp_path, *(f"{i % 7}/{i}.jsonl" for i in range(700)))
    paths = [tmp_path / str(i) for i in (3, 1, 0)]
    several = listed(*paths)
    monkeypatch.setattr(listing, "THREADS", 1)
    assert listed(*paths) == several
