"""Videos that are frames one by one: a list, an array, a folder of images."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError, shown
from qwen3vl_jax.processing.array_checks import integers
from qwen3vl_jax.processing.fetching import MediaRules, short
from qwen3vl_jax.processing.media import local_path
from qwen3vl_jax.processing.settings import frame_rate
from qwen3vl_jax.processing.video_files import VideoReader

Frames = Sequence[Any] | np.ndarray
Load = Callable[[Any], Image.Image]
_CHANNELS = (1, 3, 4)
_ADVICE = 'give the rate of its frames: video_metadata={"fps": ...} or sample_fps'
# "data:video/jpeg;base64,AAAA,BBBB": frames one after another.
_JOINED = re.compile(r"data:video/(jpeg|jpg|png|webp);base64,", re.IGNORECASE)


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
    return _folder(path, rules or MediaRules())


def _folder(path: str, rules: MediaRules) -> list[str] | None:
    try:
        if not os.path.isdir(os.path.join(rules.root, path)):
            return None
        found = os.listdir(rules.local(path, "video"))
    except (OSError, ValueError):
        return None
    kinds = Image.registered_extensions()
    names = [n for n in found if os.path.splitext(n)[1].lower() in kinds and n[0] != "."]
    if not names:
        raise InputError(f"{short(path)}: no image in this folder, expected the frames of a video")

    def order(name: str) -> list[Any]:
        parts = re.split("([0-9]+)", name)
        return [int(part) if number % 2 else part for number, part in enumerate(parts)]

    return [os.path.join(path, name) for name in sorted(names, key=order)]


def open_frames(
    frames: Frames, metadata: Any, sample_fps: Any, load: Load, is_sampled: bool = False
) -> VideoReader:
    """A video of frames that `as_frames` found, each an RGB image by `load`. Raises InputError."""
    total = len(frames)
    if total == 0:
        raise InputError("video: it has no frame")
    fps, indices, is_source = _described(total, metadata, sample_fps, is_sampled)

    def get(place: int) -> Image.Image:
        frame = frames[place]
        return load(frame.astype(np.uint8) if isinstance(frames, np.ndarray) else frame)

    width, height = get(0).size

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        for place in places:
            frame = get(place)
            if frame.size != (width, height):
                found = f"frame {place} has {frame.width} x {frame.height} pixels"
                first = f"the first {width} x {height}"
                raise InputError(f"video: {found} and {first}; all must have one size")
            yield frame

    return VideoReader("", total, fps, (height, width), indices, read, can_sample=is_source)


def _described(
    total: int, metadata: Any, sample_fps: Any, is_sampled: bool
) -> tuple[float, np.ndarray, bool]:
    """Rate and source numbers of frames, and whether they are a source that may be sampled."""
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping):
        raise InputError(f"video_metadata: got {type(metadata).__name__}, expected an object")
    if sample_fps is not None and metadata.get("fps") is not None:
        raise InputError("video: sample_fps and video_metadata's fps are both given")
    fps = metadata.get("fps") if sample_fps is None else sample_fps
    if fps is None:
        raise InputError(f"video: frames without times; {_ADVICE}")
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
    count = metadata.get("total_num_frames")
    if is_source and count not in (None, total):
        found = f"total_num_frames: got {shown(count)} for {total} frames"
        advice = "if they were chosen before, pass frames_indices and do_sample_frames=False"
        raise InputError(f"video_metadata: {found}; {advice}")
    return fps, indices, is_source


def _array(source: Any) -> np.ndarray:
    array = np.asarray(source)
    if array.ndim == 4 and array.shape[1] in _CHANNELS:
        array = np.moveaxis(array, 1, 3)
    if array.ndim != 4 or array.shape[3] not in _CHANNELS or not array.size:
        expected = "[T H W C] or [T C H W] with 1, 3 or 4 channels"
        raise InputError(f"video array: shape {list(np.shape(source))}, expected {expected}")
    # One of 0 and 1 alone may be scaled.
    is_number = array.dtype.kind in "iuf"
    holds_bytes = is_number and array.min() >= 0 and 1 < array.max() <= 255
    if array.dtype != np.uint8 and not (holds_bytes and (array == np.floor(array)).all()):
        expected = (
            "whole numbers from 0 to 255 that are not all 0 or 1; scale and round it to uint8"
        )
        raise InputError(f"video array: got {array.dtype}, expected {expected}")
    return array
