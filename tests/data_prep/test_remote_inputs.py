"""Files on other machines: an HTTP server that answers range requests, and fsspec's file system in memory."""

import gzip
import json
import os

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from range_server import serve

from common.errors import UserError
from data_prep import documents, work_list
from data_prep.config import SourceConfig
from data_prep.inputs import listing
from data_prep.inputs.document import Tally
from data_prep.inputs.files import ReadFailed

TEXTS = ["one", "zwei", "trois", "four"]
JSONL = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def listed(*paths: str) -> listing.Listing:
    return listing.list_files(SourceConfig("s", list(paths)))


def texts_of(*paths: str, unit_bytes: int = 1 << 20) -> list[str]:
    source = SourceConfig("s", list(paths))
    units = work_list.units(source, unit_bytes)
    return [text for unit in units for text in documents.read(unit, source, Tally())]


@pytest.fixture
def server(tmp_path):
    """Of a folder with 50 files and a Parquet file."""
    folder = tmp_path / "served"
    (folder / "deep").mkdir(parents=True)
    for i in range(50):
        (folder / f"{i:02}.jsonl").write_bytes(JSONL)
    (folder / "deep" / "part[1].jsonl").write_bytes(JSONL)
    (folder / "deep" / "README.md").write_bytes(b"x")
    with serve(folder) as running:
        yield running


def test_urls_and_a_list_of_urls_are_asked_about_once_each(server, tmp_path):
    urls = [f"{server.url}/{i:02}.jsonl" for i in range(50)]
    (tmp_path / "list.txt").write_text("\n".join(urls))
    for paths in (urls, [f"@{tmp_path}/list.txt"]):
        server.asked.clear()
        server.sent = 0
        found = listed(*paths)
        assert [file.path for group in found.groups for file in group] == urls
        assert all(file.size == len(JSONL) and file.stamp for group in found.groups for file in group)
        assert server.asked == {("HEAD", f"/{i:02}.jsonl"): 1 for i in range(50)} and server.sent == 0
    assert texts_of(*urls[:2], unit_bytes=30) == TEXTS * 2  # by ranges


def test_a_folder_over_http_is_listed_by_its_links(server):
    assert texts_of(f"{server.url}/deep/") == TEXTS
    assert listed(f"{server.url}/deep/").ignored == {".md": 1}
    assert texts_of(f"{server.url}/deep/part[1].jsonl") == TEXTS  # which is a file, and no pattern


def test_what_a_server_does_not_have_is_told_from_a_server_that_fails(server):
    with pytest.raises(UserError, match=r"no file matches 'http://.*/none.jsonl'"):
        listed(f"{server.url}/none.jsonl")
    server.broken.add("/01.jsonl")
    with pytest.raises(ReadFailed, match=r"cannot read http://.*/01.jsonl: 503"):
        listed(f"{server.url}/01.jsonl")
    server.broken.clear()
    (before,) = listed(f"{server.url}/01.jsonl").groups
    server.broken.add("/01.jsonl")
    with pytest.raises(ReadFailed, match="503"):  # and not "is gone"
        listing.check_unchanged(before)


@pytest.mark.parametrize("tells", [("ETag", "Last-Modified"), ("ETag",), ("Last-Modified",), ()])
def test_a_file_changed_on_a_server_is_noticed_by_what_the_server_tells(tmp_path, tells, caplog):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    with serve(tmp_path, tells) as server:
        (before,) = listed(f"{server.url}/a.jsonl").groups
        listing.check_unchanged(before)
        (tmp_path / "a.jsonl").write_bytes(JSONL.replace(b"one", b"six"))
        if tells:
            with pytest.raises(UserError, match="was written again"):
                listing.check_unchanged(before)
        else:
            listing.check_unchanged(before)
            assert any("of 1 files there is neither ETag nor time" in message for message in caplog.messages)
            (tmp_path / "a.jsonl").write_bytes(JSONL + JSONL)
            with pytest.raises(UserError, match="was written again"):
                listing.check_unchanged(before)
        (tmp_path / "a.jsonl").unlink()
        with pytest.raises(UserError, match="is gone"):
            listing.check_unchanged(before)


def test_one_url_in_two_forms_is_named_twice(server):
    for other in ("/./00.jsonl", "/deep/../00.jsonl", "/%30%30.jsonl"):
        with pytest.raises(UserError, match=r"/00.jsonl is named twice in paths, also as"):
            listed(f"{server.url}/00.jsonl", server.url + other)


def test_row_groups_of_a_remote_file_are_found_by_its_footer_alone(server):
    texts = [os.urandom(500).hex() for _ in range(400)]
    pa.parquet.write_table(pa.table({"text": texts}), server.folder / "a.parquet", row_group_size=20)
    size = (server.folder / "a.parquet").stat().st_size
    server.sent = 0
    units = work_list.units(SourceConfig("s", [f"{server.url}/a.parquet"]), size // 5)
    assert len(units) > 4 and server.sent <= work_list.FOOTER_BYTES < size


@pytest.fixture
def bucket():
    with fsspec.open("memory://bucket/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(JSONL))
    yield "memory://bucket"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def write(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def test_a_glob_on_a_remote_file_system_is_read(bucket):
    assert texts_of(f"{bucket}/*.gz") == texts_of(bucket) == TEXTS
    with pytest.raises(UserError, match="nothing"):
        listed(f"{bucket}/nothing.jsonl")
    with pytest.raises(UserError, match=r"source s: nowhere://a.jsonl: Protocol not known"):
        listed("nowhere://a.jsonl")


def test_remote_folders_say_what_they_leave_out(bucket):
    for name in ("b.JSONL", "c.csv", "deep/d.jsonl", "part[1].jsonl", "part1.jsonl", "t/x.bin", "t/x.idx"):
        write(f"{bucket}/{name}", JSONL)
    found = listed(bucket)
    names = ["a.jsonl.gz", "b.JSONL", "deep/d.jsonl", "part1.jsonl", "part[1].jsonl", "t/x.bin"]
    assert [file.path for file in found.groups[0]] == [f"memory:///bucket/{name}" for name in names]
    assert found.ignored == {".csv": 1}
    assert [file.path for file in listed(f"{bucket}/part[1].jsonl").groups[0]] == [f"{bucket}/part[1].jsonl"]
    with pytest.raises(UserError, match=r"part1.jsonl is named twice"):
        listed(bucket, f"{bucket}/part1.jsonl")
    write(f"{bucket}/dd/dataset_dict.json", b'{"splits": ["train", "dev"]}')
    with pytest.raises(UserError, match=r"memory:///bucket/dd holds a DatasetDict, of the splits train, dev"):
        listed(bucket)


def test_etags_of_a_listing_are_kept_and_compared(bucket, monkeypatch):
    """Without a question per file, where the listing of the folder tells enough."""
    etags = {"a.jsonl.gz": "1", "b.jsonl": "2"}
    asked = []
    real_info, real_find = MemoryFileSystem.info, MemoryFileSystem.find

    def with_etag(about: dict) -> dict:
        return {**about, "ETag": f'"{etags.get(about["name"].split("/")[-1], "")}"'}

    def info(self, path, **kwargs):
        asked.append(path)
        return with_etag(real_info(self, path, **kwargs))

    def find(self, path, **kwargs):
        monkeypatch.setattr(MemoryFileSystem, "info", real_info)
        found = real_find(self, path, **kwargs)
        monkeypatch.setattr(MemoryFileSystem, "info", info)
        return {name: with_etag(about) for name, about in found.items()}

    write(f"{bucket}/b.jsonl", JSONL)
    monkeypatch.setattr(MemoryFileSystem, "info", info)
    monkeypatch.setattr(MemoryFileSystem, "find", find)
    (found,) = listed(bucket).groups
    assert [file.stamp for file in found] == ["1", "2"]
    assert asked == ["/bucket"]
    listing.check_unchanged(found)
    etags["b.jsonl"] = "3"
    with pytest.raises(UserError, match=r"b.jsonl was written again .*stamp 2; now .*stamp 3"):
        listing.check_unchanged(found)


def test_the_index_of_a_remote_token_file_is_compared_with_it(bucket):
    """The listing of a folder says nothing of it, so both are asked about."""
    for name in ("x.bin", "x.idx"):
        write(f"{bucket}/t/{name}", b"1234")
    (found,) = listed(f"{bucket}/t").groups
    assert [file.path for file in found] == ["memory:///bucket/t/x.bin"]
    listing.check_unchanged(found)
    write(f"{bucket}/t/x.idx", b"5678")
    with pytest.raises(UserError, match=r"t/x.bin was written again"):
        listing.check_unchanged(found)


def test_a_stamp_is_the_etag_and_a_weak_one_is_no_other():
    """A server may give the same one as weak, when it compresses. The time is taken where there is no ETag."""
    for about in ({"ETag": '"a"'}, {"ETag": 'W/"a"'}, {"etag": "a", "mtime": 5.0}):
        assert listing._stamp(about) == "a"
    assert listing._stamp({"ETag": None, "LastModified": "today"}) == "today"
    assert listing._stamp({"size": 3}) == ""


def test_a_file_system_that_keeps_what_it_answered_is_asked_anew(bucket, monkeypatch):
    kept: dict = {}
    real = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path, **_: kept.setdefault(path, real(self, path)))
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: kept.clear())
    (found,) = listed(f"{bucket}/a.jsonl.gz").groups
    before = dict(kept)
    write(f"{bucket}/a.jsonl.gz", b"shorter")
    kept.update(before)
    with pytest.raises(UserError, match=r"a.jsonl.gz was written again .* now 7 bytes"):
        listing.check_unchanged(found)
    kept.update(before)
    assert [file.size for file in listed(f"{bucket}/a.jsonl.gz").groups[0]] == [7]
