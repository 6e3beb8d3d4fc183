"""The sizes that images and the frames of videos are resized to: multiples of a token's side.

Source: smart_resize of transformers' Qwen2-VL image processor and Qwen3-VL video processor.
"""

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
    return _fit_area((height, width), factor, min_pixels, max_pixels, kind, smallest)


def smart_resize_video(
    frames: int,
    height: int,
    width: int,
    factor: int = 32,
    temporal_factor: int = 2,
    min_pixels: int = 4096,
    max_pixels: int = 25165824,
) -> Size:
    """Height and width of a video's frames, as `smart_resize` for their joint area. Raises InputError."""
    if frames < temporal_factor:
        found = f"video: {frames} frame(s), expected at least {temporal_factor}"
        raise InputError(f"{found}; pass a single frame as an image")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    padded = round(frames / temporal_factor) * temporal_factor
    sides = height, width
    return _fit_area(sides, factor, min_pixels, max_pixels, "video", 0, frames, padded)


def _fit_area(sides, factor, least, most, kind, smallest, frames=1, padded=1) -> Size:
    """The rounded sides, or where the area of all frames is outside the limits the sides scaled."""
    if max(sides) > MAX_ASPECT * min(sides):
        found = (
            f"{sides[1]} x {sides[0]} pixels, one side is more than {MAX_ASPECT} times the other"
        )
        raise InputError(f"{kind}: {found}; crop it or paste it on a larger background")
    # A side may be rounded to 0: the lower limit brings it back.
    high, wide = (max(smallest, round(side / factor) * factor) for side in sides)
    if padded * high * wide > most:
        ratio = math.sqrt(frames * sides[0] * sides[1] / most)
        high, wide = (max(factor, math.floor(x / ratio / factor) * factor) for x in sides)
    elif padded * high * wide < least:
        ratio = math.sqrt(least / (frames * sides[0] * sides[1]))
        high, wide = (math.ceil(x * ratio / factor) * factor for x in sides)
    return high, wide
