"""Images and videos in messages as qwen-vl-utils reads them: number and size of frames.

Source: fetch_video of qwen-vl-utils 0.0.14, whose rules and defaults these are.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.settings import (
    ImageSettings,
    Size,
    check_count,
    frame_rate,
    smart_resize,
)

# Tokens of a frame and of an image, least and most; of all frames of a video, the most.
_FRAME_TOKENS, _IMAGE_TOKENS, _VIDEO_TOKENS = (128, 768), (4, 16384), 128000 * 0.9
SAMPLE_FPS = 2.0
_SIZES = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")


@dataclasses.dataclass(frozen=True)
class VideoItem:
    """The settings of a video in a message, None where it has none.

    min_pixels and max_pixels bound a frame, total_pixels all frames of the video (in pairs). sample_fps is
    the rate of a list of frames, which are all used; raw_fps replaces it in their times.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    sample_fps: float | None = None
    raw_fps: float | None = None
    # Whether the sizes of frames follow from it too.
    resizes: bool = True

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> "VideoItem":
        """Takes the settings of a content item. Raises InputError for a value that is none."""
        given: dict[str, Any] = {}
        for name in KEYS:
            if (value := item.get(name)) is not None:
                check = frame_rate if name.endswith("fps") else check_count
                given[name] = check(f"video: {name}", value)
        found = cls(**given, resizes="size" not in item)
        both = [name for name in ("fps", "nframes", "num_frames") if item.get(name) is not None]
        if not found.resizes and not found.given.isdisjoint(_SIZES):
            both = ["size", "a limit of pixels"]
        if len(both) > 1:
            raise InputError(f"video: {both[0]} and {both[1]} are both given, expected one of them")
        if (found.resized_height is None) != (found.resized_width is None):
            raise InputError("video: give both resized_height and resized_width")
        return found

    @property
    def given(self) -> set[str]:
        """The names of the settings that the item has."""
        return {name for name in KEYS if getattr(self, name) is not None}

    def frame_count(self, total: int, rate: float, fps: float | None, least: int, most: int) -> int:
        """How many of `total` frames are used, an even number from 2; fps, least, most are defaults."""
        if self.nframes is not None:
            count = 2 * round(self.nframes / 2)
        else:
            least = 2 * math.ceil((self.min_frames or least) / 2)
            most = 2 * math.floor((self.max_frames or min(most, total)) / 2)
            wanted = total / rate * (self.fps or fps or SAMPLE_FPS)
            count = 2 * math.floor(min(max(wanted, least), most, total) / 2)
        if not 2 <= count <= total:
            asked = f"{count} frames are asked for (nframes, max_frames)"
            has = f"expected 2 to {total}, the frames it has"
            raise InputError(f"video: {asked}, {has}; pass a single frame as an image")
        return count

    def frame_size(self, frames: int, height: int, width: int, factor: int) -> Size:
        """Height and width that the frames of a video are resized to. Raises InputError."""
        area = factor**2
        low = _FRAME_TOKENS[0] * area if self.min_pixels is None else self.min_pixels
        total = _VIDEO_TOKENS * area if self.total_pixels is None else self.total_pixels
        cap = max(min(_FRAME_TOKENS[1] * area, total / frames * 2), int(low * 1.05))
        high = cap if self.max_pixels is None else min(self.max_pixels, cap)
        return self._size(height, width, factor, low, high)

    def first_size(self, height: int, width: int, factor: int) -> Size:
        """Height and width that each frame of a list is brought to first, as an image."""
        least, most = (tokens * factor**2 for tokens in _IMAGE_TOKENS)
        return self._size(height, width, factor, self.min_pixels or least, self.max_pixels or most)

    def _size(self, height: int, width: int, factor: int, low: float, high: float) -> Size:
        if self.resized_height is not None and self.resized_width is not None:
            height, width = self.resized_height, self.resized_width
            low, high = (tokens * factor**2 for tokens in _IMAGE_TOKENS)
        elif low > high and self.min_pixels is not None and self.max_pixels is not None:
            raise InputError(f"video: min_pixels {low} is above max_pixels {high}")
        return smart_resize(height, width, factor, min(low, high), high, factor, "video")


def with_image_limits(settings: ImageSettings, item: Mapping[str, Any]) -> ImageSettings:
    """Settings with the limits that qwen-vl-utils has where an item gives one of them alone."""
    if "size" in item or item.keys().isdisjoint(("min_pixels", "max_pixels")):
        return settings
    least, most = (tokens * settings.factor**2 for tokens in _IMAGE_TOKENS)
    return dataclasses.replace(settings, min_pixels=least, max_pixels=most)


KEYS = tuple(field.name for field in dataclasses.fields(VideoItem) if field.name != "resizes")
