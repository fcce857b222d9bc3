"""What the tests of the readers share: units of given files, and a file system that fails where it is told to."""

import io
from pathlib import Path
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from data_prep import documents
from data_prep.config import SourceConfig
from data_prep.inputs.document import Document, Tally
from data_prep.inputs.listing import InputFile
from data_prep.work_list import Unit


def read_unit(
    paths: list[Path | str], start: int = 0, end: int = -1, max_bytes: int = documents.UNLIMITED, **settings
) -> tuple[list[Document], Tally]:
    """The documents of one unit of these files, and what was left out."""
    files = tuple(InputFile(str(path), 0, "") for path in paths)
    tally = Tally()
    source = SourceConfig("s", [str(path) for path in paths], **settings)
    return list(documents.read(Unit("s", 0, files, start, end, 0), source, tally, max_bytes)), tally


class Faulty(MemoryFileSystem):
    """`faulty://name`: files of `contents`; reading the byte `at` raises `error`, or ends the file if that is None."""

    protocol = "faulty"
    contents: ClassVar[dict[str, bytes]] = {}
    at = -1
    error: BaseException | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("faulty://")

    def open(self, path: str, mode: str = "rb", **_) -> io.BytesIO:
        return _FaultyFile(self.contents[path])


class _FaultyFile(io.BytesIO):
    def __init__(self, content: bytes):
        super().__init__(content)
        self.size = len(content)

    def read(self, size: int = -1) -> bytes:
        begin = self.tell()
        if begin <= Faulty.at < begin + size:
            if Faulty.error is not None:
                raise Faulty.error
            return b""
        return super().read(size)


fsspec.register_implementation("faulty", Faulty, clobber=True)
