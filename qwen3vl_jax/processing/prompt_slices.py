"""One conversation's arrays as token ids and the pictures and clips among them; what two have in common."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Batch
from qwen3vl_jax.processing.batch import host_array, make_batch


@dataclasses.dataclass(frozen=True)
class Visual:
    """A picture or clip of a prompt: its patches [p, C], grid (t, h, w), and where its tokens lie."""

    pixels: np.ndarray
    grid: tuple[int, int, int]
    clip: bool
    start: int  # its first placeholder
    end: int  # after its last
    digest: bytes  # of pixels and grid: equal ones look equal to the model


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """Token ids [T] of one prompt, and its pictures and clips in the order of their tokens."""

    ids: np.ndarray
    visuals: tuple[Visual, ...]

    def rest(self, start: int) -> EncodedPrompt:
        """What follows the first `start` tokens, which cut no picture."""
        left = [v for v in self.visuals if v.start >= start]
        moved = (dataclasses.replace(v, start=v.start - start, end=v.end - start) for v in left)
        return EncodedPrompt(self.ids[start:], tuple(moved))

    def first(self, count: int) -> EncodedPrompt:
        """The first `count` tokens, which cut no picture."""
        return EncodedPrompt(self.ids[:count], tuple(v for v in self.visuals if v.end <= count))


def read_prompt(cfg: Config, arrays: Mapping[str, Any]) -> EncodedPrompt:
    """What `Processor.inputs` gives for one conversation, taken apart.

    Raises InputError for several rows, and for pixels that are not those of the grids.
    """
    ids = np.asarray(arrays["input_ids"])
    if ids.ndim != 2 or len(ids) != 1:
        raise InputError(f"input_ids: shape {ids.shape}, expected one row [1, T]")
    ids, found = ids[0].astype(np.int32), []
    for part in visuals_of(cfg, ids, arrays):
        pixels, key = np.ascontiguousarray(part.pixels), repr(list(part.grid)).encode()
        digest = hashlib.blake2b(pixels.data, digest_size=16, key=key).digest()
        found.append(dataclasses.replace(part, pixels=pixels, digest=digest))
    return EncodedPrompt(ids, tuple(found))


def visuals_of(cfg: Config, ids: np.ndarray, arrays: Mapping[str, Any]) -> list[Visual]:
    """The pictures and clips of a row of ids [T] in order of their tokens, without digests.

    arrays: as `Processor.inputs` gives them. Raises InputError for pixels that are not those of the grids.
    """
    found, unit = [], cfg.vision.merge_unit
    for pixels, grid, token in (
        ("pixel_values", "image_grid_thw", cfg.image_token_id),
        ("pixel_values_videos", "video_grid_thw", cfg.video_token_id),
    ):
        if grid not in arrays:
            continue
        grids = np.asarray(arrays[grid])
        patches, places = host_array(arrays[pixels]), np.flatnonzero(ids == token)
        sizes = grids.prod(1)
        if sizes.sum() != len(patches) or sizes.sum() != unit * len(places):
            raise InputError(
                f"{pixels}: {len(patches)} patches for {len(places)} placeholders, the grids "
                f"{grids.tolist()} need {sizes.sum()}"
            )
        for size, end, thw in zip(sizes, np.cumsum(sizes), grids.tolist(), strict=True):
            at = places[(end - size) // unit : end // unit]
            span = int(at[0]), int(at[-1]) + 1
            clip = token == cfg.video_token_id
            found.append(Visual(patches[end - size : end], tuple(thw), clip, *span, b""))
    return sorted(found, key=lambda v: v.start)


def shared_start(a: EncodedPrompt, b: EncodedPrompt) -> int:
    """Tokens that both begin with and that look the same, fewer than either has, no picture cut."""
    count = min(len(a.ids), len(b.ids)) - 1
    differ = np.flatnonzero(a.ids[:count] != b.ids[:count])
    count = int(differ[0]) if len(differ) else count
    for one, other in zip(a.visuals, b.visuals, strict=False):
        if one.start < count and (max(one.end, other.end) > count or one.digest != other.digest):
            return one.start
    return count


def group_size(rows: int) -> int:
    """How many prompts are prefilled together where so many rows are answered."""
    return max(1, rows // 8)


def group_batch(cfg: Config, prompts: Sequence[EncodedPrompt], width: int) -> Batch:
    """Prompts as a Batch [A width] without pixels: its vision rows count `in_feature_order`."""
    ids = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)], mask[row, : len(prompt.ids)] = prompt.ids, 1
    seen = in_feature_order(prompts)
    grids = {
        name: [v.grid for v in seen if v.clip == clip] or None
        for name, clip in (("image_grid_thw", False), ("video_grid_thw", True))
    }
    return make_batch(cfg, input_ids=ids, attention_mask=mask, pad=False, **grids)


def in_feature_order(prompts: Sequence[EncodedPrompt]) -> list[Visual]:
    """All pictures row by row, then all clips: the order of a Batch's features."""
    seen = [v for prompt in prompts for v in prompt.visuals]
    return sorted(seen, key=lambda v: v.clip)  # stable
