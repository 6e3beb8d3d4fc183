"""One prompt as the model takes it: token ids, and the patches of its images and videos.

The flat arrays that transformers' processor returns are made from prompts here, and read back here.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError, unexpected
from qwen3vl_jax.processing.array_checks import host_array

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class UsedFrames:
    """The frames of a video that the model gets: their indices and seconds in the source.

    `timestamps` is the mean time of the frames that share patches, as the prompt's text gives it.
    """

    fps: float
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    timestamps: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image: its patches, and the place of its tokens in the prompt.

    patches [h*w, C*Tp*P*P] float32 in merge order (uint8 before normalisation). grid (1, h, w) counts
    patches. Its placeholders are the prompt's tokens from `start` up to `end`. digest: by `with_digest`.
    """

    patches: np.ndarray
    grid: tuple[int, int, int]
    start: int = 0
    end: int = 0
    digest: bytes = b""
    is_video: ClassVar[bool] = False

    def with_digest(self) -> "EncodedImage":
        if self.digest:
            return self
        # Of the safe hashes the one that processors have instructions for.
        digest = hashlib.sha256(repr(list(self.grid)).encode())
        digest.update(np.ascontiguousarray(self.patches).data)
        return dataclasses.replace(self, digest=digest.digest())


@dataclasses.dataclass(frozen=True)
class EncodedVideo(EncodedImage):
    """A video, as `EncodedImage`: patches [t*h*w, ..], grid (t, h, w), and the frames it uses."""

    frames: UsedFrames | None = None
    is_video: ClassVar[bool] = True


# The names of pixels and grids in a processor's arrays.
_KINDS = (
    ("pixel_values", "image_grid_thw", EncodedImage),
    ("pixel_values_videos", "video_grid_thw", EncodedVideo),
)


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """Token ids [T] int32, images and videos in order of their tokens, labels [T] (-100: not scored)."""

    ids: np.ndarray
    images: tuple[EncodedImage, ...] = ()
    labels: np.ndarray | None = None

    def rest(self, start: int) -> "EncodedPrompt":
        """The tokens from `start` on, which is not inside an image."""
        left = [x for x in self.images if x.start >= start]
        moved = (dataclasses.replace(x, start=x.start - start, end=x.end - start) for x in left)
        return EncodedPrompt(self.ids[start:], tuple(moved))

    def first(self, count: int) -> "EncodedPrompt":
        """The first `count` tokens, which end outside an image."""
        return EncodedPrompt(self.ids[:count], tuple(x for x in self.images if x.end <= count))

    def with_digests(self) -> "EncodedPrompt":
        """The prompt whose images have digests, as `shared_start` compares them."""
        return dataclasses.replace(self, images=tuple(x.with_digest() for x in self.images))

    def without_patches(self) -> "EncodedPrompt":
        """A copy that keeps each image's digest and drops its patches, to free memory."""
        images = (x.with_digest() for x in self.images)
        kept = tuple(dataclasses.replace(x, patches=x.patches[:0].copy()) for x in images)
        return dataclasses.replace(self, images=kept)


def grids_of(images: Sequence[EncodedImage]) -> dict[str, list[tuple[int, int, int]] | None]:
    """image_grid_thw and video_grid_thw of images and videos, None where there are none."""
    return {grid: [x.grid for x in images if type(x) is k] or None for _, grid, k in _KINDS}


def place_images(cfg: Config, ids: np.ndarray, images: Sequence[EncodedImage]) -> EncodedPrompt:
    """A prompt of ids [T] and the images that its placeholders are for. Raises InputError."""
    placed: list[EncodedImage] = []
    for is_video, token in ((False, cfg.image_token_id), (True, cfg.video_token_id)):
        found = [x for x in images if x.is_video == is_video]
        at = np.flatnonzero(ids == token)
        ends = np.cumsum([np.prod(x.grid) for x in found], dtype=int) // cfg.vision.merge_unit
        if len(at) != (needed := int(ends[-1]) if found else 0):
            what = f"{len(at)} {'video' if is_video else 'image'} placeholders"
            raise unexpected("input_ids", what, f"{needed} for the grids {[x.grid for x in found]}")
        for image, start, end in zip(found, [0, *ends], ends):
            span = {"start": int(at[start]), "end": int(at[end - 1]) + 1}
            placed.append(dataclasses.replace(image, **span))
    return EncodedPrompt(ids, tuple(sorted(placed, key=lambda x: x.start)))


def shared_start(a: EncodedPrompt, b: EncodedPrompt, all_of_b: bool = False) -> int:
    """How many tokens two prompts begin with, no image cut; fewer than a has, and b unless all_of_b."""
    count = min(len(a.ids) - 1, len(b.ids) - (not all_of_b))
    differ = np.flatnonzero(a.ids[:count] != b.ids[:count])
    count = int(differ[0]) if len(differ) else count
    for one, other in zip(a.images, b.images, strict=False):
        if one.start < count and (max(one.end, other.end) > count or one.digest != other.digest):
            return one.start
    return count


def in_feature_order(prompts: Sequence[EncodedPrompt]) -> list[EncodedImage]:
    """All images prompt by prompt, then all videos: the order of a Batch's features."""
    return sorted((x for prompt in prompts for x in prompt.images), key=lambda x: x.is_video)


def to_hf_arrays(
    cfg: Config,
    prompts: Sequence[EncodedPrompt],
    pad_id: int = 0,
    padding_side: str = "right",
    with_pixels: bool = True,
) -> Arrays:
    """The arrays of `Processor.inputs`, joined of at least one prompt."""
    ids = _padded([p.ids for p in prompts], padding_side, pad_id)
    mask = _padded([np.ones(len(p.ids), np.int64) for p in prompts], padding_side, 0)
    kinds = np.zeros_like(ids)
    for kind, token in enumerate((cfg.image_token_id, cfg.video_token_id), 1):
        kinds[(ids == token) & (mask == 1)] = kind
    out: Arrays = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    labels = [p.labels for p in prompts if p.labels is not None]
    if labels:
        out["labels"] = _padded(labels, padding_side, IGNORE_INDEX)
    images = in_feature_order(prompts)
    for pixels, grid, kind in _KINDS:
        if found := [x for x in images if type(x) is kind]:
            out[grid] = np.array([x.grid for x in found], np.int64)
            if with_pixels:
                patches = [x.patches for x in found]
                out[pixels] = patches[0] if len(patches) == 1 else np.concatenate(patches)
    if used := [x.frames for x in images if isinstance(x, EncodedVideo) and x.frames]:
        out["video_metadata"] = used
    return out


def _padded(rows: Sequence[np.ndarray], side: str, fill: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for line, row in zip(out, rows):
        start = 0 if side == "right" else len(line) - len(row)
        line[start : start + len(row)] = row
    return out


def from_hf_arrays(cfg: Config, arrays: Mapping[str, Any]) -> EncodedPrompt:
    """The prompt in a processor's arrays of one conversation, ours or transformers'. Raises InputError."""
    ids = np.asarray(arrays["input_ids"])
    if ids.ndim != 2 or len(ids) != 1:
        raise InputError(f"input_ids: shape {ids.shape}, expected one row [1, T]")
    images: list[EncodedImage] = []
    for pixels, grid, kind in _KINDS:
        if arrays.get(grid) is None:
            continue
        grids = np.asarray(arrays[grid])
        patches, sizes = host_array(arrays[pixels]), grids.prod(1)
        if sizes.sum() != len(patches):
            wanted = f"{sizes.sum()} for the grids {grids.tolist()}"
            raise unexpected(pixels, f"{len(patches)} patches", wanted)
        parts = np.split(patches, np.cumsum(sizes)[:-1])
        images += [kind(x, (t, h, w)) for x, (t, h, w) in zip(parts, grids.tolist())]
    return place_images(cfg, ids[0].astype(np.int32), images)
