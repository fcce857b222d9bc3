"""Files' bytes as arrays, without descriptors that stay open: a corpus has more shards than a process may open files.

Python's mmap and pyarrow keep a descriptor for every mapping; the system call needs none once the mapping is made.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE = 0
_MAP_FIXED = 0x10  # Python's mmap does not name it


class FileRegion:
    """Address space for files of known sizes, one after the other, each on pages of its own.

    A file's part can be read after `add`. All of it is given back after the last array of it is gone.
    """

    def __init__(self, sizes: Sequence[int]):
        """Raises OSError where the process may not have so many addresses."""
        page = mmap.PAGESIZE
        self._unmap = _LIBC.munmap  # at the interpreter's end the module's names may be gone before the last array
        self._address = 0
        self.sizes = sizes
        ends = np.cumsum([-(-size // page) * page for size in sizes])
        self.places = [0, *ends.tolist()]  # where each file begins, and the end
        self._total = max(page, self.places[-1])
        self._address = _map(None, self._total, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.__array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (self.places[-1],), "data": (self._address, True),
        }  # fmt: skip

    def add(self, number: int, path: str | Path) -> None:
        """Map a file at its place. Raises OSError, and ValueError where its size is another; nothing changes then."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size != self.sizes[number]:
                raise ValueError(f"{size} bytes, the manifest says {self.sizes[number]}")
            if size:
                place = self._address + self.places[number]
                _map(place, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
        finally:
            os.close(descriptor)

    def __del__(self) -> None:
        if self._address:
            self._unmap(self._address, self._total)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found = _LIBC.mmap(address, size, protection, flags, descriptor, 0)
    if found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def map_file(path: str | Path) -> np.ndarray:
    """(bytes,) uint8, read-only: the file's content, read when it is looked at. Raises OSError."""
    size = os.stat(path).st_size
    region = FileRegion([size])
    region.add(0, path)
    return np.asarray(region)[:size]


def most_mappings() -> int:
    """How many files to keep mapped: half of what the kernel allows this process, so that others find room too."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    except (OSError, ValueError):  # not Linux
        return 1 << 15
