"""MRoPE position ids, worked out on the host from placeholders and grids. Dims as in layers.py."""

from __future__ import annotations

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError


def rope_index(
    cfg: Config, input_ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None
) -> tuple[np.ndarray, np.ndarray]:
    """MRoPE ids [3 B T] (T, H, W; 0 at padding) and delta [B] = max + 1 - attended length, int32.

    Text counts on all three axes together. An image, or one frame of a video, of h x w merged patches
    at count c gets (c, c + row, c + column) and moves the count by max(h, w). Text, image 1x2x3, text:

        T  0 1 2  2 2 2 2 2  5        H  0 1 2  2 2 3 3 3  5        W  0 1 2  3 4 2 3 4  5

    Raises InputError when placeholders and grids do not match. Source: reference get_rope_index.
    """
    ids, mask = ids_and_mask(input_ids, attention_mask)
    frames = frames_by_token(cfg, image_grid_thw, video_grid_thw)
    positions = np.zeros((3, *ids.shape), np.int32)
    delta = np.zeros(len(ids), np.int32)
    for b, row in enumerate(ids):
        place = np.flatnonzero(mask[b])
        index, top = _row_positions(row[place], frames)
        positions[:, b, place] = index
        delta[b] = top - len(place)
    for token, rest in frames.items():
        if rest:
            name = "image" if token == cfg.image_token_id else "video"
            raise InputError(
                f"{name}_grid_thw: {len(rest)} {name} grid(s) or frame(s) are left over; the prompt "
                f"has too few {name} placeholders (token {token})"
            )
    return positions, delta


def ids_and_mask(input_ids, attention_mask) -> tuple[np.ndarray, np.ndarray]:
    """input_ids as int32 [B T] and attention_mask as bool [B T] (all True without one), checked."""
    ids = integers("input_ids", input_ids)
    if ids.ndim != 2:
        raise InputError(f"input_ids: shape {ids.shape}, expected [B T]")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask: shape {mask.shape}, expected that of input_ids {ids.shape}"
        )
    # A larger number would become another token.
    return np.clip(ids, -1, 2**31 - 1).astype(np.int32), mask


def integers(name: str, given) -> np.ndarray:
    """An argument as int64, with rows of one length; an empty one may have any type."""
    try:
        found = np.asarray(given)
        if found.dtype.kind in "iu" or not found.size:
            return found.astype(np.int64)
    except ValueError as e:
        raise InputError(f"{name}: expected rows of one length, found: {e}") from e
    raise InputError(f"{name}: expected integers, found an array of {found.dtype}")


def grid_array(name: str, grid) -> np.ndarray:
    """A grid argument as int64 [n 3], checked; None and [] are no grids."""
    grid = integers(name, [] if grid is None else grid)
    grid = grid if grid.size else np.zeros((0, 3), np.int64)
    if grid.ndim != 2 or grid.shape[1] != 3 or (grid < 1).any():
        raise InputError(
            f"{name}: expected rows (t, h, w) of positive numbers, found {grid.tolist()}"
        )
    return grid


def frames_by_token(cfg: Config, image_grid_thw, video_grid_thw) -> dict[int, list]:
    """Placeholder token -> merged frames (h, w) still to be placed, in order; videos split into frames."""
    merge = cfg.vision.spatial_merge_size
    frames: dict[int, list] = {}
    both = ((cfg.image_token_id, "image_grid_thw", image_grid_thw),
            (cfg.video_token_id, "video_grid_thw", video_grid_thw))  # fmt: skip
    for token, name, given in both:
        grid = grid_array(name, given)
        if (grid[:, 1:] % merge).any():
            raise InputError(f"{name}: sides must be multiples of {merge}, found {grid.tolist()}")
        frames[token] = [(h // merge, w // merge) for t, h, w in grid.tolist() for _ in range(t)]
    return frames


def _row_positions(row: np.ndarray, frames: dict[int, list]) -> tuple[np.ndarray, int]:
    """Positions [3 n] of an unpadded row and the next free one; takes its frames off the lists."""
    out = np.zeros((3, len(row)), np.int32)
    visual = np.isin(row, list(frames))
    at, count = 0, 0
    while at < len(row):
        if not visual[at]:
            stop = at + int(np.argmax(visual[at:])) if visual[at:].any() else len(row)
            out[:, at:stop] = count + np.arange(stop - at)
            at, count = stop, count + stop - at
            continue
        token = int(row[at])
        if not frames[token]:
            raise InputError(
                f"input_ids: a placeholder (token {token}) at {at} has no grid left; each image "
                "needs one row of image_grid_thw, each video one of video_grid_thw"
            )
        h, w = frames[token].pop(0)
        stop = at + h * w
        if stop > len(row) or (row[at:stop] != token).any():
            found = int(np.argmax(np.append(row[at:] != token, True)))
            raise InputError(
                f"input_ids: {found} placeholders (token {token}) at {at}, but its grid of {h} x {w} "
                f"merged patches needs {h * w}"
            )
        cell = np.arange(h * w)
        out[:, at:stop] = count + np.stack([cell * 0, cell // w, cell % w])
        at, count = stop, count + max(h, w)
    return out, count
