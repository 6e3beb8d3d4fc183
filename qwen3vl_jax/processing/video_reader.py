"""A video before its frames are decoded: how many there are, and when they are shown.

Animated WebP and PNG files are read here too, by Pillow: FFmpeg does not read them.
"""

import dataclasses
import io
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_loading import MAX_IMAGE_BYTES, decode_cost, decode_memory, to_rgb

# Milliseconds of a frame that gives none, as browsers show it.
_UNTIMED = 100
# Bytes of memory per pixel while a frame is decoded.
_BYTES_A_PIXEL = 16
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError)
log = logging.getLogger("qwen3vl_jax")


@dataclasses.dataclass(frozen=True)
class VideoReader:
    """A video before its frames are decoded: size (height, width), times, and how to read frames.

    `indices` [total] is each frame's number in its source; `times` [total] seconds from the first frame,
    where they do not follow from `fps`. `read` yields the RGB frames at places that do not fall; it raises
    FramesDiffer where the file holds other frames than were counted, and `recount` counts them again.
    """

    name: str
    total: int
    fps: float
    size: tuple[int, int]
    indices: np.ndarray
    read: Callable[[np.ndarray], Iterator[Image.Image]]
    times: np.ndarray | None = None
    can_sample: bool = True
    recount: "Callable[[], VideoReader] | None" = None

    def seconds(self, places: np.ndarray) -> np.ndarray:
        """When the frames at some places begin."""
        return self.indices[places] / self.fps if self.times is None else self.times[places]

    def on_screen(self, moments: np.ndarray) -> np.ndarray:
        """The frame on the screen at each moment: the last one that has begun."""
        times = self.seconds(np.arange(self.total))
        return np.clip(np.searchsorted(times, moments + 1e-6, side="right") - 1, 0, self.total - 1)


class FramesDiffer(Exception):
    """The frames that are decoded are not those that the packets of the file promise."""


def picked(
    frames: Iterator[Any], places: np.ndarray, image: Callable[[Any], Image.Image]
) -> Iterator[Image.Image]:
    """The images of frames at places that do not fall; raises FramesDiffer with a place beyond the end."""
    at, shown = -1, None
    for place in places.tolist():
        if place > at:
            frame = next(itertools.islice(frames, place - at - 1, None), None)
            if frame is None:
                raise FramesDiffer(place)
            at, shown = place, image(frame)
        yield cast(Image.Image, shown)


def timing(
    points: Sequence[Any], base: Any, rates: Sequence[Any], name: str
) -> tuple[float, np.ndarray | None]:
    """Frames a second, and the seconds of each frame if the rate varies by more than half a frame."""
    if len(points) == 1:
        return float(rates[0]) if rates else 1.0, None
    if base is None or None in points:
        if not rates:
            raise InputError(f"{name}: the file says neither the times nor the rate of its frames")
        return float(rates[0]), None
    times = np.asarray(points, np.float64) * float(base)
    steps = np.diff(times)
    if (back := steps < 0).any():
        # Files that were joined end to end: the clock begins anew, and the player goes on.
        steps[back] = np.median(steps[~back]) if not back.all() else 1 / float((*rates, 1)[0])
    times = np.concatenate([[0.0], np.cumsum(steps)])
    mean = (len(times) - 1) / max(float(times[-1]), 1e-9)
    for fps in (*map(float, rates), mean):
        if np.abs(times - np.arange(len(times)) / fps).max() <= 0.5 / fps:
            return fps, None
    return mean, times


def is_animation(head: bytes) -> bool:
    """Whether a file that begins with these 16 bytes is a WebP or PNG."""
    return head.startswith(b"\x89PNG\r\n\x1a\n") or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")


def open_animation(start: Callable[[], Any], name: str) -> VideoReader:
    """The video in an animated WebP or PNG that `start` opens. Raises InputError."""
    milliseconds, size, error = [], (0, 0), None
    try:
        for frame in _frames(start, name):
            size = frame.height, frame.width
            milliseconds.append(round(frame.info.get("duration") or _UNTIMED))
    except _BROKEN as e:
        error = e
    if not milliseconds:
        raise InputError(f"{name}: no frame of the video can be decoded") from error
    if error is not None:
        log.warning("%s: damaged video: the first %d frames are used", name, len(milliseconds))
    points = np.cumsum([0, *milliseconds[:-1]]).tolist()
    fps, times = timing(points, 0.001, [1000 / milliseconds[0]], name)
    total = len(points)

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        return picked(_frames(start, name), places, to_rgb)

    return VideoReader(name, total, fps, size, np.arange(total), read, times)


def _frames(start: Callable[[], Any], name: str) -> Iterator[Image.Image]:
    with start() as file:
        if file.seek(0, io.SEEK_END) > MAX_IMAGE_BYTES:
            most = MAX_IMAGE_BYTES >> 20
            raise InputError(f"{name}: expected an animation of at most {most} MiB")
        file.seek(0)
        try:
            image = Image.open(file, formats=("WEBP", "PNG"))
        except (*_BROKEN, Image.DecompressionBombError) as e:
            raise InputError(f"{name}: not a video, or its header is cut") from e
        with decode_memory(decode_cost(*image.size, _BYTES_A_PIXEL, "an animation", name)):
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()
                yield image
