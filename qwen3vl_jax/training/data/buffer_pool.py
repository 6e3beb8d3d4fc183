"""Memory that is used again: a large array in fresh pages costs more than what is written to it."""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict

import numpy as np


class BufferPool:
    """Arrays whose memory is given out again once nothing refers to it any more, views included."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)

    def empty(self, size: int) -> np.ndarray:
        """A uint8 array of `size` bytes that hold anything, from any thread."""
        room = 1 << max(size - 1, mmap.PAGESIZE - 1).bit_length()
        free = self._free[room]
        try:
            pages = free.pop()
        except IndexError:
            pages = mmap.mmap(-1, room)
        # Views of this array refer to it, not to the pages, which are no array.
        array = np.frombuffer(pages, np.uint8, size)
        weakref.finalize(array, free.append, pages).atexit = False
        return array
