"""Host tables: make_vision and make_batch. Numpy in, structs of numpy arrays out.

Whatever depends on an image's size or a prompt's length is worked out here and padded to BUCKETS,
so that the compiled functions never see it. Dims as in layers.py.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX, Config, VisionConfig
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Batch, VisionInputs, segment_bound
from qwen3vl_jax.processing import array_checks
from qwen3vl_jax.processing.array_checks import check_shape, grid_array, host_array, integers
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, to_hf_arrays
from qwen3vl_jax.processing.positions import frames_by_token, rope_index

# Seven sizes an octave, neighbours at most 12 % apart: eighths of one would be 12.5 %. They start a
# little over a power of two, for images often have one of patches, and a prompt a template besides.
_STEPS = (33, 36, 40, 44, 49, 54, 60)
# All are multiples of 8, up to over 2^20; short prompts share a few.
BUCKETS = (96, 144, 200, *(step << octave for octave in range(3, 16) for step in _STEPS))


def bucket(count: int) -> int:
    """The smallest size of BUCKETS that holds `count` tokens (or merged patches)."""
    if count > BUCKETS[-1]:
        raise InputError(f"{count} tokens are more than the largest bucket, {BUCKETS[-1]}")
    return next(size for size in BUCKETS if count <= size)


def make_vision(cfg: Config, pixels, grid_thw, pad: bool = True) -> VisionInputs:
    """Patch rows [sum(t h w), C] of images and videos, in merge order, and grids [n 3] -> VisionInputs.

    Padded to a bucket unless pad is False. Raises InputError when rows and grids do not match.
    """
    c = cfg.vision
    grid = grid_array("grid_thw", grid_thw, c.spatial_merge_size)
    pixels = np.asarray(host_array(pixels), np.float32)
    count, width = int(grid.prod(1).sum()), int(np.prod(c.patch_shape))
    if pixels.shape != (count, width):
        origin = f"the grids {grid.tolist()} and patches of {c.patch_shape}"
        check_shape("pixel_values", pixels, (count, width), f"({count}, {width}) from {origin}")
    none = np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32), np.zeros((0, 2), np.int32)
    tables = [none, *(_frame_tables(c, h, w) for t, h, w in grid.tolist() for _ in range(t))]
    sizes = [len(x[0]) for x in tables[1:]]
    index, weights, coords = map(np.concatenate, zip(*tables, strict=True))
    ends = np.cumsum(sizes, dtype=np.int32)
    lo, hi = (np.repeat(x, sizes).astype(np.int32) for x in (ends - sizes, ends))
    rows = c.merge_unit * bucket(-(-count // c.merge_unit)) if pad else count
    out = (fit(x, rows, axis=0) for x in (pixels, index, weights, coords, lo, hi))
    # A power of two of at least the frames, and of the frames of 256 patches that would fit. It is part
    # of a compiled program: images of usual sizes then share that of their bucket.
    frames = 1 << (max(len(sizes), rows // 256, 2) - 1).bit_length()
    return VisionInputs(*out, frames=frames)


def merge_order(h: int, w: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch of an h x w frame, block after block of merge x merge patches."""
    at = np.arange(h * w).reshape(h // merge, merge, w // merge, merge)
    at = at.transpose(0, 2, 1, 3).reshape(-1)
    return at // w, at % w


def _frame_tables(c: VisionConfig, h: int, w: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours [hw 4] and their bilinear weights (align_corners) in the position table, places [hw 2]."""
    side = c.grid_side
    row, col = merge_order(h, w, c.spatial_merge_size)

    def axis(count: int, at: np.ndarray):
        u = np.linspace(0, side - 1, count)[at]
        low = np.floor(u).astype(np.int32)
        return low, np.minimum(low + 1, side - 1), u - low

    (r0, r1, dr), (c0, c1, dc) = axis(h, row), axis(w, col)
    index = np.stack([r0 * side + c0, r0 * side + c1, r1 * side + c0, r1 * side + c1], 1)
    weights = np.stack([(1 - dr) * (1 - dc), (1 - dr) * dc, dr * (1 - dc), dr * dc], 1)
    coords = np.stack([row, col], 1).astype(np.int32)
    return index.astype(np.int32), weights.astype(np.float32), coords


# Keys that processors return, ours and transformers', and that hold nothing we need.
_DROPPED = ("mm_token_type_ids", "token_type_ids", "second_per_grid_ts", "video_metadata")


def make_batch(
    cfg: Config,
    *,
    input_ids=None,
    attention_mask=None,
    pixel_values=None,
    image_grid_thw=None,
    pixel_values_videos=None,
    video_grid_thw=None,
    labels=None,
    position_ids=None,
    inputs_embeds=None,
    segment_ids=None,
    pad: bool = True,
    **dropped: Any,
) -> Batch:
    """The arrays of a processor (ours, or transformers' 4.57 and 5; any array type) -> Batch.

    Rows, padded on either side, are padded on the right to a bucket unless pad is False. inputs_embeds
    [B T D] stand in for input_ids or for their embeddings. position_ids [B T] or [3 B T] and segment_ids
    [B T] (0 padding, 1.. packed samples) are for those who make their own; grids without pixels are for a
    call with `features=`. Raises InputError for arguments that do not fit together.
    """
    if unknown := [k for k in dropped if k not in _DROPPED]:
        raise InputError(f"make_batch: unknown arguments {', '.join(unknown)}")
    given = input_ids, attention_mask, inputs_embeds, labels
    ids, mask, embeds, labels = _checked_rows(cfg, *given)
    grids = image_grid_thw, video_grid_thw
    segments, positions, delta = _positions(cfg, ids, mask, segment_ids, position_ids, grids)
    merge = cfg.vision.spatial_merge_size
    image_grid = grid_array("image_grid_thw", image_grid_thw, merge)
    video_grid = grid_array("video_grid_thw", video_grid_thw, merge)
    vision = _vision(cfg, pixel_values, image_grid, pixel_values_videos, video_grid, pad)
    width = bucket(ids.shape[1]) if pad else ids.shape[1]
    has_vision = len(image_grid) + len(video_grid) > 0
    rows = _vision_rows(cfg, np.where(mask, ids, -1), image_grid) if has_vision else None
    return Batch(
        tokens=fit(ids, width),
        positions=fit(positions, width, axis=2),
        segment_ids=fit(segments, width),
        vision_rows=fit(rows, width, fill=-1),
        delta=cast(Any, delta),
        vision=vision,
        labels=fit(labels, width, fill=IGNORE_INDEX),
        embeds=fit(embeds, width),
        segments=segment_bound(_most_runs(segments)),
    )


def fit(x: np.ndarray | None, width: int, axis: int = 1, fill: int = 0) -> Any:
    if x is None:
        return None
    extra = [(0, width - size if i == axis else 0) for i, size in enumerate(x.shape)]
    return np.pad(x, extra, constant_values=fill)


def group_size(rows: int) -> int:
    """The number of prompts that are prefilled together for `rows` rows of the engine."""
    return max(1, rows // 8)


def group_batch(cfg: Config, prompts: Sequence[EncodedPrompt], width: int) -> Batch:
    """Prompts as a Batch [A width] without pixels: its vision rows count `in_feature_order`."""
    arrays = to_hf_arrays(cfg, prompts, with_pixels=False)
    for name in ("input_ids", "attention_mask"):
        arrays[name] = fit(arrays[name], width)
    return make_batch(cfg, pad=False, **arrays)


def _checked_rows(cfg: Config, input_ids, attention_mask, inputs_embeds, labels):
    """Ids and mask [B T], embeddings [B T D] and labels [B T] or None; ids of embeddings are no tokens."""
    if input_ids is None and inputs_embeds is None:
        raise InputError("make_batch: expected input_ids or inputs_embeds, found neither")
    vocabulary, given = cfg.text.vocab_size, input_ids is not None
    embeds = None if inputs_embeds is None else host_array(inputs_embeds)
    input_ids = input_ids if embeds is None or given else np.full(embeds.shape[:2], vocabulary)
    ids, mask = array_checks.ids_and_mask(input_ids, attention_mask)
    if not ids.size or not mask.any(axis=1).all():
        empty = int(np.argmin(mask.any(axis=1))) if ids.size else 0
        raise InputError(f"input_ids: row {empty} of shape {ids.shape} has no attended token")
    if given:
        array_checks.check_ids("input_ids", ids[mask], vocabulary)
    if labels is not None:
        labels = array_checks.check_labels("labels", labels, vocabulary)
        check_shape("labels", labels, ids.shape, f"that of input_ids {ids.shape}")
    if embeds is not None:
        check_shape("inputs_embeds", embeds, (*ids.shape, cfg.text.hidden_size))
    return ids, mask, embeds, labels


def _positions(cfg, ids, mask, segment_ids, position_ids, grids) -> tuple[np.ndarray, ...]:
    """Segment ids [B T] (0 at padding), positions [3 B T] and delta [B], int32. Raises InputError."""
    segments = mask.astype(np.int32)
    starts = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if segment_ids is not None:
        segments = integers("segment_ids", segment_ids).astype(np.int32)
        check_shape("segment_ids", segments, mask.shape)
        segments = np.where(mask, segments, 0)
    elif (starts > 1).any():
        row = int(np.argmax(starts > 1))
        found = f"row {row} has {int(starts[row])} runs of ones, expected one"
        advice = "padding is at the ends of a row, packed rows use segment_ids"
        raise InputError(f"attention_mask: {found}; {advice}")
    if position_ids is None:
        if segments.max(initial=0) > 1:
            raise InputError("make_batch: packed rows (segment_ids over 1) need their position_ids")
        return segments, *rope_index(cfg, ids, grids[0], grids[1], mask)
    positions = integers("position_ids", position_ids, as_floats=True).astype(np.int32)
    if positions.shape == ids.shape:
        positions = np.broadcast_to(positions, (3, *ids.shape))
    check_shape("position_ids", positions, (3, *ids.shape), f"{ids.shape} or (3, B, T)")
    for token, frames in frames_by_token(cfg, *grids).items():
        need, found = sum(h * w for h, w in frames), int(((ids == token) & mask).sum())
        if need != found:
            raise InputError(f"input_ids: {found} placeholders (token {token}), grids need {need}")
    top = np.where(segments > 0, positions.max(0), -1).max(1)
    return segments, positions, (top + 1 - (segments > 0).sum(1)).astype(np.int32)


def _vision(cfg, pixel_values, image_grid, pixel_values_videos, video_grid, pad):
    """Images first, then videos, as one VisionInputs; None for text or where features are kept."""
    given = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos}
    grids = [image_grid, video_grid]
    for (name, pixels), grid in zip(given.items(), grids, strict=True):
        if pixels is not None and len(grid) == 0:
            raise InputError(f"make_batch: {name} came without its grids")
    parts = [np.asarray(host_array(x), np.float32) for x in given.values() if x is not None]
    if not parts:
        return None
    if len(parts) < sum(len(grid) > 0 for grid in grids):
        raise InputError("make_batch: images and videos: the pixels of one of them are missing")
    return make_vision(cfg, np.concatenate(parts), np.concatenate(grids), pad)


def _vision_rows(cfg: Config, ids: np.ndarray, image_grid: np.ndarray) -> np.ndarray:
    """For each placeholder its row of the vision features, else -1; ids is -1 at padding."""
    rows = np.full(ids.shape, -1, np.int32)
    images = int(image_grid.prod(1).sum()) // cfg.vision.merge_unit
    for token, first in ((cfg.image_token_id, 0), (cfg.video_token_id, images)):
        at = ids == token
        rows[at] = first + np.arange(at.sum())
    return rows


def _most_runs(segments: np.ndarray) -> int:
    """The most segments of a row [B T]: an id that comes again after another begins a new one."""
    begins = (np.diff(segments, axis=1, prepend=0) != 0) & (segments != 0)
    return int(begins.sum(1).max(initial=0))
