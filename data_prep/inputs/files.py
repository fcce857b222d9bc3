"""Opens files, local or of any file system that fsspec knows, and decompresses them."""

import gzip
import io
from typing import Any, BinaryIO, cast

import fsspec

from common.errors import UserError


class ReadFailed(OSError):
    """A file could not be read for a reason that is not in its content: a disk, a network, a permission."""

    def __init__(self, path: str, error: BaseException):
        super().__init__(f"cannot read {path}: {error or type(error).__name__}")


def open_file(path: str) -> BinaryIO:
    """A seekable binary file, local or remote."""
    system, plain = file_system(path)
    return system.open(plain, "rb")


def file_system(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path on it."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise UserError(f"{path}: {error}") from None


def open_decompressed(path: str) -> BinaryIO:
    """The file's bytes, decompressed. Reading a .gz or .zst file that is cut off raises EOFError or OSError."""
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(open_file(path), "rb"))
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(open_file(path)), 1 << 20)
    return open_file(path)


class _ZstdReader(io.RawIOBase):
    """A .zst file of one or more frames as bytes.

    zstandard's own reader, which fsspec uses too, takes a file that ends in the middle of a frame for whole.
    """

    def __init__(self, file: BinaryIO):
        import zstandard

        self.file = file
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.error = zstandard.ZstdError
        self.frame: Any = None
        self.pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.pending:
            chunk = b""
            if self.frame is not None and self.frame.eof:
                chunk = self.frame.unused_data
                self.frame = None
            chunk = chunk or self.file.read(1 << 18)
            if not chunk:
                if self.frame is not None:
                    raise EOFError("the zstd frame is cut off")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.pending = self.frame.decompress(chunk)
            except self.error as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self.pending))
        buffer[:size] = self.pending[:size]
        self.pending = self.pending[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()
