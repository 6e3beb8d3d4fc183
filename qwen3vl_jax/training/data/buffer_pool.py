"""A buffer pool: allocating fresh pages for every batch costs more than filling them."""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict

import numpy as np


class BufferPool:
    """Arrays whose memory is used again once nothing refers to them or to a view of them."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)

    def empty(self, size: int) -> np.ndarray:
        """A uint8 array of `size` bytes with any contents. Thread-safe."""
        room = 1 << max(size - 1, mmap.PAGESIZE - 1).bit_length()
        free = self._free[room]
        try:
            pages = free.pop()
        except IndexError:
            pages = mmap.mmap(-1, room)
        # Views refer to this array: its base is no array, so numpy does not skip it.
        array = np.frombuffer(pages, np.uint8, size)
        weakref.finalize(array, free.append, pages).atexit = False
        return array
