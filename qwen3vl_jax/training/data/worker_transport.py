"""Worker transport: moves groups of samples from a worker to the process that packs them.

All arrays of a group are one block in a file in /dev/shm, which the receiver maps without a copy. Files
are used again, because allocating fresh pages costs more than filling them. Blocks go through the pipe
if /dev/shm has no room.
"""

import contextlib
import dataclasses
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_jax.processing.encoded_prompt import EncodedImage
from qwen3vl_jax.training.data.packing import one_frame
from qwen3vl_jax.training.data.sample import Refusal, Sample

_FOLDER = "/dev/shm"
# A file that was read gets this suffix: its worker may write into it again.
_FREE = ".free"
# int32 values of a token: id, label, weight (the bits of a float32), 3 positions.
_FIELDS = 6


class _SampleInfo(NamedTuple):
    """A Sample without its arrays."""

    name: str
    note: str
    tokens: int
    # Number of vision labels; -1: None.
    merged: int
    # (index of the patches in the block, image without them)
    images: list[tuple[int, EncodedImage]]


@dataclasses.dataclass(frozen=True)
class SampleBlock:
    """A packed group: refusals, samples without their arrays, and the block with all arrays.

    The block holds token fields [_FIELDS n], then vision labels, then each array of pixels.
    """

    items: list[Refusal | _SampleInfo]
    # Shapes and dtypes.
    pixels: list[tuple[tuple[int, ...], str]]
    # Bytes of the block.
    size: int
    # The path of a file, or the bytes themselves.
    block: str | bytes

    def unpack(self, inbox: "Inbox") -> list[Sample | Refusal]:
        """The group, once. Its arrays are read-only."""
        if isinstance(self.block, str):
            block = inbox.read(self.block, self.size)
        else:
            block = np.frombuffer(self.block, np.uint8)
        infos = [item for item in self.items if isinstance(item, _SampleInfo)]
        count = sum(item.tokens for item in infos)
        table = block[: 4 * _FIELDS * count].view(np.int32).reshape(_FIELDS, count)
        end = table.nbytes + 4 * sum(max(item.merged, 0) for item in infos)
        labels, pixels = block[table.nbytes : end].view(np.int32), []
        for shape, kind in self.pixels:
            start, end = end, end + math.prod(shape) * np.dtype(kind).itemsize
            pixels.append(block[start:end].view(kind).reshape(shape))
        samples = _samples(infos, table, labels, pixels)
        return [next(samples) if isinstance(item, _SampleInfo) else item for item in self.items]


class Inbox:
    """Maps files as arrays. A file is free again once nothing refers to its array."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def read(self, path: str, size: int) -> np.ndarray:
        """The first `size` bytes of a file."""
        pages = self._maps.get(path)
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


def _samples(
    infos: Sequence[_SampleInfo], table: np.ndarray, labels: np.ndarray, pixels: list[np.ndarray]
) -> Iterator[Sample]:
    """Samples whose arrays are views of the block."""
    ids, targets, bits, *_ = table
    weights, start, first = bits.view(np.float32), 0, 0
    for item in infos:
        at = slice(start, start + item.tokens)
        arrays = ids[at], targets[at], weights[at], table[3:, at]
        images = [dataclasses.replace(image, patches=pixels[i]) for i, image in item.images]
        named = None if item.merged < 0 else labels[first : first + item.merged]
        yield Sample(item.name, *arrays, tuple(images), named, item.note)
        start, first = start + item.tokens, first + max(item.merged, 0)


def pack(
    folder: str, patch_shape: tuple[int, ...], group: Sequence[Sample | Refusal]
) -> SampleBlock:
    """Packs a group. folder: of `memory_folder`. Images are sent as one frame, not two equal ones."""
    samples = [item for item in group if isinstance(item, Sample)]
    # Images that samples share are sent once.
    places: dict[int, int] = {}
    sent: list[np.ndarray] = []

    def without_patches(image: EncodedImage) -> tuple[int, EncodedImage]:
        place = places.setdefault(id(image.patches), len(sent))
        if place == len(sent):
            sent.append(one_frame(image.patches, patch_shape))
        return place, type(image)(np.empty(0), image.grid, image.start, image.end)

    def info_of(s: Sample) -> _SampleInfo:
        merged = -1 if s.vision_labels is None else len(s.vision_labels)
        images = [without_patches(image) for image in s.images]
        return _SampleInfo(s.name, s.note, len(s.ids), merged, images)

    items = [info_of(item) if isinstance(item, Sample) else item for item in group]
    table = np.empty((_FIELDS, sum(len(s.ids) for s in samples)), np.int32)
    if samples:
        np.concatenate([s.ids for s in samples], out=table[0])
        np.concatenate([s.labels for s in samples], out=table[1])
        np.concatenate([s.weights for s in samples], out=table[2].view(np.float32))
        np.concatenate([s.positions for s in samples], 1, out=table[3:])
    labels = [s.vision_labels.astype(np.int32) for s in samples if s.vision_labels is not None]
    arrays: Any = [np.ascontiguousarray(x) for x in (table, *labels, *sent)]
    block = b"".join(arrays)
    shapes = [(pixels.shape, pixels.dtype.str) for pixels in sent]
    return SampleBlock(items, shapes, len(block), _written(folder, block) or block)


def _written(folder: str, block: bytes) -> str:
    """Writes a block to a file and gives its path; "" without room, as in many containers."""
    if not folder or not block:
        return ""
    path = ""
    with contextlib.suppress(OSError):
        path = _file(folder)
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
        try:
            os.rename(free, taken)
            return taken
        except FileNotFoundError:
            # Another worker was first.
            continue
    file, path = tempfile.mkstemp(dir=folder)
    os.close(file)
    return path


def memory_folder() -> str:
    """A new folder in /dev/shm; "" if the system has none."""
    try:
        return tempfile.mkdtemp(prefix="qwen3vl_jax-", dir=_FOLDER)
    except OSError:
        return ""
