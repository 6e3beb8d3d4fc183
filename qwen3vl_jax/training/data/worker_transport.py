"""Worker transport: groups of samples, as a worker sends them to the process that packs them.

All arrays of a group are one block, which grain moves through shared memory. Where that has no room the
block is bytes, which go through the pipe.
"""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_jax.processing.encoded_prompt import EncodedImage
from qwen3vl_jax.training.data.packing import one_frame
from qwen3vl_jax.training.data.sample import Refusal, Sample

# Where shared memory is a file system; often a small one, in containers.
_SHARED = "/dev/shm"
# Blocks that must have room: other workers write at the same time.
_SPARE = 16
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
    """What a block of arrays holds: refusals and samples, in order.

    The block has token fields [_FIELDS n], then vision labels, then each array of pixels.
    """

    items: list[Refusal | _SampleInfo]
    # Shapes and dtypes.
    pixels: list[tuple[tuple[int, ...], str]]

    def unpack(self, block: np.ndarray | bytes) -> list[Sample | Refusal]:
        """The group. Its arrays are views of the block."""
        block = np.frombuffer(block, np.uint8)
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
    patch_shape: tuple[int, ...], group: Sequence[Sample | Refusal]
) -> tuple[SampleBlock, np.ndarray | bytes]:
    """A group and its block of arrays. Images are sent as one frame, not two equal ones."""
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
    return SampleBlock(items, shapes), np.frombuffer(block, np.uint8) if _has_room(block) else block


def _has_room(block: bytes) -> bool:
    """Whether shared memory takes a block: a write past its end kills the process."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(_SHARED).free if os.access(_SHARED, os.W_OK) else 0
        return free > _SPARE * len(block)
    return False
