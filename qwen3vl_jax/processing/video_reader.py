"""A video before its frames are decoded: how many there are, and when they are shown."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class VideoReader:
    """A video before its frames are decoded: size, times, and how to read frames.

    size is (height, width); `indices` [total] is each frame's number in its source, which differs
    from 0, 1, ... where frames were chosen before; `times` [total] seconds from the first frame,
    where they do not follow from `fps`. `read` yields the RGB frames at places that do not fall; it
    raises FramesDiffer where the file does not hold the frames that were counted, and `recount`
    then gives the video with the frames that can be decoded.
    """

    name: str
    total: int
    fps: float
    size: tuple[int, int]
    indices: np.ndarray
    read: Callable[[np.ndarray], Iterator[Image.Image]]
    times: np.ndarray | None = None
    can_sample: bool = True
    recount: Callable[[], VideoReader] | None = None

    def seconds(self, places: np.ndarray) -> np.ndarray:
        """When the frames at some places begin."""
        if self.times is not None:
            return self.times[places]
        return self.indices[places] / self.fps

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
