"""Samples to batches of one fixed shape. Numpy on the host; dims as in layers.py.

Tokens go to the first of B rows of T that has room, patches to the first of W rows of P: a picture,
or a frame of a clip, lies in one row. Frames attend each to itself, so a clip may go over several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.struct
import jax
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.batch import make_vision
from qwen3vl_jax.structs import Batch, VisionInputs
from qwen3vl_jax.training.recipe import Pack

if TYPE_CHECKING:
    from qwen3vl_jax.training.samples import Sample

IGNORED = -100
Grid = tuple[int, int, int]


class PackedBatch(flax.struct.PyTreeNode):
    """Rows of several samples each; padding has segment 0, weight 0 and label -100.

    The fields of batch.vision are [W P ..] with ranges counted inside a row, and batch.vision_rows
    counts the merged rows of all of them. Its pixels are uint8 before normalisation, or float32.
    """

    batch: Batch
    weights: jax.Array  # [B T] float32 of each label in the loss; 0 at a sample's first token
    vision_labels: jax.Array | None = None  # [R] int32: what a merged row shows, -100 not told


class Waiting(NamedTuple):
    """A sample that is drawn and not packed, and its place in the stream that it came from."""

    place: int
    sample: Sample


class Placed(NamedTuple):
    """A sample and where it went."""

    sample: Sample
    row: int
    start: int  # its first token in the row
    spots: list[list[tuple[int, int]]]  # of each visual: first patch over all rows, patches


class Room:
    """What is still free in a batch."""

    def __init__(self, pack: Pack):
        self.length, self.vision_length = pack.length, pack.vision_length
        self.tokens = np.full(pack.rows, pack.length)
        self.patches = np.full(pack.vision_rows, pack.vision_length)

    def place(self, sample: Sample) -> Placed | None:
        """Takes the room of a sample, the first there is, or leaves all as it was for None."""
        size = len(sample.ids)
        row = int((self.tokens >= size).argmax())
        if self.tokens[row] < size:
            return None
        spots: list[list[tuple[int, int]]] = []
        if sample.visuals:
            before = self.patches.copy()
            for visual in sample.visuals:
                spot = self.spread(visual.grid)
                if spot is None:
                    self.patches = before
                    return None
                spots.append(spot)
        start = self.length - int(self.tokens[row])
        self.tokens[row] -= size
        return Placed(sample, row, start, spots)

    def spread(self, grid: Grid) -> list[tuple[int, int]] | None:
        """Takes the room of t frames of h x w patches: (first patch over all rows, patches), or None."""
        left, frame = grid[0], grid[1] * grid[2]
        spot: list[tuple[int, int]] = []
        if left == 1:  # most are pictures: one look is enough
            row = int((self.patches >= frame).argmax())
            free = int(self.patches[row])
            self.patches[row] -= frame if frame <= free else 0
            return [((row + 1) * self.vision_length - free, frame)] if frame <= free else None
        for row in np.flatnonzero(self.patches >= frame).tolist():
            free = int(self.patches[row])
            count = min(left, free // frame) * frame
            spot.append(((row + 1) * self.vision_length - free, count))
            self.patches[row] -= count
            left -= count // frame
            if not left:
                return spot
        return None


def frames_fit(pack: Pack, grids: Sequence[Grid]) -> bool:
    """Whether pictures and clips of one sample fit an empty batch."""
    room = Room(pack)
    return all(room.spread(grid) is not None for grid in grids)


def choose(
    pack: Pack, waiting: Sequence[Waiting], draw: Callable[[], Waiting | None]
) -> tuple[list[Placed], list[Waiting]]:
    """The samples of one batch by first fit, in the order in which they were drawn, and those left.

    Samples are drawn until pack.lookahead of them wait that do not fit, or draw() has no more. The
    first that waits always fits an empty batch, so none waits for long.
    """
    room, placed, left = Room(pack), [], []
    coming = iter(waiting)
    while room.tokens.any() and len(left) < max(pack.lookahead, 1):
        drawn = next(coming, None) or draw()
        if drawn is None:
            break
        spot = room.place(drawn.sample)
        if spot is None:
            left.append(drawn)
        else:
            placed.append(spot)
    return placed, [*left, *coming]


def build(
    cfg: Config, pack: Pack, placed: Sequence[Placed], pixel_type: Any, with_labels: bool
) -> PackedBatch:
    """The arrays of chosen samples; with_labels: vision_labels are wanted. Raises InputError."""
    shape, patches = (pack.rows, pack.length), pack.vision_rows * pack.vision_length
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    labels, vision_rows = np.full(shape, IGNORED, np.int32), np.full(shape, -1, np.int32)
    positions, weights = np.zeros((3, *shape), np.int32), np.zeros(shape, np.float32)
    vision = _Vision(cfg, pack, pixel_type) if patches else None
    named = np.full(patches // cfg.vision.merge_unit, IGNORED, np.int32)
    count = [0] * pack.rows
    for sample, row, start, spots in placed:
        count[row] += 1
        at = slice(start, start + len(sample.ids))
        tokens[row, at], segments[row, at] = sample.ids, count[row]
        labels[row, at], weights[row, at] = sample.labels, sample.weights
        positions[:, row, at] = sample.positions
        labels[row, start], weights[row, start] = IGNORED, 0.0
        if vision is None or not spots:
            continue
        seen = vision.add(sample, spots)
        places = (sample.ids == cfg.image_token_id) | (sample.ids == cfg.video_token_id)
        vision_rows[row, at][places] = seen
        if sample.vision_labels is not None:
            named[seen] = sample.vision_labels
    fields: Any = (tokens, positions, segments, vision_rows if patches else None)
    batch = Batch(
        *fields,
        delta=np.zeros(pack.rows, np.int32),  # type: ignore[arg-type]
        vision=vision.inputs() if vision else None,
        labels=labels,  # type: ignore[arg-type]
    )
    told: Any = named if with_labels and patches else None
    return PackedBatch(batch, weights, told)  # type: ignore[arg-type]


class _Vision:
    """Vision inputs of W rows of P patches, filled visual by visual; padding sees nothing."""

    def __init__(self, cfg: Config, pack: Pack, pixel_type: Any):
        self.cfg, self.shape = cfg, (pack.vision_rows, pack.vision_length)
        total = pack.vision_rows * pack.vision_length
        self.pixels = np.zeros((total, int(np.prod(cfg.vision.patch_shape))), pixel_type)
        self.pos_index = np.zeros((total, 4), np.int32)
        self.pos_weight = np.zeros((total, 4), np.float32)
        self.coords = np.zeros((total, 2), np.int32)
        self.lo, self.hi = np.zeros(total, np.int32), np.zeros(total, np.int32)

    def add(self, sample: Sample, spots: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
        """Writes the visuals of a sample; returns the merged row of each of its placeholders."""
        unit, rows = self.cfg.vision.merge_unit, []
        for visual, spot in zip(sample.visuals, spots, strict=True):
            _, h, w = visual.grid
            table, done = _frame(self.cfg, h, w), 0
            for first, count in spot:
                at = slice(first, first + count)
                self.pixels[at] = _as_type(visual.pixels[done : done + count], self.pixels.dtype)
                for name in ("pos_index", "pos_weight", "coords"):
                    field = getattr(self, name)[at]
                    field.reshape(-1, h * w, field.shape[1])[:] = getattr(table, name)
                start = np.arange(first % self.shape[1], first % self.shape[1] + count, h * w)
                self.lo[at].reshape(-1, h * w)[:] = start[:, None]
                self.hi[at].reshape(-1, h * w)[:] = start[:, None] + h * w
                rows.append(np.arange(first // unit, (first + count) // unit))
                done += count
        return np.concatenate(rows)

    def inputs(self) -> VisionInputs:
        """The rows as vision inputs [W P ..]."""
        names = ("pixels", "pos_index", "pos_weight", "coords", "lo", "hi")
        given: dict[str, Any] = {
            n: x.reshape(*self.shape, *x.shape[1:])
            for n, x in ((n, getattr(self, n)) for n in names)
        }
        return VisionInputs(**given)


@functools.lru_cache(maxsize=1024)
def _frame(cfg: Config, h: int, w: int) -> VisionInputs:
    """The tables of one frame; its pixels are nothing."""
    pixels = np.zeros((h * w, int(np.prod(cfg.vision.patch_shape))), np.float32)
    made = make_vision(cfg, pixels, [(1, h, w)], pad=False)
    return made.replace(pixels=np.zeros(0, np.float32))


def _as_type(pixels: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Pixels of a sample as the batch holds them: 8-bit values, or normalised ones. Raises InputError."""
    if pixels.dtype == wanted:
        return pixels
    if wanted == np.float32 and pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 127.5 - 1
    raise InputError(f"pixels are {pixels.dtype}, expected {wanted} before normalisation")


def fill_of(pack: Pack, placed: Sequence[Placed]) -> dict[str, float]:
    """How full a batch is: shares of its tokens and patches, and counts."""
    tokens = sum(len(p.sample.ids) for p in placed)
    patches = sum(len(v.pixels) for p in placed for v in p.sample.visuals)
    return {
        "fill": tokens / (pack.rows * pack.length),
        "vision_fill": patches / max(pack.vision_rows * pack.vision_length, 1),
        "samples": float(len(placed)),
        "tokens": float(tokens),
        "patches": float(patches),
    }
