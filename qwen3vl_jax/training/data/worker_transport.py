"""Worker transport: moves groups of samples from a worker to the process that packs them.

A group is pickled without its arrays. Those are one block in a file in /dev/shm, which the receiver maps
without a copy. Files are used again, because allocating fresh pages costs more than filling them. Blocks
go through the pipe if /dev/shm has no room.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_jax.processing.encoded_prompt import EncodedImage
from qwen3vl_jax.training.data.packing import one_frame
from qwen3vl_jax.training.data.sample import Refusal, Sample

_FOLDER = "/dev/shm"
# A file that was read gets this suffix: its worker may write into it again.
_FREE = ".free"
# Each array of a block begins at a multiple of so many bytes.
_ALIGN = 8


class SampleBlock(NamedTuple):
    """A packed group: its pickle without arrays, and the block with all arrays."""

    pickled: bytes
    # Bytes of each array.
    sizes: list[int]
    # The path of a file, or the bytes themselves.
    block: str | bytes

    def unpack(self, inbox: Inbox) -> list[Sample | Refusal]:
        """The group, once. Its arrays are read-only."""
        block = self.block if isinstance(self.block, bytes) else inbox.read(self.block)
        arrays, end = [], 0
        for size in self.sizes:
            arrays.append(memoryview(block)[end : end + size])
            end += size + -size % _ALIGN
        items, table = pickle.loads(self.pickled, buffers=arrays)
        (ids, labels, bits), positions = table[:3], table[3:]
        weights, start, out = bits.view(np.float32), 0, []
        for item in items:
            if isinstance(item, Refusal):
                out.append(item)
                continue
            name, count, *others = item
            at = slice(start, start + count)
            start += count
            out.append(Sample(name, ids[at], labels[at], weights[at], positions[:, at], *others))
        return out


class Inbox:
    """Maps files as arrays. A file is free again once nothing refers to its array."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def read(self, path: str) -> np.ndarray:
        """The bytes of a file."""
        size, pages = os.stat(path).st_size, self._maps.get(path)
        if pages is None or len(pages) < size:
            with open(path, "rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[path] = pages
        # Views refer to this array: its base is no array, so numpy does not skip it.
        array = np.frombuffer(pages, np.uint8, size)
        weakref.finalize(array, _release, path).atexit = False
        return array


def _release(path: str) -> None:
    # The file is gone if the loader was closed.
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, path + _FREE)


def pack(
    folder: str, patch_shape: tuple[int, ...], group: Sequence[Sample | Refusal]
) -> SampleBlock:
    """Packs a group. folder: of `memory_folder`. Images are sent as one frame, not two equal ones."""
    # Images that samples share are sent once.
    frames: dict[int, np.ndarray] = {}

    def sent(image: EncodedImage) -> EncodedImage:
        key = id(image.patches)
        if key not in frames:
            frames[key] = one_frame(image.patches, patch_shape)
        return type(image)(frames[key], image.grid, image.start, image.end)

    def as_labels(given: np.ndarray | None) -> np.ndarray | None:
        return None if given is None else np.ascontiguousarray(given, np.int32)

    items: list[Any] = [
        s
        if isinstance(s, Refusal)
        else (s.name, len(s.ids), tuple(map(sent, s.images)), as_labels(s.vision_labels), s.note)
        for s in group
    ]
    samples = [s for s in group if isinstance(s, Sample)]
    # One array for all values of tokens: few large arrays are opened faster than many.
    table = np.empty((6, sum(len(s.ids) for s in samples)), np.int32)
    if samples:
        np.concatenate([s.ids for s in samples], out=table[0])
        np.concatenate([s.labels for s in samples], out=table[1])
        np.concatenate([s.weights for s in samples], out=table[2].view(np.float32))
        np.concatenate([s.positions for s in samples], 1, out=table[3:])
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps((items, table), protocol=5, buffer_callback=arrays.append)
    raw = [x.raw() for x in arrays]
    block = b"".join(part for x in raw for part in (x, bytes(-len(x) % _ALIGN)))
    return SampleBlock(pickled, [len(x) for x in raw], _written(folder, block) or block)


def _written(folder: str, block: bytes) -> str:
    """Writes a block to a file and gives its path; "" without room, as in many containers."""
    path = ""
    with contextlib.suppress(OSError):
        path = _file(folder) if folder and block else ""
        if path:
            with open(path, "r+b", buffering=0) as file:
                if file.write(block) == len(block):
                    return path
    if path:
        os.unlink(path)
    return ""


def _file(folder: str) -> str:
    """The path of a free file, or of a new one, taken by this process."""
    for free in Path(folder).glob("*" + _FREE):
        taken = str(free).removesuffix(_FREE)
        # Another worker may be first.
        with contextlib.suppress(FileNotFoundError):
            os.rename(free, taken)
            return taken
    file, path = tempfile.mkstemp(dir=folder)
    os.close(file)
    return path


def memory_folder() -> str:
    """A new folder in /dev/shm; "" if the system has none."""
    try:
        return tempfile.mkdtemp(prefix="qwen3vl_jax-", dir=_FOLDER)
    except OSError:
        return ""
