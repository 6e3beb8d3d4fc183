"""The settings of videos, and the size of their frames.

Source: the video processor of Qwen3-VL (transformers), whose names the settings keep.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_patches import ImageSettings, check_aspect, fit_area

# Settings of transformers' base class that its Qwen3-VL processor never reads.
WITHOUT_EFFECT = ("size_divisor", "default_to_square", "do_center_crop", "crop_size")


@dataclasses.dataclass(frozen=True)
class VideoSettings(ImageSettings):
    """Every setting that changes numbers, with the released values.

    min_pixels and max_pixels bound frames x height x width of a whole clip. Frames are sampled at
    `fps` a second, at least min_frames and at most max_frames, or num_frames of them if that is set.
    cap_pixels_per_frame also bounds each frame, to max_video_tokens tokens.
    """

    KIND: ClassVar[str] = "video"
    SECTION: ClassVar[str] = "video_processor"
    FILE: ClassVar[str] = "video_preprocessor_config.json"

    min_pixels: int = 4096
    max_pixels: int = 25165824
    do_sample_frames: bool = True
    fps: float | None = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    def override(self, **changes: Any) -> VideoSettings:
        """A copy with some settings changed, as `ImageSettings.override`.

        fps and num_frames exclude each other: either one takes the other's place. Raises InputError
        for both, for an unknown name or value, and for settings without effect in the reference.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        for name in WITHOUT_EFFECT:
            if name in changes:
                raise InputError(
                    f"video setting {name}: it has no effect on Qwen3-VL's clips; leave it out"
                )
        if "fps" in changes and "num_frames" in changes:
            raise InputError(
                "video settings: fps and num_frames are both given; give the one that says how to "
                "sample"
            )
        settings = super().override(**changes)
        if "num_frames" in changes:
            settings = dataclasses.replace(settings, fps=None)
        elif "fps" in changes:
            settings = dataclasses.replace(settings, num_frames=None)
        return settings


def smart_resize(
    frames: int,
    height: int,
    width: int,
    factor: int = 32,
    temporal_factor: int = 2,
    min_pixels: int = 4096,
    max_pixels: int = 25165824,
) -> tuple[int, int]:
    """Height and width that the frames of a clip are resized to, multiples of `factor`.

    frames x height x width stays within the limits, as far as the rounding of the reference allows.
    Raises InputError for a single frame, and for a ratio of sides above 200.
    """
    if frames < temporal_factor:
        raise InputError(
            f"video: {frames} frame(s), expected at least {temporal_factor}; pass a single frame as "
            "a picture"
        )
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(height, width, "video")
    high, wide = (round(side / factor) * factor for side in (height, width))
    padded = round(frames / temporal_factor) * temporal_factor
    limits = min_pixels, max_pixels
    return fit_area((height, width), (high, wide), factor, *limits, frames, padded)
