"""Files behind one another in one stretch of memory, so that NumPy gathers rows of many files by one index.

Each file is mapped to its place when it is first needed, and closed again: a process may hold a thousand open files, and a split may
have more shards. Between files, and where none is mapped, there are zeros.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAP_FIXED = 0x10
"""Of mmap(2): at this address and no other. The same on Linux and macOS; Python's mmap module does not have it."""


class Stretch:
    """Memory for files of these sizes and `spare` bytes of zeros after the last; `bytes` (all of it,) uint8 is read only.

    A file that is cut short while it is mapped kills the process that reads it (SIGBUS), as with any memory map.
    """

    def __init__(self, sizes: Sequence[int], spare: int) -> None:
        whole_pages = np.array([-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes], np.int64)
        self.sizes, self.begins = list(sizes), (whole_pages.cumsum() - whole_pages).tolist()
        held = mmap.mmap(-1, int(whole_pages.sum()) + spare, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        self.bytes = np.frombuffer(held, np.uint8)  # holds the memory; without it all of it is unmapped, files and all
        self.call = ctypes.CDLL(None, use_errno=True).mmap
        self.call.restype = ctypes.c_void_p
        self.call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]

    def place(self, number: int) -> np.ndarray:
        """The bytes of file `number`: (its size,) uint8, zeros if it is not mapped."""
        return self.bytes[self.begins[number] : self.begins[number] + self.sizes[number]]

    def map(self, number: int, path: Path) -> np.ndarray:
        """Put a file at its place, which is returned. The file must have its size. Raises OSError."""
        with path.open("rb") as file:
            self._fill(number, mmap.MAP_PRIVATE, file.fileno())
        return self.place(number)

    def unmap(self, number: int) -> None:
        """Put zeros in the place of a file."""
        self._fill(number, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)

    def _fill(self, number: int, flags: int, file: int) -> None:
        address = self.bytes.ctypes.data + self.begins[number]
        if self.call(address, self.sizes[number], mmap.PROT_READ, flags | MAP_FIXED, file, 0) != address:
            code = ctypes.get_errno()
            raise OSError(code, f"a shard cannot be mapped to memory: {os.strerror(code)}")
