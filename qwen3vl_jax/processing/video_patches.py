"""Videos to patches: their frames, which are used, their size, their patches, their times as text.

Source: the video processor of Qwen3-VL (transformers), whose names the settings keep.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.config_checks import warn_once
from qwen3vl_jax.errors import InputError, shown, unexpected
from qwen3vl_jax.processing import image_patches, qwen_items
from qwen3vl_jax.processing.array_checks import integers
from qwen3vl_jax.processing.encoded_prompt import UsedFrames
from qwen3vl_jax.processing.fetching import MediaRules, short
from qwen3vl_jax.processing.image_loading import to_rgb
from qwen3vl_jax.processing.media import load_image, local_path
from qwen3vl_jax.processing.qwen_items import VideoItem
from qwen3vl_jax.processing.settings import (
    WITHOUT_EFFECT,
    VideoSettings,
    checks,
    frame_rate,
    smart_resize_video,
)
from qwen3vl_jax.processing.video_files import FramesDiffer, VideoReader, open_video

# Of the patches of one video; a video at qwen-vl-utils' limits has 2.7 GiB of them.
MAX_VIDEO_BYTES = 3 * 2**30
# Options that choose frames, beside the settings.
VIDEO_OPTIONS = ("video_metadata", "video_start", "video_end", "sample_fps")
_SAMPLING = ("fps", "num_frames", "nframes", "min_frames", "max_frames")
# Keys of a video in a message.
OVERRIDES = (*checks(VideoSettings), "size", *WITHOUT_EFFECT, *VIDEO_OPTIONS, *qwen_items.KEYS)
Frames = Sequence[Any] | np.ndarray
# "data:video/jpeg;base64,AAAA,BBBB": frames one after another.
_JOINED = re.compile(r"data:video/(jpeg|jpg|png|webp);base64,", re.IGNORECASE)


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
    is_array, in_message = isinstance(frames, np.ndarray), None
    if item is not None and metadata is None:
        in_message = rule = item
        unused = {*asked, *item.given} & set(_SAMPLING)
        if item.fps and not item.sample_fps:
            unused -= {"fps"} - asked
        if names := ", ".join(sorted(unused)):
            used = "all images of a folder or list of frames are used"
            warn_once(f"{used} (for video files alone: {names})")
        frames = [*frames, frames[-1]] if len(frames) % 2 else frames
        # The rate by which a list of frames is timed; fps is an older name of it.
        in_item = item.raw_fps or item.sample_fps or item.fps or qwen_items.SAMPLE_FPS
        rate = in_item if sample_fps is None else sample_fps

    def load(place: int) -> Image.Image:
        frame = frames[place].astype(np.uint8) if is_array else frames[place]
        image = to_rgb(load_image(frame, rules))
        if in_message is None or not (in_message.resizes and settings.do_resize):
            return image
        high, wide = in_message.first_size(image.height, image.width, settings.factor)
        return image.resize((wide, high), settings.resample)

    is_sampled = in_message is not None or not settings.do_sample_frames
    return _open_frames(len(frames), load, metadata, rate, is_sampled), rule


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
    padded = [*seconds, *[seconds[-1]] * (-len(seconds) % temporal)]
    groups = len(padded) // temporal
    image_patches.check_patches((height, width), len(padded), most=MAX_VIDEO_BYTES)
    grid = groups, height // unit, width // unit
    table = image_patches.value_table(settings, 3)
    patches = np.empty((groups, grid[1] * grid[2], 3 * temporal * unit**2), table.dtype)
    decoded = (image_patches.resized(frame, size, settings) for frame in video.read(chosen))
    for number in range(groups):
        group = list(itertools.islice(decoded, temporal))
        if any(frame.shape[:2] != (height, width) for frame in group):
            raise InputError("video: its frames have several sizes, which do_resize=False leaves")
        patches[number] = image_patches.frames_to_patches(group, table, settings)[0]
    pairs = zip(padded[::temporal], padded[temporal - 1 :: temporal], strict=True)
    times = tuple((first + last) / 2 for first, last in pairs)
    used = UsedFrames(video.fps, tuple(video.indices[chosen].tolist()), tuple(seconds), times)
    return patches.reshape(-1, patches.shape[2]), grid, used


def as_frames(source: Any, rules: MediaRules | None = None) -> Frames | None:
    """The frames of a source that holds them one by one, None for a video file. Raises InputError.

    A list of images that `load_image` reads; an array [T H W C] or [T C H W] of 0 to 255, as [T H W C]; a
    folder of images, by the numbers in their names; "data:video/jpeg;base64," with frames joined by commas.
    """
    if isinstance(source, (list, tuple)):
        return source
    if hasattr(source, "__array__"):
        return _array(source)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        return None
    if joined := _JOINED.match(source):
        head = f"data:image/{joined[1]};base64,"
        return [head + text for text in source[joined.end() :].split(",") if text]
    path = local_path(source) if source[:6].lower() == "file:/" else source
    found, rules = None, rules or MediaRules()
    with contextlib.suppress(OSError, ValueError):
        if os.path.isdir(os.path.join(rules.root, path)):
            found = os.listdir(rules.local(path, "video"))
    if found is None:
        return None
    kinds = Image.registered_extensions()
    names = [n for n in found if os.path.splitext(n)[1].lower() in kinds and n[0] != "."]
    if not names:
        raise InputError(f"{short(path)}: no image in this folder, expected the frames of a video")

    def order(name: str) -> list[Any]:
        parts = re.split("([0-9]+)", name)
        return [int(part) if number % 2 else part for number, part in enumerate(parts)]

    return [os.path.join(path, name) for name in sorted(names, key=order)]


def _open_frames(
    total: int, load: Callable[[int], Image.Image], metadata: Any, sample_fps: Any, is_sampled: bool
) -> VideoReader:
    """A video of frames, each an RGB image by `load`. Raises InputError."""
    if total == 0:
        raise InputError("video: it has no frame")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping):
        raise unexpected("video_metadata", type(metadata).__name__, "an object")
    if sample_fps is not None and metadata.get("fps") is not None:
        raise InputError("video: sample_fps and video_metadata's fps are both given")
    fps = metadata.get("fps") if sample_fps is None else sample_fps
    if fps is None:
        advice = 'give the rate of its frames: video_metadata={"fps": ...} or sample_fps'
        raise InputError(f"video: frames without times; {advice}")
    fps = frame_rate("video: fps", fps)
    given = metadata.get("frames_indices")
    given = range(total) if given is None else given
    indices = integers("video_metadata: frames_indices", given, as_floats=True).reshape(-1)
    if len(indices) != total:
        found = f"{len(indices)} frames_indices for {total} frames"
        raise InputError(f"video_metadata: {found}, expected one each")
    if (np.diff(indices) < 0).any() or indices[0] < 0:
        raise InputError("video_metadata: frames_indices fall or are negative")
    is_source = not is_sampled and np.array_equal(indices, np.arange(total))
    if is_source and (count := metadata.get("total_num_frames")) not in (None, total):
        found = f"total_num_frames: got {shown(count)} for {total} frames"
        advice = "if they were chosen before, pass frames_indices and do_sample_frames=False"
        raise InputError(f"video_metadata: {found}; {advice}")
    width, height = load(0).size

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        for place in places:
            frame = load(place)
            if frame.size != (width, height):
                found = f"frame {place} has {frame.width} x {frame.height} pixels"
                first = f"the first {width} x {height}"
                raise InputError(f"video: {found} and {first}; all must have one size")
            yield frame

    return VideoReader("", total, fps, (height, width), indices, read, can_sample=is_source)


def _array(source: Any) -> np.ndarray:
    array, channels = np.asarray(source), (1, 3, 4)
    if array.ndim == 4 and array.shape[1] in channels:
        array = np.moveaxis(array, 1, 3)
    if array.ndim != 4 or array.shape[3] not in channels or not array.size:
        expected = "[T H W C] or [T C H W] with 1, 3 or 4 channels"
        raise InputError(f"video array: shape {list(np.shape(source))}, expected {expected}")
    # One of 0 and 1 alone may be scaled.
    is_number = array.dtype.kind in "iuf"
    holds_bytes = is_number and array.min() >= 0 and 1 < array.max() <= 255
    if array.dtype != np.uint8 and not (holds_bytes and (array == np.floor(array)).all()):
        expected = "whole numbers from 0 to 255, not all 0 or 1; scale and round it to uint8"
        raise unexpected("video array", array.dtype, expected)
    return array


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
        raise unexpected(name, shown(value), "seconds from 0")
    return float(value)
