"""A Sample: one conversation ready to be packed, and the check that every sample passes."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.array_checks import check_ids, check_labels, check_shape, integers
from qwen3vl_jax.processing.encoded_prompt import EncodedImage


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation, ready to be packed: t tokens, r image features."""

    name: str  # its source and record: "chats.jsonl:17"
    ids: np.ndarray  # [t] int32, with a placeholder for each image feature
    labels: np.ndarray  # [t] int32: the token itself, or -100 if it is not learned. Not shifted.
    weights: np.ndarray  # [t] float32: weights in the loss, 0 where labels are -100
    positions: np.ndarray  # [3 t] int32: MRoPE positions of this conversation
    # Images and videos in token order. uint8 patches are not normalised yet.
    images: tuple[EncodedImage, ...] = ()
    # [r] int32: a token that names each image feature, or -100.
    vision_labels: np.ndarray | None = None
    note: str = ""  # what was cut off


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A record that gives no sample. bad: it is wrong; otherwise it is too large."""

    name: str
    reason: str
    bad: bool


def check_sample(sample: Sample, cfg: Config) -> Sample:
    """Checks that a sample's arrays fit together and fit the model. Raises InputError."""
    ids = check_ids("ids", sample.ids, cfg.text.vocab_size)
    t = len(ids)
    if ids.ndim != 1 or not t:
        raise InputError(f"ids: shape {ids.shape}, expected [t] and at least one token")
    labels = check_labels("labels", sample.labels, cfg.text.vocab_size)
    positions, weights = integers("positions", sample.positions), np.asarray(sample.weights)
    if weights.dtype.kind not in "fiu":
        raise InputError(f"weights: got {weights.dtype}, expected finite numbers from 0")
    with np.errstate(over="ignore"):
        weights = weights.astype(np.float32, copy=False)
    for name, found in (("labels", labels), ("weights", weights)):
        check_shape(name, found, (t,))
    check_shape("positions", positions, (3, t))
    learned = labels != IGNORE_INDEX
    if ((labels != ids) & learned).any():
        raise InputError("labels: some are neither their own token nor -100; they are not moved")
    # Comparisons with NaN are false.
    if not weights.min() >= 0 or not weights.max() < np.inf:
        raise InputError("weights: expected finite numbers from 0")
    if (weights * ~learned).any():
        raise InputError("weights: above 0 where a label is -100")
    if positions.min() < 0 or positions.max() >= 2**31:
        raise InputError("positions: expected whole numbers from 0")
    if not weights[1:].any():
        raise InputError("nothing to learn: no assistant turn is rendered that is switched on")
    rows, seen = _check_images(sample.images, ids, cfg), sample.vision_labels
    if seen is not None:
        seen = check_labels("vision_labels", seen, cfg.text.vocab_size)
        check_shape("vision_labels", seen, (rows,))
    arrays, images = (ids, labels, weights, positions.astype(np.int32)), tuple(sample.images)
    return Sample(sample.name, *arrays, images, seen, sample.note)


def _check_images(images: Sequence[EncodedImage], ids: np.ndarray, cfg: Config) -> int:
    """The number of image features of a sample's images and videos. Raises InputError."""
    unit, side = cfg.vision.merge_unit, cfg.vision.spatial_merge_size
    width, rows, last = math.prod(cfg.vision.patch_shape), 0, 0
    left = (ids == cfg.image_token_id) | (ids == cfg.video_token_id)
    for number, image in enumerate(images, 1):
        where, (t, h, w), patches = f"images {number}: ", image.grid, image.patches
        if min(t, h, w) < 1 or h % side or w % side or (t > 1 and not image.is_video):
            raise InputError(
                f"{where}grid {image.grid}, expected sides that are multiples of {side}"
            )
        if patches.shape != (shape := (t * h * w, width)):
            raise InputError(f"{where}patches have shape {patches.shape}, expected {shape}")
        if patches.dtype not in (np.uint8, np.float32):
            raise InputError(f"{where}patches are {patches.dtype}, expected uint8 or float32")
        if patches.dtype == np.float32 and not np.isfinite(patches).all():
            raise InputError(f"{where}patches are not all finite")
        token = cfg.video_token_id if image.is_video else cfg.image_token_id
        at, merged = slice(image.start, image.end), t * h * w // unit
        if image.start < last or np.count_nonzero(ids[at] == token) != merged:
            raise InputError(
                f"{where}expected {merged} placeholders of its kind from token {image.start} to "
                f"{image.end}, after those of the one before"
            )
        left[at] = False
        rows, last = rows + merged, image.end
    if left.any():
        raise InputError(f"ids: {np.count_nonzero(left)} placeholders without an image or video")
    return rows
