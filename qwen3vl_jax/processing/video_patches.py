"""Videos to patches: which frames are used, their size, their patches, their times as text.

Source: the video processor of Qwen3-VL (transformers), whose names the settings keep.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.config_checks import warn_once
from qwen3vl_jax.errors import InputError, shown
from qwen3vl_jax.processing import image_patches, qwen_items
from qwen3vl_jax.processing.encoded_prompt import UsedFrames
from qwen3vl_jax.processing.fetching import MediaRules
from qwen3vl_jax.processing.image_loading import to_rgb
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.qwen_items import VideoItem
from qwen3vl_jax.processing.settings import (
    WITHOUT_EFFECT,
    VideoSettings,
    checks,
    smart_resize_video,
)
from qwen3vl_jax.processing.video_files import FramesDiffer, VideoReader, open_video
from qwen3vl_jax.processing.video_loading import as_frames, open_frames

# Of the patches of one video; a video at qwen-vl-utils' limits has 2.7 GiB of them.
MAX_VIDEO_BYTES = 3 * 2**30
# Options that choose frames, beside the settings.
VIDEO_OPTIONS = ("video_metadata", "video_start", "video_end", "sample_fps")
_SAMPLING = ("fps", "num_frames", "nframes", "min_frames", "max_frames")
# Keys of a video in a message.
OVERRIDES = (*checks(VideoSettings), "size", *WITHOUT_EFFECT, *VIDEO_OPTIONS, *qwen_items.KEYS)


def video_to_patches(
    source: Any,
    settings: VideoSettings | None = None,
    rules: MediaRules | None = None,
    item: VideoItem | None = None,
    **overrides: Any,
) -> tuple[np.ndarray, tuple[int, int, int], UsedFrames]:
    """Patches of one video, its grid and the frames it uses; memory does not grow with the video.

    source: a file that `open_video` reads, frames, or a pair of that and its metadata. overrides:
    settings for this call; video_metadata {fps, frames_indices, total_num_frames} or sample_fps
    describes frames; video_start and video_end (seconds) cut. item: of a message, read as qwen-vl-utils
    reads it. Returns patches [t*h*w, C*Tp*P*P] float32 in merge order and (t, h, w). Raises InputError.
    """
    metadata, start, end, rate = (overrides.pop(name, None) for name in VIDEO_OPTIONS)
    settings = (settings or VideoSettings()).override(**overrides)
    if is_pair(source):
        if metadata is not None:
            raise InputError("video_metadata: given beside a video that is paired with its own")
        source, metadata = source
    video, item = _open(source, settings, rules, item, metadata, rate, overrides.keys())
    try:
        try:
            return _encode(video, settings, item, start, end)
        except FramesDiffer:
            if video.recount is None:
                raise InputError("its frames changed while it was read") from None
            return _encode(video.recount(), settings, item, start, end)
    except InputError as e:
        raise (InputError(f"{video.name}: {e}") if video.name else e) from None


def is_pair(source: Any) -> bool:
    """Whether this is a video and its metadata, as qwen-vl-utils returns them."""
    pair = isinstance(source, (list, tuple)) and len(source) == 2
    return pair and isinstance(source[1], Mapping) and not isinstance(source[0], Mapping)


def _open(source, settings, rules, item: VideoItem | None, metadata, sample_fps, asked):
    """The VideoReader of a file or of frames, and the item if its rules hold. Raises InputError."""
    rate_in_item = None if item is None else item.sample_fps or item.raw_fps
    rate = rate_in_item if sample_fps is None else sample_fps
    rule = item if item is not None and item.given else None
    frames = as_frames(source, rules)
    if frames is None:
        if metadata is not None or rate is not None:
            names = "video_metadata, sample_fps and raw_fps"
            raise InputError(f"{names} describe arrays and lists of frames; a file has its own")
        return open_video(source, rules), rule
    in_message = item is not None and metadata is None

    def load(frame: Any) -> Image.Image:
        image = to_rgb(load_image(frame, rules))
        if item is None or not (in_message and item.resizes and settings.do_resize):
            return image
        high, wide = item.first_size(image.height, image.width, settings.factor)
        return image.resize((wide, high), settings.resample)

    if item is None or not in_message:
        return open_frames(frames, metadata, rate, load, not settings.do_sample_frames), rule
    unused = {*asked, *item.given} & set(_SAMPLING)
    if item.fps and not item.sample_fps:
        unused -= {"fps"} - asked
    if names := ", ".join(sorted(unused)):
        used = "all images of a folder or list of frames are used"
        warn_once(f"{used} (for video files alone: {names})")
    if len(frames) % 2:
        frames = [*frames, frames[-1]]
    # The rate by which a list of frames is timed; fps is an older name of it.
    in_item = item.raw_fps or item.sample_fps or item.fps or qwen_items.SAMPLE_FPS
    rate = in_item if sample_fps is None else sample_fps
    return open_frames(frames, None, rate, load, True), item


def _encode(
    video: VideoReader, settings: VideoSettings, item: VideoItem | None, start: Any, end: Any
) -> tuple[np.ndarray, tuple[int, int, int], UsedFrames]:
    """Patches of the frames that are used, written group by group as they are decoded."""
    chosen, seconds = sample_frames(video, settings, item, start, end)
    temporal, unit = settings.temporal_patch_size, settings.patch_size
    frames, limit = len(chosen), settings.max_pixels
    if not settings.do_resize:
        if frames < temporal:
            raise InputError(f"video: {frames} frame(s); pass a single frame as an image")
        size = None
    elif item is not None and item.resizes:
        size = item.frame_size(frames, *video.size, settings.factor)
    else:
        if settings.cap_pixels_per_frame:
            per = min(settings.max_video_tokens * settings.factor**2, limit // frames)
            limit = max(per, int(settings.min_pixels * 1.05)) * frames
        limits = settings.factor, temporal, settings.min_pixels, limit
        # It refuses a single frame, and a strip, whatever size is asked for.
        size = smart_resize_video(frames, *video.size, *limits)
        size = settings.fixed_size or size
    height, width = size or video.size
    count = height // unit * (width // unit)
    padded = [*seconds, *[seconds[-1]] * (-len(seconds) % temporal)]
    groups = len(padded) // temporal
    image_patches.check_patches((height, width), len(padded), most=MAX_VIDEO_BYTES)
    patches = np.empty((groups, count, 3 * temporal * unit**2), np.float32)
    table = image_patches.value_table(settings, 3)
    decoded = (image_patches.resized(frame, size, settings) for frame in video.read(chosen))
    for number in range(groups):
        group = list(itertools.islice(decoded, temporal))
        if any(frame.shape[:2] != (height, width) for frame in group):
            raise InputError("video: its frames have several sizes, which do_resize=False leaves")
        patches[number] = image_patches.frames_to_patches(group, table, settings)[0]
    pairs = zip(padded[::temporal], padded[temporal - 1 :: temporal], strict=True)
    times = tuple((first + last) / 2 for first, last in pairs)
    used = UsedFrames(video.fps, tuple(video.indices[chosen].tolist()), tuple(seconds), times)
    patches = patches.reshape(groups * count, -1)
    return patches, (groups, height // unit, width // unit), used


def frame_count(total: int, fps: float, settings: VideoSettings) -> int:
    """How many of `total` frames at `fps` a second are used; num_frames may be more than `total`."""
    if settings.num_frames is not None:
        return settings.num_frames
    least, most = settings.min_frames, settings.max_frames
    if settings.fps is None:
        return min(max(total, least), most)
    # As floats: the reference rounds down a large number after its limits.
    return int(min(max(total / fps * settings.fps, least), most, total))


def sample_frames(
    video: VideoReader, settings: VideoSettings, item: VideoItem | None, start: Any, end: Any
) -> tuple[np.ndarray, list[float]]:
    """Places of the frames that are used among the video's, and their times in seconds."""
    begins = video.seconds(np.arange(video.total))
    low = begins[0] if start is None else _second("video_start", start)
    high = begins[-1] if end is None else _second("video_end", end)
    inside = np.flatnonzero((begins >= low - 1e-6) & (begins <= high + 1e-6))
    if video.times is not None and begins[0] <= low <= min(high, begins[-1]):
        # A frame that begins before the cut may still be on the screen.
        first, last = video.on_screen(np.array([low, high]))
        inside = np.arange(first, last + 1)
    if not len(inside):
        frames = f"the frames are at {begins[0]:g} to {begins[-1]:g}"
        raise InputError(f"no frame from second {low:g} to {high:g}; {frames}")
    if not (settings.do_sample_frames and video.can_sample):
        return inside, begins[inside].tolist()
    total = len(inside)
    if video.times is not None:
        low, high = max(low, begins[0]), min(high, begins[-1])
        total = round((high - low) * video.fps) + 1
    asks = item is not None and (item.fps or item.nframes)
    if item is None or (settings.num_frames is not None and not asks):
        count = frame_count(total, video.fps, settings)
    else:
        least, most = settings.min_frames, settings.max_frames
        count = item.frame_count(total, video.fps, settings.fps, least, most)
    image_patches.check_patches((settings.factor, settings.factor), count, most=MAX_VIDEO_BYTES)
    if video.times is not None:
        moments = np.linspace(low, high, count)
        return video.on_screen(moments), moments.tolist()
    places = np.linspace(inside[0], inside[-1], count).round().astype(np.int64)
    return places, video.seconds(places).tolist()


def _second(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise InputError(f"{name}: got {shown(value)}, expected seconds from 0")
    return float(value)
