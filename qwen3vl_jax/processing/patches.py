"""Image tokens and the parts of the images that they stand for: boxes, heat maps, tokens left out."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Batch
from qwen3vl_jax.processing.batch import bucket, fit
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt


def patch_boxes(cfg: Config, prompt: EncodedPrompt) -> tuple[np.ndarray, np.ndarray]:
    """The part of an image that each token of a prompt stands for: (image [T] int32, box [T 4] float32).

    prompt: of `Processor.encode`. image: index into prompt.images, -1 for a token of text. box: x1, y1, x2,
    y2 as fractions of the image's width and height, 0 to 1: times its pixels they are pixels. Tokens of a
    video have boxes of its frames, two frames a token.
    """
    image = np.full(len(prompt.ids), -1, np.int32)
    box = np.zeros((len(prompt.ids), 4), np.float32)
    for number, one in enumerate(prompt.images):
        token = cfg.video_token_id if one.is_video else cfg.image_token_id
        at = one.start + np.flatnonzero(prompt.ids[one.start : one.end] == token)
        high, wide = (side // cfg.vision.spatial_merge_size for side in one.grid[1:])
        row, column = np.divmod(np.arange(len(at)) % (high * wide), wide)
        image[at] = number
        corners = column / wide, row / high, (column + 1) / wide, (row + 1) / high
        box[at] = np.stack(corners, axis=1)
    return image, box


def heat_map(image: Image.Image, boxes: Any, weights: Any, color: str = "red") -> Image.Image:
    """The image with boxes [n 4] (fractions, as of `patch_boxes`) in a color as strong as weights [n].

    The largest weight hides nine tenths of what is below it. Raises InputError for other shapes, and for
    weights that are negative or not finite.
    """
    boxes, weights = np.asarray(boxes, np.float64), np.asarray(weights, np.float64)
    if boxes.shape != (len(weights), 4) or weights.ndim != 1:
        raise InputError(
            f"heat_map: boxes {boxes.shape}, weights {weights.shape}, expected [n 4], [n]"
        )
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError("heat_map: got a weight that is negative or not finite, expected none")
    mask = Image.new("L", image.size)
    pen, sides = ImageDraw.Draw(mask), [*image.size] * 2
    levels = np.rint(230 * weights / max(weights.max(initial=0), 1e-30)).astype(int)
    for box, level in zip(boxes, levels.tolist()):
        x1, y1, x2, y2 = (round(v * side) for v, side in zip(box.tolist(), sides))
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=level)
    return Image.composite(Image.new("RGB", image.size, color), image.convert("RGB"), mask)


def drop_patches(cfg: Config, batch: Batch, keep: Any) -> Batch:
    """The batch without the image tokens for which keep [B T] is false, and without their patches.

    The others keep their places in the image and their positions; text always stays. The vision tower
    and the decoder run on what is left. Raises InputError for a batch whose patches are in several rows.
    """
    tokens, rows = np.asarray(batch.tokens), batch.vision_rows
    keep = np.asarray(keep, bool)
    if rows is None or keep.shape != tokens.shape:
        found = "no images" if rows is None else f"keep {keep.shape}, tokens {tokens.shape}"
        raise InputError(f"drop_patches: got {found}, expected images and a keep for each token")
    vision, rows = batch.vision, np.asarray(rows)
    if batch.groups > 1 or (vision is not None and np.ndim(vision.lo) > 1):
        raise InputError("drop_patches: got patches in several rows, expected one row of patches")
    attended = np.asarray(batch.segment_ids) > 0
    stays = attended & (keep | (rows < 0))
    width = bucket(int(stays.sum(1).max()))
    order = np.argsort(~stays, axis=1, kind="stable")[:, :width]

    def gather(x: Any, fill: int = 0) -> Any:
        """The tokens that stay of x [B T ..], moved to the left."""
        if x is None:
            return None
        x, inside = np.asarray(x), np.take_along_axis(stays, order, axis=1)
        shape = order.reshape(*order.shape, *[1] * (x.ndim - 2))
        x = np.take_along_axis(x, shape, axis=1)
        return fit(np.where(inside.reshape(shape.shape), x, fill), width, fill=fill)

    fields = {name: gather(getattr(batch, name)) for name in ("tokens", "segment_ids", "embeds")}
    fields["positions"] = np.stack([gather(axis) for axis in np.asarray(batch.positions)])
    fields["labels"] = gather(batch.labels, -100)
    fields["delta"] = np.asarray(batch.delta) + (attended & ~stays).sum(1, dtype=np.int32)
    used = np.unique(rows[stays & (rows >= 0)])
    if vision is not None:
        place = np.full(max(rows.max(initial=0), 0) + 1, -1, np.int32)
        place[used] = np.arange(len(used))
        rows = np.where(rows >= 0, place[np.maximum(rows, 0)], -1)
        fields["vision"] = _of_rows(cfg, vision, used)
    return batch.replace(vision_rows=gather(rows, -1), **fields)


def _of_rows(cfg: Config, vision: Any, used: np.ndarray) -> Any:
    """The patches of some merged patches; a patch attends to those of its frame that are left."""
    unit = cfg.vision.merge_unit
    patches = (used[:, None] * unit + np.arange(unit)).reshape(-1)
    left = np.zeros(len(vision.lo) + 1, np.int32)
    left[1:][patches] = 1
    before, count = np.cumsum(left, dtype=np.int32), unit * bucket(len(used))
    arrays = {
        name: fit(np.asarray(getattr(vision, name))[patches], count, axis=0)
        for name in ("pixels", "pos_index", "pos_weight", "coords")
    }
    ends = {
        n: fit(before[np.asarray(getattr(vision, n))[patches]], count, axis=0) for n in ("lo", "hi")
    }
    return vision.replace(**arrays, **ends)
