"""The sizes that images and the frames of videos are resized to: multiples of a token's side.

Source: smart_resize of transformers' Qwen2-VL image processor and Qwen3-VL video processor.
"""

from __future__ import annotations

import math

from qwen3vl_jax.errors import InputError

MAX_ASPECT = 200
Size = tuple[int, int]  # height, width


def smart_resize(
    height: int,
    width: int,
    factor: int = 32,
    min_pixels: float = 65536,
    max_pixels: float = 16777216,
    smallest: int = 0,
    kind: str = "image",
) -> Size:
    """Height and width that an image is resized to: multiples of `factor`, area within the limits.

    Sides are rounded half to even, to at least `smallest`, then scaled by one ratio, down (floor) or
    up (ceil). Raises InputError for a ratio of sides above 200.
    """
    if min(height, width) < 1:
        raise InputError(f"{kind}: {width} x {height} pixels, expected at least 1 x 1")
    check_aspect(height, width, kind)
    # A side may be rounded to 0: the lower limit brings it back.
    rounded = tuple(max(smallest, round(side / factor) * factor) for side in (height, width))
    return _fit_area((height, width), rounded, factor, min_pixels, max_pixels)


def smart_resize_video(
    frames: int,
    height: int,
    width: int,
    factor: int = 32,
    temporal_factor: int = 2,
    min_pixels: int = 4096,
    max_pixels: int = 25165824,
) -> Size:
    """Height and width that the frames of a video are resized to, multiples of `factor`.

    frames x height x width stays within the limits, as far as the rounding of the reference allows.
    Raises InputError for a single frame, and for a ratio of sides above 200.
    """
    if frames < temporal_factor:
        raise InputError(
            f"video: {frames} frame(s), expected at least {temporal_factor}; pass a single frame as "
            "an image"
        )
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(height, width, "video")
    rounded = tuple(round(side / factor) * factor for side in (height, width))
    padded = round(frames / temporal_factor) * temporal_factor
    return _fit_area((height, width), rounded, factor, min_pixels, max_pixels, frames, padded)


def check_aspect(height: int, width: int, kind: str) -> None:
    """Raises InputError for a ratio of sides above 200."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"{kind}: {width} x {height} pixels, one side is more than {MAX_ASPECT} times the other; "
            "crop it or paste it on a larger background"
        )


def _fit_area(sides, rounded, factor, least, most, frames=1, padded=1) -> Size:
    """The rounded sides, or where the area of all frames is outside the limits the sides scaled."""
    high, wide = rounded
    if padded * high * wide > most:
        ratio = math.sqrt(frames * sides[0] * sides[1] / most)
        high, wide = (max(factor, math.floor(x / ratio / factor) * factor) for x in sides)
    elif padded * high * wide < least:
        ratio = math.sqrt(least / (frames * sides[0] * sides[1]))
        high, wide = (math.ceil(x * ratio / factor) * factor for x in sides)
    return high, wide
