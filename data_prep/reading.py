"""A file's bytes as an array, without a descriptor that stays open: a corpus may have more shards than a process files.

Python's mmap and pyarrow keep a descriptor for every mapping; the system call does not need it once the mapping is made.
"""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """Pages of a file. Every array of them refers to this object, so they are unmapped after the last of them is gone."""

    def __init__(self, descriptor: int, size: int):
        self._unmap = _LIBC.munmap  # at the interpreter's end the module's names may be gone before the last array
        self._address = None
        self._size = size
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._address = address
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, True)}

    def __del__(self) -> None:
        if self._address is not None:
            self._unmap(self._address, self._size)


def map_file(path: str | Path) -> np.ndarray:
    """(bytes,) uint8, read-only: the file's content, read when it is looked at. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return np.asarray(_Mapping(descriptor, size)) if size else np.zeros(0, dtype=np.uint8)
    finally:
        os.close(descriptor)


def most_mappings() -> int:
    """How many files to keep mapped: half of what the kernel allows this process, so that others find room too."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    except (OSError, ValueError):  # not Linux
        return 1 << 15
