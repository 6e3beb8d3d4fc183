"""Animated WebP and PNG files as videos: Pillow reads them, FFmpeg does not."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_loading import (
    MAX_IMAGE_BYTES,
    decode_bytes,
    decode_memory,
    to_rgb,
)
from qwen3vl_jax.processing.video_reader import VideoReader, picked, timing

# Milliseconds of a frame that gives none, as browsers show it.
_UNTIMED = 100
# Held while a frame is decoded.
_BYTES_A_PIXEL = 16
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError)
log = logging.getLogger("qwen3vl_jax")


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
    """The frames of an animation, one after another."""
    with start() as file:
        if file.seek(0, io.SEEK_END) > MAX_IMAGE_BYTES:
            raise InputError(
                f"{name}: expected an animation of at most {MAX_IMAGE_BYTES >> 20} MiB"
            )
        file.seek(0)
        try:
            image = Image.open(file, formats=("WEBP", "PNG"))
        except (*_BROKEN, Image.DecompressionBombError) as e:
            raise InputError(f"{name}: not a video, or its header is cut") from e
        with decode_memory(decode_bytes(*image.size, _BYTES_A_PIXEL, "an animation", name)):
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()
                yield image
