"""A file that cannot be fetched is not a damaged file: the first is raised, the second named, none is overlooked."""

import bz2
import contextlib
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import random
import zlib

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from reading import Faulty, read_unit

from common.errors import UserError
from data_prep import documents
from data_prep.inputs import files, text
from data_prep.inputs.files import ReadFailed

RNG = random.Random(1)
TEXTS = [f"{i} {RNG.randbytes(400).hex()} é" for i in range(5000)]  # 4 MB that compress to 2 MB
JSONL = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(TEXTS)).encode()
KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet", "stream.arrow", "file.arrow"]
DAMAGEABLE = ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "stream.arrow", "file.arrow"]


def compress(content: bytes, suffix: str) -> bytes:
    checked = zstandard.ZstdCompressor(write_checksum=True)
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": checked.compress}[suffix](content)


def content_of(name: str, texts: list[str] = TEXTS) -> bytes:
    """A file of that kind."""
    table = pa.table({"text": texts, "n": range(len(texts))})
    sink = io.BytesIO()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, sink, row_group_size=500)
    elif name.endswith(".arrow"):
        with (pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        plain = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)).encode()
        suffix = name.rpartition(".")[2]
        return plain if suffix in ("jsonl", "txt") else compress(plain, suffix)
    return sink.getvalue()


@pytest.fixture
def faulty():
    """`faulty(name, content, at, error)`: the URL of a file that fails there."""

    def make(name: str, content: bytes, at: int, error: BaseException | None) -> str:
        Faulty.contents[name] = content
        Faulty.at = at
        Faulty.error = error
        return f"faulty://{name}"

    yield make
    Faulty.contents.clear()


class OfALibrary(Exception):
    """As botocore's and aiohttp's: no OSError, no text, and not to be pickled."""

    def __init__(self, response: object):
        super().__init__()
        self.response = response


ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError(),
    EOFError("the connection was closed"),
    OfALibrary(lambda: 0),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", KINDS)
def test_what_fails_while_bytes_are_fetched_is_raised_and_never_counted(faulty, monkeypatch, name, error):
    """In the middle of a file of any kind, and of a long text."""
    monkeypatch.setattr(text, "LONG_FILE_BYTES", 1 << 20)
    content = content_of(name)
    url = faulty(name, content, len(content) // 2, error)
    with pytest.raises(ReadFailed, match="cannot read faulty://") as caught:
        read_unit([url])
    assert caught.value.errno == getattr(error, "errno", None)
    assert (str(error).splitlines() or [type(error).__name__])[0] in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.errno) == (ReadFailed, str(caught.value), caught.value.errno)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_ends_before_its_size_was_not_fetched_whole(faulty, name):
    content = content_of(name)
    with pytest.raises(ReadFailed, match=rf"ended after [\d,]+ of {len(content):,} bytes"):
        read_unit([faulty(name, content, len(content) // 2, None)])


def test_a_file_that_may_not_be_opened_is_raised_and_one_that_is_gone_is_the_users(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ReadFailed, match=r"folder\.jsonl: "):
        read_unit([tmp_path / "folder.jsonl"])
    with pytest.raises(UserError, match=r"none\.jsonl is gone"):
        read_unit([tmp_path / "none.jsonl"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_file_that_is_cut_off_is_named_and_the_next_one_read(tmp_path, name, share):
    """Also one of which nothing is left."""
    content = content_of(name)
    cut = tmp_path / name
    cut.write_bytes(content[: int(share * len(content))])
    (tmp_path / "good.jsonl").write_bytes(JSONL)
    found, tally = read_unit([cut, tmp_path / "good.jsonl"])
    assert found[-len(TEXTS) :] == TEXTS and found[: -len(TEXTS)] == TEXTS[: len(found) - len(TEXTS)]
    assert not tally.bad and len(tally.damaged) == 1
    assert tally.damaged[0].startswith(f"{cut}: ") and len(tally.damaged[0]) > len(f"{cut}: ")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_changed_byte_is_found_by_the_checksum_wherever_it_is(tmp_path, suffix):
    """Or it is one that changes no document, as the time in a gzip header."""
    content = compress(JSONL[:20_000].rpartition(b"\n")[0], suffix)
    whole = JSONL[:20_000].count(b"\n")
    rng = random.Random(3)
    named = 0
    for _ in range(150):
        at = rng.randrange(len(content))
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(changed)
        found, tally = read_unit([tmp_path / f"a.jsonl.{suffix}"], text_field="n")
        assert not found
        assert tally.damaged or tally.bad == {"text is not a string": whole}
        named += len(tally.damaged)
    assert named > 100


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_changed_byte_of_a_columnar_file_stops_nothing(tmp_path, name):
    """In a process of its own: offsets that point out of the data made Arrow read there, which killed it."""
    content = content_of(name, TEXTS[:300])
    rng = random.Random(4)
    child = os.fork()
    if not child:
        code = 1
        try:
            for i in range(400):
                changed = bytearray(content)
                changed[rng.randrange(len(content)) if i % 2 else rng.choice([i, -i - 1])] ^= 1 << rng.randrange(8)
                (tmp_path / name).write_bytes(changed)
                with contextlib.suppress(UserError):  # no column 'text'
                    read_unit([tmp_path / name])
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_changed_letter_in_a_parquet_page_with_a_checksum_is_damage(tmp_path):
    """Nothing but the checksum tells: the text is as long as before, and UTF-8."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["first text", "second text"]})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False,
                                write_page_checksum=True)  # fmt: skip
    assert read_unit([path])[0] == ["first text", "second text"]
    content = path.read_bytes()
    assert content.count(b"second text") == 1
    path.write_bytes(content.replace(b"second text", b"sacond text"))
    found, tally = read_unit([path])
    assert not found and len(tally.damaged) == 1 and "checksum" in tally.damaged[0].lower()


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz", "GZ", "Zst"])
def test_several_members_are_one_file_and_other_bytes_after_them_are_damage(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    parts = [compress(part, suffix.lower()) for part in (JSONL[:1000], b"", JSONL[1000:300_000])]

    def read() -> tuple[bytes, bool]:
        content = b""
        try:
            with files.open_decompressed(str(path)) as file:
                while block := file.read1(1 << 16):
                    content += block
        except documents.DAMAGE as error:
            assert not isinstance(error, ReadFailed)
            return content, True
        return content, False

    path.write_bytes(b"".join(parts))
    assert read() == (JSONL[:300_000], False)
    path.write_bytes(b"".join(parts) + b"\0" * 8)  # as tapes and tar fill blocks
    assert read() == (JSONL[:300_000], False)
    path.write_bytes(b"".join(parts) + b"something else")
    assert read() == (JSONL[:300_000], True)
    for broken in (parts[0] + parts[2][:-1], parts[0] + parts[2][:200], parts[0] + parts[2][:2] + b"x" * 99, b""):
        path.write_bytes(broken)
        content, is_damaged = read()
        assert is_damaged and JSONL.startswith(content)


def test_a_deflate_stream_that_makes_no_sense_is_damage(tmp_path):
    """zlib.error is no OSError."""
    member = zlib.compressobj(wbits=31)
    begin = member.compress(JSONL[:1_000_000]) + member.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "a.jsonl.gz").write_bytes(begin + b"\xff" * 100)  # a block of no known type
    found, tally = read_unit([tmp_path / "a.jsonl.gz"])
    assert 100 < len(found) < len(TEXTS) and found == TEXTS[: len(found)]
    assert "while decompressing" in tally.damaged[0]


def test_zstd_with_a_long_window_is_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    frame = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(JSONL) + frame.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 1 << 28
    found, tally = read_unit([tmp_path / "a.jsonl.zst"])
    assert found == TEXTS and not tally.damaged


def test_an_error_without_a_text_is_named_by_its_type(tmp_path, monkeypatch):
    def fails(*_):
        raise EOFError
        yield

    monkeypatch.setattr(documents, "read_txt", fails)
    assert read_unit([tmp_path / "a.txt"])[1].damaged == [f"{tmp_path}/a.txt: EOFError"]


@pytest.mark.parametrize("with_dictionary", [False, True])
def test_an_arrow_stream_cut_between_messages_is_damaged(tmp_path, with_dictionary):
    """At every message boundary, which pyarrow takes for the end."""
    column = pa.array(TEXTS[:6])
    table = pa.table(
        {"text": column, "kind": pa.array(list("aabbcc")).dictionary_encode() if with_dictionary else column}
    )
    sink = io.BytesIO()
    writer = pa.ipc.new_stream(sink, table.schema)
    boundaries = [sink.tell()]
    for batch in table.to_batches(max_chunksize=2):
        writer.write_batch(batch)
        boundaries.append(sink.tell())
    writer.close()
    path = tmp_path / "a.arrow"
    path.write_bytes(sink.getvalue())
    assert read_unit([path])[0] == TEXTS[:6] and not read_unit([path])[1].damaged
    assert sink.getvalue()[boundaries[-1] :] == b"\xff\xff\xff\xff\0\0\0\0"
    path.write_bytes(sink.getvalue()[: boundaries[-1]] + b"\0" * 4)  # the marker of old versions
    assert not read_unit([path])[1].damaged
    for i, end in enumerate(boundaries):
        path.write_bytes(sink.getvalue()[:end])
        found, tally = read_unit([path])
        assert found == TEXTS[: 2 * i] and len(tally.damaged) == 1


def test_what_datasets_writes_has_the_end_marker(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS[:50]}).save_to_disk(tmp_path)
    assert read_unit([tmp_path / "data-00000-of-00001.arrow"])[1].damaged == []
