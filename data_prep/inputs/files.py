"""Opens files, local or of any file system that fsspec knows, and decompresses them.

What fails while bytes are fetched is a `ReadFailed`, also in the middle of a file; any other exception that
reading raises is about the bytes themselves: the file is damaged, or cut off.
"""

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec
import zstandard

from common.errors import UserError, without_passwords

BUFFER_BYTES = 1 << 20  # read at once
COMPRESSED_BYTES = 1 << 16  # decompressed at once; more would make more output at once
LARGEST_WINDOW = 1 << 31  # of zstd: what `zstd --long=31` writes is read, with as much memory


class ReadFailed(OSError):
    """A file could not be read for a reason that is not in its content: a disk, a network, a permission.

    Reading it again may help. `errno` is that of the error, if it has one. Survives pickling, whatever the error is.
    """

    def __init__(self, path: str, error: BaseException | str, errno: int | None = None):
        self.path = path
        self.reason = error if isinstance(error, str) else describe(error)
        super().__init__(f"cannot read {without_passwords(path)}: {self.reason}")
        self.errno = errno or getattr(error, "errno", None)

    def __reduce__(self) -> tuple:
        return ReadFailed, (self.path, self.reason, self.errno)


def describe(error: BaseException) -> str:
    """The error in one line; its type where it has no text."""
    return (without_passwords(str(error)).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Whatever a file system raises becomes ReadFailed, except that the file does not exist."""
    try:
        yield
    except (FileNotFoundError, UserError, MemoryError):
        raise
    except Exception as error:  # each file system has exceptions of its own: botocore's, aiohttp's, ...
        raise ReadFailed(path, error) from error


def open_file(path: str) -> io.BufferedReader:
    """A binary file, local or remote; seekable, unless it is of a server that cannot give parts.

    Raises FileNotFoundError, and ReadFailed for all else; so do its methods.
    """
    with _reading(path):
        system, plain = file_system(path)
        opened = system.open(plain, "rb")
    return io.BufferedReader(_Fetched(path, opened), BUFFER_BYTES)


def file_system(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path on it."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise UserError(f"{path}: {error}") from None


class _Fetched(io.RawIOBase):
    """A file of a file system, whose failures are ReadFailed; so is an end before its size."""

    def __init__(self, path: str, file: BinaryIO):
        self._path = path
        self._file = file
        self._size = getattr(file, "size", None) or 0  # 0: not known

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        with _reading(self._path):
            content = self._file.read(len(buffer))
            position = self._size if content else self._file.tell()
        if position < self._size:
            raise ReadFailed(self._path, f"it ended after {position:,} of {self._size:,} bytes")
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _reading(self._path):
            self._file.seek(offset, whence)
            return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_decompressed(path: str) -> BinaryIO:
    """The file's bytes, decompressed if its name ends in .gz, .zst, .bz2 or .xz, in letters of any case.

    A compressed file that is cut off, empty or followed by other bytes raises EOFError, OSError, zlib.error or
    lzma.LZMAError while it is read; files of several members or frames are read to their end.
    """
    suffix = os.path.splitext(path)[1].lower()
    file = open_file(path)
    if suffix not in (".gz", ".zst", ".zstd", ".bz2", ".xz"):
        return file
    if not file.peek(1):
        raise EOFError("it is empty, without the header of a compressed file")
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    frames = {".zst": _ZstdFrame, ".zstd": _ZstdFrame, ".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
    return io.BufferedReader(_Frames(file, frames[suffix]), BUFFER_BYTES)


class _ZstdFrame:
    """One frame of zstd, used like a decompressor of bz2 or lzma."""

    needs_input = True  # for it gives all that its input makes

    def __init__(self) -> None:
        self.frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return self.frame.eof

    @property
    def unused_data(self) -> bytes:
        return self.frame.unused_data

    def decompress(self, content: bytes, max_length: int) -> bytes:
        try:
            return self.frame.decompress(content)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error  # what bz2 raises


class _Frames(io.RawIOBase):
    """A file of one or more compressed frames as bytes.

    The libraries' own readers, which fsspec uses too, are not strict: zstandard's takes a file that ends in the middle
    of a frame for whole; those of bz2 and lzma take a second frame that is damaged for no part of the file.
    """

    def __init__(self, file: io.BufferedReader, new_frame: Callable[[], Any]):
        self.file = file
        self.new_frame = new_frame
        self.frame: Any = None
        self.pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.pending:
            if self.frame is None or self.frame.eof:
                left = self.frame.unused_data if self.frame else b""
                chunk = (left or self.file.read(COMPRESSED_BYTES)).lstrip(b"\0")  # .xz files may be padded so
                self.frame = self.new_frame() if chunk else None
                if not chunk and not left and not self.file.peek(1):
                    return 0
            elif self.frame.needs_input:
                chunk = self.file.read(COMPRESSED_BYTES)
                if not chunk:
                    raise EOFError("it is cut off in the middle of a compressed frame")
            else:
                chunk = b""
            if self.frame is not None:
                self.pending = memoryview(self.frame.decompress(chunk, BUFFER_BYTES))
        size = min(len(buffer), len(self.pending))
        buffer[:size] = self.pending[:size]
        self.pending = self.pending[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()
