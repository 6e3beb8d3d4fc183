"""Packs samples into batches of one fixed shape, in numpy on the host. Dims as in layers.py.

First fit: tokens go to the first of B rows of T with room, patches to the first of W rows of P. An
image, or a frame of a video, is in one row; a video may span rows, since its frames attend only to
themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.struct
import jax
import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Batch, VisionInputs
from qwen3vl_jax.processing.batch import make_vision
from qwen3vl_jax.training.data.buffer_pool import BufferPool
from qwen3vl_jax.training.recipe import Pack

if TYPE_CHECKING:
    from qwen3vl_jax.training.data.sample import Sample

Grid = tuple[int, int, int]


class PackedBatch(flax.struct.PyTreeNode):
    """Rows of several samples each. Padding has segment 0, weight 0 and label -100.

    batch.vision has fields [W P ..], with ranges counted inside a row; batch.vision_rows counts the
    features of all rows. Pixels are uint8 before normalisation, or float32.
    """

    batch: Batch
    # [B T] float32, of each label in the loss; 0 at a sample's first token.
    weights: jax.Array
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
        self.tokens, self.patches = (
            [pack.length] * pack.rows,
            [pack.vision_length] * pack.vision_rows,
        )
        self.left = pack.rows * pack.length

    def place(self, sample: Sample) -> PackedSample | None:
        """Places a sample in the first rows with room, or gives None and changes nothing."""
        size = len(sample.ids)
        row = _first(self.tokens, size)
        if row is None:
            return None
        spots: list[list[tuple[int, int]]] = []
        if sample.images:
            before = self.patches.copy()
            for image in sample.images:
                spot = self.fit_frames(image.grid)
                if spot is None:
                    self.patches = before
                    return None
                spots.append(spot)
        start = self.length - self.tokens[row]
        self.tokens[row] -= size
        self.left -= size
        return PackedSample(sample, row, start, spots)

    def fit_frames(self, grid: Grid) -> list[tuple[int, int]] | None:
        """Places t frames of h x w patches: [(first patch over all rows, patches)], or None."""
        left, frame = grid[0], grid[1] * grid[2]
        spot: list[tuple[int, int]] = []
        row = _first(self.patches, frame)
        while row is not None:
            free = self.patches[row]
            count = min(left, free // frame) * frame
            spot.append(((row + 1) * self.vision_length - free, count))
            self.patches[row] -= count
            left -= count // frame
            if not left:
                return spot
            row = _first(self.patches, frame, row + 1)
        return None


def _first(free: Sequence[int], size: int, start: int = 0) -> int | None:
    """The first row from `start` on with room."""
    for row in range(start, len(free)):
        if free[row] >= size:
            return row
    return None


def frames_fit(pack: Pack, grids: Sequence[Grid]) -> bool:
    """Whether the images and videos of one sample fit an empty batch."""
    room = FreeSpace(pack)
    return all(room.fit_frames(grid) is not None for grid in grids)


def choose(
    pack: Pack, pending: Sequence[Pending], draw: Callable[[], Pending | None]
) -> tuple[list[PackedSample], list[Pending]]:
    """(samples of one batch by first fit, pending samples), both in stream order.

    Draws until pack.lookahead samples do not fit, or draw() gives None. The first pending sample always
    fits the next, empty batch.
    """
    room, chosen, left = FreeSpace(pack), [], []
    coming = iter(pending)
    while room.left and len(left) < max(pack.lookahead, 1):
        each = next(coming, None) or draw()
        if each is None:
            break
        spot = room.place(each.sample)
        if spot is None:
            left.append(each)
        else:
            chosen.append(spot)
    return chosen, [*left, *coming]


def build(
    cfg: Config, pack: Pack, chosen: Sequence[PackedSample], pixel_type: Any, with_labels: bool,
    buffers: BufferPool | None = None,
) -> PackedBatch:  # fmt: skip
    """The arrays of a batch. with_labels: with vision_labels. buffers: memory for the pixels.

    Samples follow each other from the start of a row, so each field is one concatenation. Raises
    InputError for pixels of another dtype.
    """
    chosen = sorted(chosen, key=lambda p: (p.row, p.start))
    samples, seen = [p.sample for p in chosen], [p for p in chosen if p.spots]
    rows, starts = (np.array([getattr(p, name) for p in chosen], int) for name in ("row", "start"))
    filler = _RowFiller(
        rows, np.array([len(s.ids) for s in samples], int), (pack.rows, pack.length)
    )
    tokens = filler([s.ids for s in samples], np.int32)
    labels = filler([s.labels for s in samples], np.int32, IGNORE_INDEX)
    weights: Any = filler([s.weights for s in samples], np.float32)
    labels[rows, starts], weights[rows, starts] = IGNORE_INDEX, 0.0
    number = np.arange(1, len(rows) + 1) - np.searchsorted(rows, rows)
    vision_rows = vision = None
    named: Any = None
    if pack.vision_rows:
        merged = _merged_rows(cfg, seen)
        at = (tokens == cfg.image_token_id) | (tokens == cfg.video_token_id)
        at &= filler.each(np.array([bool(p.spots) for p in chosen], bool))
        vision_rows = np.full(at.shape, -1, np.int32)
        vision_rows[at] = merged
        vision = _vision(cfg, pack, seen, _pixels(cfg, pack, pixel_type, buffers or BufferPool()))
        named = _vision_labels(cfg, pack, seen, merged) if with_labels else None
    host: dict[str, Any] = {
        "tokens": tokens,
        "positions": filler([s.positions for s in samples], np.int32, before=(3,)),
        "segment_ids": filler.each(number.astype(np.int32)),
        "vision_rows": vision_rows,
        "delta": np.zeros(pack.rows, np.int32),
        "labels": labels,
    }
    return PackedBatch(Batch(vision=vision, **host), weights=weights, vision_labels=named)


class _RowFiller:
    """Concatenates arrays into padded rows of one shape."""

    def __init__(self, rows: np.ndarray, sizes: np.ndarray, shape: tuple[int, int]):
        """rows, sizes [n]: the row and length of each part, in order."""
        self._shape = shape
        self.used = np.bincount(rows, sizes, minlength=shape[0]).astype(int)  # [rows]
        ends = np.cumsum(np.bincount(rows, minlength=shape[0]))
        self._parts = list(zip([0, *ends.tolist()], ends.tolist(), (shape[1] - self.used).tolist()))
        # Indices of the parts among parts and paddings.
        self._given = np.arange(len(rows)) + rows
        self._sizes = np.empty(len(rows) + shape[0], int)
        self._sizes[self._given] = sizes
        self._sizes[ends + np.arange(shape[0])] = shape[1] - self.used

    def __call__(
        self, parts: Sequence[np.ndarray], dtype: Any, fill: int = 0,
        before: tuple[int, ...] = (), after: tuple[int, ...] = (),
    ) -> np.ndarray:  # fmt: skip
        """Parts [before t after] -> [before, *shape, after], padded with `fill`."""
        padding = np.full((*before, self._shape[1], *after), fill, dtype)
        pieces = []
        for first, end, left in self._parts:
            pieces += parts[first:end]
            pieces.append(padding[(*[slice(None)] * len(before), slice(left))])
        joined = np.concatenate(pieces, len(before), dtype=dtype)
        return joined.reshape(*before, *self._shape, *after)

    def each(self, values: np.ndarray) -> np.ndarray:
        """Repeats one value [n] over each part; 0 for padding."""
        spread = np.zeros(len(self._sizes), values.dtype)
        spread[self._given] = values
        return np.repeat(spread, self._sizes).reshape(self._shape)


def _merged_rows(cfg: Config, seen: Sequence[PackedSample]) -> np.ndarray:
    """The feature index of each placeholder of samples, in order."""
    spots = [spot for p in seen for visual in p.spots for spot in visual]
    first, count = np.array(spots, int).reshape(-1, 2).T // cfg.vision.merge_unit
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())


def _vision_labels(
    cfg: Config, pack: Pack, seen: Sequence[PackedSample], merged: np.ndarray
) -> np.ndarray:
    """The label of each image feature of a batch [R]."""
    unit = cfg.vision.merge_unit
    out = np.full(pack.vision_rows * pack.vision_length // unit, IGNORE_INDEX, np.int32)
    labelled = [np.zeros(0, np.int32)]
    for sample, _, _, spots in seen:
        count = sum(n for spot in spots for _, n in spot) // unit
        labels = sample.vision_labels
        labelled.append(np.full(count, IGNORE_INDEX) if labels is None else labels)
    out[merged] = np.concatenate(labelled)
    return out


def _pixels(cfg: Config, pack: Pack, pixel_type: Any, buffers: BufferPool) -> np.ndarray:
    """An uninitialised array for the pixels of all patches: zeros would be written twice."""
    shape = pack.vision_rows * pack.vision_length, int(np.prod(cfg.vision.patch_shape))
    size = shape[0] * shape[1] * np.dtype(pixel_type).itemsize
    return buffers.empty(size).view(pixel_type).reshape(shape)


def _vision(
    cfg: Config, pack: Pack, seen: Sequence[PackedSample], pixels: np.ndarray
) -> VisionInputs:
    """The images and videos of samples as VisionInputs [W P ..]. Padding attends to nothing."""
    # (first patch over all rows, tables)
    frames: list[tuple[int, VisionInputs]] = []
    # Beside the cache of `_frame`, because hashing a config takes longer than writing an image.
    known: dict[Any, VisionInputs] = {}
    for sample, _, _, spots in seen:
        for image, spot in zip(sample.images, spots, strict=True):
            (_, h, w), done = image.grid, 0
            table, frame = known.get((h, w)), h * w
            if table is None:
                table = known[h, w] = _frame(cfg, h, w)
            for first, count in spot:
                given = _as_type(image.patches[done : done + count], pixels.dtype)
                _write(pixels[first : first + count], given, cfg.vision.patch_shape)
                frames += [(at, table) for at in range(first, first + count, frame)]
                done += count
    frames.sort(key=lambda frame: frame[0])
    tables: list[Any] = [table for _, table in frames]
    shape = (pack.vision_rows, pack.vision_length)
    sizes = np.array([len(table.coords) for table in tables], int)
    row, first = divmod(np.array([at for at, _ in frames], int), shape[1])
    filler = _RowFiller(row, sizes, shape)
    for number, used in enumerate(filler.used.tolist()):
        pixels[number * shape[1] + used : (number + 1) * shape[1]] = 0
    host: dict[str, Any] = {
        "pixels": pixels.reshape(*shape, -1),
        "pos_index": filler([table.pos_index for table in tables], np.int32, after=(4,)),
        "pos_weight": filler([table.pos_weight for table in tables], np.float32, after=(4,)),
        "coords": filler([table.coords for table in tables], np.int32, after=(2,)),
        "lo": filler.each(first.astype(np.int32)),
        "hi": filler.each((first + sizes).astype(np.int32)),
    }
    return VisionInputs(**host)


@functools.lru_cache(maxsize=1024)
def _frame(cfg: Config, h: int, w: int) -> VisionInputs:
    """The tables of one frame, with empty pixels."""
    pixels = np.zeros((h * w, int(np.prod(cfg.vision.patch_shape))), np.float32)
    made = make_vision(cfg, pixels, [(1, h, w)], pad=False)
    return made.replace(pixels=np.zeros(0, np.float32))


def one_frame(pixels: np.ndarray, patch_shape: tuple[int, ...]) -> np.ndarray:
    """uint8 patches [p C] without their second frame, [p C/2], if both frames are equal, as in images.

    patch_shape: (channels, 2, height, width). Other patches, and floats, stay as they are.
    """
    if pixels.dtype != np.uint8 or patch_shape[1] != 2:
        return pixels
    frames = pixels.reshape(-1, patch_shape[0], 2, patch_shape[2] * patch_shape[3])
    if not np.array_equal(frames[:, :, 0], frames[:, :, 1]):
        return pixels
    return np.ascontiguousarray(frames[:, :, 0]).reshape(len(pixels), -1)


def _write(out: np.ndarray, pixels: np.ndarray, patch_shape: tuple[int, ...]) -> None:
    """Writes patches into out [p C], a frame that `one_frame` has left twice."""
    if pixels.shape == out.shape:
        out[:] = pixels
    else:
        frames = out.reshape(len(out), patch_shape[0], 2, -1)
        frames[:] = pixels.reshape(len(out), patch_shape[0], 1, -1)


def _as_type(pixels: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Pixels in the batch's dtype: uint8, or normalised float32. Raises InputError."""
    if pixels.dtype == wanted:
        return pixels
    if wanted == np.float32 and pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 127.5 - 1
    raise InputError(f"pixels are {pixels.dtype}, expected {wanted} before normalisation")


def fill_of(pack: Pack, chosen: Sequence[PackedSample]) -> dict[str, float]:
    """The filled fractions of a batch's tokens and patches, and counts.

    pairs, patch_pairs: pairs of tokens and of patches of which one attends to the other.
    """
    tokens = sum(len(p.sample.ids) for p in chosen)
    grids = [v.grid for p in chosen for v in p.sample.images]
    patches = sum(t * h * w for t, h, w in grids)
    return {
        "fill": tokens / (pack.rows * pack.length),
        "vision_fill": patches / max(pack.vision_rows * pack.vision_length, 1),
        "samples": float(len(chosen)),
        "tokens": float(tokens),
        "patches": float(patches),
        "pairs": float(sum(n * (n + 1) // 2 for n in (len(p.sample.ids) for p in chosen))),
        "patch_pairs": float(sum(t * (h * w) ** 2 for t, h, w in grids)),
    }
