"""Clips to patch rows: which frames are used, their size, their patches, their times as text.

Source: the video processor of Qwen3-VL (transformers), whose names the settings keep.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.clips import Clip, open_clip
from qwen3vl_jax.processing.images import (
    MAX_ASPECT,
    ImageSettings,
    check_patches,
    patch_rows,
    resized,
    value_table,
)
from qwen3vl_jax.processing.setting_checks import positive, whole, yes_or_no

# Settings of transformers' base class that its Qwen3-VL processor never reads.
_WITHOUT_EFFECT = ("size_divisor", "default_to_square", "do_center_crop", "crop_size")


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
        for name in _WITHOUT_EFFECT:
            if name in changes:
                raise InputError(
                    f"video setting {name}: it has no effect on Qwen3-VL's clips; leave it out"
                )
        if "fps" in changes and "num_frames" in changes:
            raise InputError(
                f"video settings: fps {changes['fps']} and num_frames {changes['num_frames']} are "
                "both given; give the one that says how to sample"
            )
        settings = super().override(**changes)
        if "num_frames" in changes:
            settings = dataclasses.replace(settings, fps=None)
        elif "fps" in changes:
            settings = dataclasses.replace(settings, num_frames=None)
        return settings


VideoSettings.CHECKS = {
    **ImageSettings.CHECKS,
    "do_sample_frames": yes_or_no,
    "fps": positive,
    "num_frames": whole,
    "min_frames": whole,
    "max_frames": whole,
    "cap_pixels_per_frame": yes_or_no,
    "max_video_tokens": whole,
}
CLIP_OPTIONS = ("video_metadata", "video_start", "video_end", "sample_fps")  # of a content item
OVERRIDES = (*VideoSettings.CHECKS, "size", *_WITHOUT_EFFECT, *CLIP_OPTIONS)


@dataclasses.dataclass(frozen=True)
class UsedFrames:
    """What of a clip the model sees: index and time of each frame, and the time of each grid frame.

    `indices` count the source's frames from 0, `seconds` from its start; `timestamps` is the mean
    time of the frames that share patches, as the prompt's text says it.
    """

    fps: float
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    timestamps: tuple[float, ...]


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
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise InputError(
            f"video: {width} x {height} pixels, one side is more than {MAX_ASPECT} times the other"
        )
    high, wide = (round(side / factor) * factor for side in (height, width))
    area = round(frames / temporal_factor) * temporal_factor * high * wide
    if area > max_pixels:
        ratio = math.sqrt((frames * height * width) / max_pixels)
        high, wide = (
            max(factor, math.floor(side / ratio / factor) * factor) for side in (height, width)
        )
    elif area < min_pixels:
        ratio = math.sqrt(min_pixels / (frames * height * width))
        high, wide = (math.ceil(side * ratio / factor) * factor for side in (height, width))
    return high, wide


def sample_frames(first: int, last: int, fps: float, settings: VideoSettings) -> np.ndarray:
    """Indices [n] of the frames used of those from `first` to `last`, which pass `fps` a second."""
    total = last - first + 1
    count = settings.num_frames
    if count is None and settings.fps is not None:
        count = int(total / fps * settings.fps)
        count = min(max(count, settings.min_frames), settings.max_frames, total)
    elif count is None:
        count = min(max(total, settings.min_frames), settings.max_frames)
    elif count > total:
        raise InputError(f"video: num_frames is {count} for a clip of {total} frames")
    return np.linspace(first, last, count).round().astype(np.int64)


def preprocess_video(
    source: Any,
    settings: VideoSettings | None = None,
    limits: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> tuple[np.ndarray, tuple[int, int, int], UsedFrames]:
    """Patch rows of one clip, its grid and the frames it uses.

    source: anything `open_clip` reads. overrides: settings for this call; video_metadata {fps,
    frames_indices, total_num_frames} or sample_fps says what arrays and lists of frames are;
    video_start and video_end (seconds) cut. A list of frames is used whole, its fps is their rate.
    limits: max_bytes and timeout of a URL. Frames pass one by one: memory does not grow with the
    clip. Returns rows [t*h*w, C*Tp*P*P] float32 in merge order and (t, h, w). Raises InputError.
    """
    options = {name: overrides.pop(name, None) for name in CLIP_OPTIONS}
    metadata, sample_fps = options["video_metadata"], options["sample_fps"]
    if isinstance(source, (list, tuple)) and metadata is None and sample_fps is None:
        sample_fps = overrides.pop("fps", None)
    settings = (settings or VideoSettings()).override(**overrides)
    clip = open_clip(source, metadata, sample_fps, **(limits or {}))
    try:
        chosen = _choose(clip, settings, options["video_start"], options["video_end"])
        rows, grid = _rows(clip, chosen, settings)
    except InputError as e:
        raise (InputError(f"{clip.name}: {e}") if clip.name else e) from None
    seconds = clip.seconds(chosen)
    padded = [*seconds, *[seconds[-1]] * (-len(seconds) % settings.temporal_patch_size)]
    pairs = zip(
        padded[:: settings.temporal_patch_size],
        padded[settings.temporal_patch_size - 1 :: settings.temporal_patch_size],
        strict=True,
    )
    used = UsedFrames(
        clip.fps,
        tuple(int(i) for i in clip.indices[chosen]),
        tuple(seconds),
        tuple((first + last) / 2 for first, last in pairs),
    )
    return rows, grid, used


def _choose(clip: Clip, settings: VideoSettings, start: Any, end: Any) -> np.ndarray:
    """Places among the clip's frames of those that are used."""
    first, last = 0, clip.total - 1
    if start is not None or end is not None:
        seconds = np.asarray(clip.seconds(np.arange(clip.total)))
        low = 0.0 if start is None else _second("video_start", start)
        high = float(seconds[-1]) if end is None else _second("video_end", end)
        inside = np.flatnonzero((seconds >= low - 1e-6) & (seconds <= high + 1e-6))
        if not len(inside):
            raise InputError(
                f"no frame from second {low:g} to {high:g}; the frames are at {seconds[0]:g} to "
                f"{seconds[-1]:g}"
            )
        first, last = int(inside[0]), int(inside[-1])
    if not (settings.do_sample_frames and clip.can_sample):
        return np.arange(first, last + 1)
    return clip.even_in_time(sample_frames(first, last, clip.fps, settings))


def _second(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InputError(f"{name} is {value!r}, expected seconds from 0")
    return float(value)


def _rows(
    clip: Clip, chosen: np.ndarray, settings: VideoSettings
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patch rows of the chosen frames, filled group by group as they are decoded."""
    temporal, unit = settings.temporal_patch_size, settings.patch_size
    height, width = clip.size
    size = None
    if settings.do_resize:
        limit = settings.max_pixels
        if settings.cap_pixels_per_frame:
            per = min(settings.max_video_tokens * settings.factor**2, limit // len(chosen))
            limit = max(per, int(settings.min_pixels * 1.05)) * len(chosen)
        size = smart_resize(
            len(chosen), height, width, settings.factor, temporal, settings.min_pixels, limit
        )  # refuses a single frame, and a strip, whatever size is asked for
        height, width = size = settings.fixed_size or size
    elif len(chosen) < temporal:
        raise InputError(f"video: {len(chosen)} frame(s); pass a single frame as a picture")
    groups = -(-len(chosen) // temporal)
    tokens = height // unit * (width // unit)
    check_patches((height, width), groups * temporal)
    rows = np.empty((groups * tokens, 3 * temporal * unit**2), np.float32)
    table = value_table(settings, 3)
    frames = (resized(frame, size, settings) for frame in clip.read(chosen))
    for number, group in enumerate(_grouped(frames, temporal)):
        rows[number * tokens : (number + 1) * tokens] = patch_rows(group, table, settings)[0]
    return rows, (groups, height // unit, width // unit)


def _grouped(frames: Iterator[np.ndarray], count: int) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    for frame in frames:
        group.append(frame)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group
