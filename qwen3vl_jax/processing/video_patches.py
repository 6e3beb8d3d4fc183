"""Videos to patches: which frames are used, their size, their patches, their times as text.

Source: the video processor of Qwen3-VL (transformers), whose names the settings keep.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.encoded_prompt import UsedFrames
from qwen3vl_jax.processing.image_loading import to_rgb
from qwen3vl_jax.processing.image_patches import (
    check_patches,
    patch_rows,
    resized,
    value_table,
)
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.qwen_items import KEYS as ITEM_RULES
from qwen3vl_jax.processing.qwen_items import VideoItem
from qwen3vl_jax.processing.setting_checks import checks, shown
from qwen3vl_jax.processing.video_loading import as_frames, open_clip, open_frames
from qwen3vl_jax.processing.video_settings import WITHOUT_EFFECT, VideoSettings, smart_resize
from qwen3vl_jax.processing.video_times import Clip, FramesDiffer

# Of the patches of one video; a video at qwen-vl-utils' limits has 2.7 GiB of them.
MAX_VIDEO_BYTES = 3 * 2**30
log = logging.getLogger("qwen3vl_jax")
# What says which video is meant, beside the settings.
CLIP_OPTIONS = ("video_metadata", "video_start", "video_end", "sample_fps")
_SAMPLING = ("fps", "num_frames", "nframes", "min_frames", "max_frames")
# What a video in a message may have.
OVERRIDES = (*checks(VideoSettings), "size", *WITHOUT_EFFECT, *CLIP_OPTIONS, *ITEM_RULES)


def frame_count(total: int, fps: float, settings: VideoSettings) -> int:
    """How many of `total` frames at `fps` a second are used; num_frames may be more than `total`."""
    if settings.num_frames is not None:
        return settings.num_frames
    least, most = settings.min_frames, settings.max_frames
    if settings.fps is None:
        return min(max(total, least), most)
    # As floats: the reference rounds down what is left of a large number after its limits.
    return int(min(max(total / fps * settings.fps, least), most, total))


def video_to_patches(
    source: Any,
    settings: VideoSettings | None = None,
    limits: Mapping[str, Any] | None = None,
    item: VideoItem | None = None,
    **overrides: Any,
) -> tuple[np.ndarray, tuple[int, int, int], UsedFrames]:
    """Patch rows of one video, its grid and the frames it uses.

    source: anything `open_clip` reads, or such a thing and its metadata as a pair. overrides:
    settings for this call; video_metadata {fps, frames_indices, total_num_frames} or sample_fps says
    what arrays and lists of frames are; video_start and video_end (seconds) cut. item: of a message,
    read as qwen-vl-utils reads it. Sampling is the same for a file, a list of frames and an array.
    limits: max_bytes and timeout of a URL. Frames pass one by one: memory does not grow with the
    video. Returns rows [t*h*w, C*Tp*P*P] float32 in merge order and (t, h, w). Raises InputError.
    """
    options = {name: overrides.pop(name, None) for name in CLIP_OPTIONS}
    settings = (settings or VideoSettings()).override(**overrides)
    if is_pair(source):
        source, metadata = source
        if options["video_metadata"] is not None:
            raise InputError("video_metadata: given beside a video that is paired with its own")
        options["video_metadata"] = metadata
    options["asked"] = overrides.keys()
    clip, item = _opened(source, settings, limits or {}, item, options)
    try:
        try:
            return _seen(clip, settings, item, options)
        except FramesDiffer:
            assert clip.recount is not None
            return _seen(clip.recount(), settings, item, options)
    except InputError as e:
        raise (InputError(f"{clip.name}: {e}") if clip.name else e) from None


def is_pair(source: Any) -> bool:
    """Whether this is a video and its metadata, as qwen-vl-utils returns them."""
    pair = isinstance(source, (list, tuple)) and len(source) == 2
    return pair and isinstance(source[1], Mapping) and not isinstance(source[0], Mapping)


def _opened(
    source: Any,
    settings: VideoSettings,
    limits: Mapping[str, Any],
    item: VideoItem | None,
    options: Mapping[str, Any],
) -> tuple[Clip, VideoItem | None]:
    """The video, and the item if its rules hold: those of an item that says anything.

    In a message frames without metadata were sampled before, in pairs.
    """
    metadata, called = options["video_metadata"], options["sample_fps"]
    rate_in_item = None if item is None else item.sample_fps or item.raw_fps
    sample_fps = rate_in_item if called is None else called
    rule = item if item is not None and item.given else None
    frames = as_frames(source, limits.get("rules"))
    if frames is None:
        return open_clip(source, metadata, sample_fps, **limits), rule

    def load(frame: Any) -> Image.Image:
        image = to_rgb(load_image(frame, **limits))
        if item is None or metadata is not None or not (item.resizes and settings.do_resize):
            return image
        high, wide = item.first_size(image.height, image.width, settings.factor)
        return image.resize((wide, high), settings.resample)

    if item is None or metadata is not None:
        is_sampled = not settings.do_sample_frames
        return open_frames(frames, metadata, sample_fps, load, is_sampled), rule
    unused = {*options["asked"], *item.given} & set(_SAMPLING)
    if item.fps and not item.sample_fps:
        unused -= {"fps"} - options["asked"]
    if unused:
        _warn_unused(", ".join(sorted(unused)))
    if len(frames) % 2:
        frames = [*frames, frames[-1]]
    rate = item.frame_fps if called is None else called
    return open_frames(frames, None, rate, load, True), item


@functools.cache
def _warn_unused(names: str) -> None:
    log.warning("frames in a message were sampled before and are all used, whatever %s says", names)


def _seen(
    clip: Clip, settings: VideoSettings, item: VideoItem | None, options: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[int, int, int], UsedFrames]:
    start, end = options["video_start"], options["video_end"]
    chosen, seconds = _choose(clip, settings, item, start, end)
    rows, grid = _rows(clip, chosen, settings, item)
    temporal = settings.temporal_patch_size
    padded = [*seconds, *[seconds[-1]] * (-len(seconds) % temporal)]
    pairs = zip(padded[::temporal], padded[temporal - 1 :: temporal], strict=True)
    indices = tuple(clip.indices[chosen].tolist())
    times = tuple((first + last) / 2 for first, last in pairs)
    return rows, grid, UsedFrames(clip.fps, indices, tuple(seconds), times)


def _choose(
    clip: Clip, settings: VideoSettings, item: VideoItem | None, start: Any, end: Any
) -> tuple[np.ndarray, list[float]]:
    """Places among the clip's frames of those that are used, and the moments they stand for."""
    begins = clip.seconds(np.arange(clip.total))
    low = begins[0] if start is None else _second("video_start", start)
    high = begins[-1] if end is None else _second("video_end", end)
    inside = np.flatnonzero((begins >= low - 1e-6) & (begins <= high + 1e-6))
    if clip.times is not None and begins[0] <= low <= min(high, begins[-1]):
        # A frame that begins before the cut may still be on the screen.
        first, last = clip.on_screen(np.array([low, high]))
        inside = np.arange(first, last + 1)
    if not len(inside):
        raise InputError(
            f"no frame from second {low:g} to {high:g}; the frames are at {begins[0]:g} to "
            f"{begins[-1]:g}"
        )
    if not (settings.do_sample_frames and clip.can_sample):
        return inside, begins[inside].tolist()
    total = len(inside)
    if clip.times is not None:
        low, high = max(low, begins[0]), min(high, begins[-1])
        total = round((high - low) * clip.fps) + 1
    asks = item is not None and (item.fps or item.nframes)
    if item is None or (settings.num_frames is not None and not asks):
        count = frame_count(total, clip.fps, settings)
    else:
        least, most = settings.min_frames, settings.max_frames
        count = item.frame_count(total, clip.fps, settings.fps, least, most)
    check_patches((settings.factor, settings.factor), count, most=MAX_VIDEO_BYTES)
    if clip.times is not None:
        moments = np.linspace(low, high, count)
        return clip.on_screen(moments), moments.tolist()
    places = np.linspace(inside[0], inside[-1], count).round().astype(np.int64)
    return places, clip.seconds(places).tolist()


def _second(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise InputError(f"{name} is {shown(value)}, expected seconds from 0")
    return float(value)


def _frame_size(
    clip: Clip, frames: int, settings: VideoSettings, item: VideoItem | None
) -> tuple[int, int] | None:
    """Height and width that the frames are resized to, None to leave them."""
    temporal = settings.temporal_patch_size
    if not settings.do_resize:
        if frames < temporal:
            raise InputError(f"video: {frames} frame(s); pass a single frame as a picture")
        return None
    if item is not None and item.resizes:
        return item.frame_size(frames, *clip.size, settings.factor)
    limit = settings.max_pixels
    if settings.cap_pixels_per_frame:
        per = min(settings.max_video_tokens * settings.factor**2, limit // frames)
        limit = max(per, int(settings.min_pixels * 1.05)) * frames
    size = smart_resize(
        frames, *clip.size, settings.factor, temporal, settings.min_pixels, limit
    )  # refuses a single frame, and a strip, whatever size is asked for
    return settings.fixed_size or size


def _rows(
    clip: Clip, chosen: np.ndarray, settings: VideoSettings, item: VideoItem | None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patch rows of the chosen frames, filled group by group as they are decoded."""
    temporal, unit = settings.temporal_patch_size, settings.patch_size
    size = _frame_size(clip, len(chosen), settings, item)
    height, width = size or clip.size
    groups = -(-len(chosen) // temporal)
    tokens = height // unit * (width // unit)
    check_patches((height, width), groups * temporal, most=MAX_VIDEO_BYTES)
    rows = np.empty((groups * tokens, 3 * temporal * unit**2), np.float32)
    table = value_table(settings, 3)
    frames = (resized(frame, size, settings) for frame in clip.read(chosen))
    for number in range(groups):
        group = list(itertools.islice(frames, temporal))
        if any(frame.shape[:2] != (height, width) for frame in group):
            raise InputError("video: its frames have several sizes, which do_resize=False leaves")
        rows[number * tokens : (number + 1) * tokens] = patch_rows(group, table, settings)[0]
    return rows, (groups, height // unit, width // unit)
