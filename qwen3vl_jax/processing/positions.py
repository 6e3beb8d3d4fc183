"""MRoPE position ids, worked out on the host from placeholders and grids. Dims as in layers.py."""

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.array_checks import grid_array, ids_and_mask


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
    for token, left in frames.items():
        if left:
            name = "image" if token == cfg.image_token_id else "video"
            found = f"{len(left)} {name} grid(s) or frame(s) are left over"
            lacks = f"the prompt has too few {name} placeholders (token {token})"
            raise InputError(f"{name}_grid_thw: {found}; {lacks}")
    return positions, delta


def frames_by_token(cfg: Config, image_grid_thw, video_grid_thw) -> dict[int, list]:
    """Placeholder token -> merged frames (h, w) still to be placed, in order; videos split into frames."""
    merge, found = cfg.vision.spatial_merge_size, {}
    grids = {"image": image_grid_thw, "video": video_grid_thw}
    for (kind, given), token in zip(grids.items(), (cfg.image_token_id, cfg.video_token_id)):
        grid = grid_array(f"{kind}_grid_thw", given, merge).tolist()
        found[token] = [(h // merge, w // merge) for t, h, w in grid for _ in range(t)]
    return found


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
            needs = "each image needs one row of image_grid_thw, each video one of video_grid_thw"
            found = f"a placeholder (token {token}) at {at} has no grid left"
            raise InputError(f"input_ids: {found}; {needs}")
        h, w = frames[token].pop(0)
        stop = at + h * w
        if stop > len(row) or (row[at:stop] != token).any():
            found = int(np.argmax(np.append(row[at:] != token, True)))
            needs = f"its grid of {h} x {w} merged patches needs {h * w}"
            found = f"{found} placeholders (token {token}) at {at}"
            raise InputError(f"input_ids: {found}, but {needs}")
        cell = np.arange(h * w)
        out[:, at:stop] = count + np.stack([cell * 0, cell // w, cell % w])
        at, count = stop, count + max(h, w)
    return out, count
