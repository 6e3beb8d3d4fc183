"""Packs samples into batches of one fixed shape, in numpy on the host. Dims as in layers.py.

First fit: tokens go to the first of B rows of T with room, patches to the first of W rows of P. An
image, or a frame of a video, is in one row; a video may span rows, since its frames attend only to
themselves.
"""

import functools
import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Batch, VisionInputs
from qwen3vl_jax.processing.batch import make_vision
from qwen3vl_jax.training.data.sample import Sample
from qwen3vl_jax.training.recipe import Pack


class PackedBatch(flax.struct.PyTreeNode):
    """Rows of several samples each. Padding has segment 0, weight 0 and label -100.

    batch.vision has fields [W P ..], with ranges counted inside a row; batch.vision_rows counts the
    features of all rows. Pixels are uint8 before normalisation, or float32.
    """

    batch: Batch
    weights: jax.Array  # [B T] float32, of each label in the loss; 0 at a sample's first token
    # [R] int32, a token that names each image feature, or -100.
    vision_labels: jax.Array | None = None


class Pending(NamedTuple):
    """A sample that is not packed yet, and its place in the stream."""

    place: int
    sample: Sample


class PackedSample(NamedTuple):
    """A sample and its position in the batch."""

    sample: Sample
    row: int
    start: int  # its first token in the row
    spots: list[list[tuple[int, int]]]  # of each image: first patch over all rows, patches


class FreeSpace:
    """The free space of a batch. Lists are faster than numpy for a few rows."""

    def __init__(self, pack: Pack):
        self.length, self.vision_length = pack.length, pack.vision_length
        self.tokens = [pack.length] * pack.rows
        self.patches = [pack.vision_length] * pack.vision_rows

    def place(self, sample: Sample) -> PackedSample | None:
        """Places a sample in the first rows with room, or gives None and changes nothing."""
        size, before, spots = len(sample.ids), self.patches.copy(), []
        row = next((row for row, free in enumerate(self.tokens) if free >= size), None)
        if row is None:
            return None
        for image in sample.images:
            if (spot := self.fit_frames(image.grid)) is None:
                self.patches = before
                return None
            spots.append(spot)
        start = self.length - self.tokens[row]
        self.tokens[row] -= size
        return PackedSample(sample, row, start, spots)

    def fit_frames(self, grid: tuple[int, int, int]) -> list[tuple[int, int]] | None:
        """Places t frames of h x w patches: [(first patch over all rows, patches)], or None."""
        frame, spot = grid[1] * grid[2], []
        left = grid[0] * frame
        for row, free in enumerate(self.patches):
            if free >= frame:
                count = min(left, free - free % frame)
                spot.append(((row + 1) * self.vision_length - free, count))
                self.patches[row] -= count
                left -= count
                if not left:
                    return spot
        return None


def choose(
    pack: Pack, pending: Sequence[Pending], draw: Callable[[], Pending | None]
) -> tuple[list[PackedSample], list[Pending]]:
    """(samples of one batch by first fit, pending samples), both in stream order.

    Draws until pack.lookahead samples do not fit, or draw() gives None. The first pending sample always
    fits the next, empty batch.
    """
    room, chosen, left = FreeSpace(pack), [], []
    coming = iter(pending)
    while any(room.tokens) and len(left) < max(pack.lookahead, 1):
        if (each := next(coming, None) or draw()) is None:
            break
        if (spot := room.place(each.sample)) is None:
            left.append(each)
        else:
            chosen.append(spot)
    return chosen, [*left, *coming]


class BufferPool:
    """Arrays whose memory is used again once nothing refers to them or to a view of them.

    Allocating fresh pages for every batch costs more than filling them.
    """

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


def build(
    cfg: Config,
    pack: Pack,
    chosen: Sequence[PackedSample],
    pixel_type: Any,
    with_labels: bool,
    buffers: BufferPool | None = None,
) -> PackedBatch:
    """The arrays of a batch. with_labels: with vision_labels. Raises InputError for another pixel_type."""
    chosen = sorted(chosen, key=lambda p: (p.row, p.start))
    samples, seen = [p.sample for p in chosen], [p for p in chosen if p.spots]
    row = np.array([p.row for p in chosen], int)
    starts = row * pack.length + np.array([p.start for p in chosen], int)
    into_rows = _RowFiller((pack.rows, pack.length), starts, [len(s.ids) for s in samples])
    tokens = into_rows([s.ids for s in samples], np.int32)
    labels = into_rows([s.labels for s in samples], np.int32, IGNORE_INDEX)
    weights = into_rows([s.weights for s in samples], np.float32)
    labels.flat[starts], weights.flat[starts] = IGNORE_INDEX, 0.0
    positions = [into_rows([s.positions[i] for s in samples], np.int32) for i in range(3)]
    number = np.arange(1, len(row) + 1) - np.searchsorted(row, row)
    vision_rows = vision = named = None
    if pack.vision_rows:
        spots = [spot for p in seen for visual in p.spots for spot in visual]
        merged = _consecutive(*np.array(spots, int).reshape(-1, 2).T // cfg.vision.merge_unit)
        at = (tokens == cfg.image_token_id) | (tokens == cfg.video_token_id)
        at &= into_rows.each(np.array([bool(p.spots) for p in chosen], bool))
        vision_rows = np.full(at.shape, -1, np.int32)
        vision_rows[at] = merged
        vision = _vision(cfg, pack, seen, pixel_type, buffers or BufferPool())
        if with_labels:
            named = np.full(vision.lo.size // cfg.vision.merge_unit, IGNORE_INDEX, np.int32)
            named[merged] = _vision_labels(cfg, [p.sample for p in seen])
    host: dict[str, Any] = {
        "tokens": tokens,
        "positions": np.stack(positions),
        "segment_ids": into_rows.each(number.astype(np.int32)),
        "vision_rows": vision_rows,
        "delta": np.zeros(pack.rows, np.int32),
        "labels": labels,
    }
    return PackedBatch(Batch(vision=vision, **host), weights, cast(Any, named))


def _consecutive(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts [n], sizes [n] -> the numbers start .. start + size - 1 of each, joined."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(np.sum(sizes))


class _RowFiller:
    """Writes arrays, each at its place, into padded rows of one shape."""

    def __init__(self, shape: tuple[int, int], starts: np.ndarray, sizes: Any):
        """starts, sizes [n]: where each array begins over all rows, and its length."""
        self._shape, self._sizes = shape, np.array(sizes, int)
        self._at = _consecutive(starts, self._sizes)

    def __call__(
        self, parts: Sequence[np.ndarray], dtype: Any, fill: int = 0, after: tuple[int, ...] = ()
    ) -> Any:
        """Parts [t after] -> [*shape, after], padded with `fill`."""
        out = np.full((self._shape[0] * self._shape[1], *after), fill, dtype)
        if len(parts):
            out[self._at] = np.concatenate(parts, dtype=dtype)
        return out.reshape(*self._shape, *after)

    def each(self, values: np.ndarray) -> Any:
        """Repeats one value [n] over each array's place; 0 for padding."""
        return self([np.repeat(values, self._sizes)], values.dtype)


def _vision_labels(cfg: Config, samples: Sequence[Sample]) -> np.ndarray:
    """The label of each image feature of samples, in order."""
    found = [np.zeros(0, np.int32)]
    for sample in samples:
        count = sum(math.prod(image.grid) for image in sample.images) // cfg.vision.merge_unit
        labels = sample.vision_labels
        found.append(np.full(count, IGNORE_INDEX) if labels is None else labels)
    return np.concatenate(found)


def _vision(
    cfg: Config, pack: Pack, seen: Sequence[PackedSample], pixel_type: Any, buffers: BufferPool
) -> VisionInputs:
    """The images and videos of samples as VisionInputs [W P ..]. Padding attends to nothing."""
    shape, patch = (pack.vision_rows, pack.vision_length), cfg.vision.patch_shape
    memory = buffers.empty(math.prod((*shape, *patch)) * np.dtype(pixel_type).itemsize)
    # Not initialised: zeros would be written twice.
    pixels: Any = memory.view(pixel_type).reshape(-1, *patch)
    # (first patch over all rows, tables)
    frames: list[tuple[int, VisionInputs]] = []
    # Beside the cache of `_frame`, because hashing a config takes longer than writing an image.
    known: dict[Any, VisionInputs] = {}
    for sample, _, _, spots in seen:
        for image, spot in zip(sample.images, spots, strict=True):
            (_, h, w), done = image.grid, 0
            if (table := known.get((h, w))) is None:
                table = known[h, w] = _frame(cfg, h, w)
            for first, count in spot:
                given = _as_type(image.patches[done : done + count], pixels.dtype)
                # A frame that `one_frame` has left is written twice.
                pixels[first : first + count] = given.reshape(count, patch[0], -1, *patch[2:])
                frames += [(at, table) for at in range(first, first + count, h * w)]
                done += count
    tables: list[Any] = [table for _, table in frames]
    starts = np.array([at for at, _ in frames], int)
    sizes = np.array([len(table.coords) for table in tables], int)
    into_rows = _RowFiller(shape, starts, sizes)
    pixels[into_rows.each(sizes).ravel() == 0] = 0
    first = starts % pack.vision_length
    host: dict[str, Any] = {
        "pixels": pixels.reshape(*shape, -1),
        "pos_index": into_rows([table.pos_index for table in tables], np.int32, after=(4,)),
        "pos_weight": into_rows([table.pos_weight for table in tables], np.float32, after=(4,)),
        "coords": into_rows([table.coords for table in tables], np.int32, after=(2,)),
        "lo": into_rows.each(first.astype(np.int32)),
        "hi": into_rows.each((first + sizes).astype(np.int32)),
    }
    return VisionInputs(**host)


@functools.lru_cache(maxsize=1024)
def _frame(cfg: Config, h: int, w: int) -> VisionInputs:
    """The tables of one frame, with empty pixels."""
    pixels = np.zeros((h * w, math.prod(cfg.vision.patch_shape)), np.float32)
    made = make_vision(cfg, pixels, [(1, h, w)], pad=False)
    return made.replace(pixels=np.zeros(0, np.float32))


def one_frame(pixels: np.ndarray, patch_shape: tuple[int, ...]) -> np.ndarray:
    """uint8 patches [p C] without their second frame, [p C/2], if both frames are equal, as in images.

    patch_shape: (channels, 2, height, width). Other patches, and floats, stay as they are.
    """
    if pixels.dtype != np.uint8 or patch_shape[1] != 2:
        return pixels
    first, second = np.moveaxis(pixels.reshape(-1, *patch_shape), 2, 0)
    return first.reshape(len(pixels), -1) if np.array_equal(first, second) else pixels


def _as_type(pixels: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Pixels in the batch's dtype: uint8, or normalised float32. Raises InputError."""
    if pixels.dtype == wanted:
        return pixels
    if wanted == np.float32 and pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 127.5 - 1
    raise InputError(f"pixels are {pixels.dtype}, expected {wanted} before normalisation")


def most_segments(packed: PackedBatch) -> tuple[int, int]:
    """The most samples of a token row of a batch on the host, and the most frames of a patch row."""
    most, vision = int(np.max(packed.batch.segment_ids)), packed.batch.vision
    if vision is None:
        return most, 0
    starts = (vision.hi > vision.lo) & (vision.lo == np.arange(vision.lo.shape[-1]))
    return most, int(np.max(np.sum(starts, axis=-1)))


def with_segment_bounds(packed: PackedBatch, segments: int, frames: int) -> PackedBatch:
    """The batch for programs of at most so many samples and frames in a row, by `segment_bound`."""
    vision = packed.batch.vision and packed.batch.vision.replace(frames=frames)
    return packed.replace(batch=packed.batch.replace(vision=vision, segments=segments))


def for_one_program(batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """Batches with the same bounds of segments, so that a program takes them all."""
    bounds = [(p.batch.segments, p.batch.vision.frames if p.batch.vision else 0) for p in batches]
    most = [0 if 0 in each else max(each) for each in zip(*bounds, strict=True)]
    return [with_segment_bounds(packed, *most) for packed in batches]


def fill_of(pack: Pack, chosen: Sequence[PackedSample]) -> dict[str, float]:
    """The filled fractions of a batch's tokens and patches, and counts.

    pairs, patch_pairs: pairs of tokens and of patches of which one attends to the other.
    """
    sizes = [len(p.sample.ids) for p in chosen]
    grids = [v.grid for p in chosen for v in p.sample.images]
    patches = sum(map(math.prod, grids))
    return {
        "fill": sum(sizes) / (pack.rows * pack.length),
        "vision_fill": patches / max(pack.vision_rows * pack.vision_length, 1),
        "samples": float(len(chosen)),
        "tokens": float(sum(sizes)),
        "patches": float(patches),
        "pairs": float(sum(n * (n + 1) // 2 for n in sizes)),
        "patch_pairs": float(sum(t * (h * w) ** 2 for t, h, w in grids)),
    }
