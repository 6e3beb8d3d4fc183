"""Video files: the frames that a player shows, their times, upright and in RGB.

FFmpeg reads them, and Pillow animated WebP and PNG files, which FFmpeg does not read.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError, one_line
from qwen3vl_jax.processing.fetching import MediaRules
from qwen3vl_jax.processing.image_loading import (
    LIMIT,
    MAX_IMAGE_BYTES,
    decode_cost,
    decode_memory,
    to_rgb,
)
from qwen3vl_jax.processing.media import MediaFile, open_source

# Seconds that may be missing at the end of a file that is not cut.
_SLACK = 0.5
# Held while frames are decoded: those of the decoder, and copies in RGB; of an animation fewer.
_BYTES_A_PIXEL, _ANIMATION_BYTES = 32, 16
# Of the frames that the decoder's threads hold.
_THREAD_PIXELS = 1 << 27
# Milliseconds of an animation's frame that gives none, as browsers show it.
_UNTIMED = 100
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


def _picked(
    frames: Iterator[Any], places: np.ndarray, image: Callable[[Any], Image.Image]
) -> Iterator[Image.Image]:
    """The images of frames at places that do not fall; raises FramesDiffer with a place beyond the end."""
    at, shown = -1, cast(Image.Image, None)
    for place in places.tolist():
        if place > at:
            frame = next(itertools.islice(frames, place - at - 1, None), None)
            if frame is None:
                raise FramesDiffer(place)
            at, shown = place, image(frame)
        yield shown


def _timing(points: Sequence[Any], base: Any, rates: Sequence[Any], name: str) -> tuple[float, Any]:
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


def open_video(source: Any, rules: MediaRules | None = None) -> VideoReader:
    """The video in a file, of any form that `open_source` takes. Raises InputError."""
    file = open_source(source, "video", rules)
    with file.open() as opened:
        head = opened.read(16)
    if head.startswith(b"\x89PNG\r\n\x1a\n") or (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return _open_animation(file)
    try:
        return _count_packets(file)
    except FramesDiffer:
        return _count_frames(file)


def _reader(file, points, clock, first, recount=None, is_exact=False) -> VideoReader:
    """The video shown at `points` of a clock, exact or not; without `recount` errors are skipped."""
    from av.sidedata.sidedata import Type

    total, matrix = len(points), (1, 0, 0, 1)
    # Reading it keeps the frame in memory until the garbage is collected: it is read once a file.
    if (data := first.side_data.get(Type.DISPLAYMATRIX)) is not None:
        matrix = np.frombuffer(bytes(data), "=i4")[[0, 1, 3, 4]].tolist()
    shown = _upright(first, matrix)
    fps, times = _timing(points, clock[0], clock[1], file.name)

    def checked(frames: Iterator[Any]) -> Iterator[Any]:
        for number, frame in enumerate(frames):
            is_other = number >= total or (is_exact and frame.pts != points[number])
            if recount is not None and (is_other or frame.is_corrupt):
                raise FramesDiffer
            yield frame

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        with _open_stream(file) as (container, stream):
            frames = checked(_frames(container, stream, [] if recount is None else None))
            try:
                yield from _picked(frames, places, lambda frame: _upright(frame, matrix))
            except FramesDiffer as e:
                if recount is not None:
                    raise
                raise InputError(f"damaged video: it ends before frame {e} of {total}") from None

    size = shown.height, shown.width
    return VideoReader(file.name, total, fps, size, np.arange(total), read, times, True, recount)


def _count_packets(file: MediaFile) -> VideoReader:
    """The video by its packets; only the first frame is decoded. Raises FramesDiffer if that fails."""
    import av

    end, packets = -math.inf, []
    with _open_stream(file) as (container, stream):
        try:
            for p in container.demux():
                point = p.pts if p.pts is not None else p.dts
                if p.stream.index == stream.index and p.size:
                    packets.append((p.pts, p.dts, p.is_discard, p.is_corrupt))
                if point is not None:
                    end = max(end, float((point + (p.duration or 0)) * p.time_base))
        except av.FFmpegError:
            raise FramesDiffer from None
        clock, length, begin = _clock(stream), container.duration, container.start_time or 0
    points = [dts if pts is None else pts for pts, dts, is_discard, _ in packets if not is_discard]
    with _open_stream(file) as (container, stream):
        first = next(_frames(container, stream, None), None)
    order = [dts for _, dts, *_ in packets if dts is not None]
    damaged = any(is_corrupt for *_, is_corrupt in packets)
    if first is None or not points or damaged or order != sorted(order):
        raise FramesDiffer
    if None not in points:
        points.sort()
    is_exact = all(pts is not None for pts, *_ in packets)
    if is_exact and first.pts is not None:
        # A stream that begins between key frames shows nothing before the first of them.
        points = [point for point in points if point >= first.pts]
    if length and math.isfinite(end) and (missing := (length + begin) / 1e6 - end) > _SLACK:
        log.warning("%s: the video is cut: its last %.1f seconds are missing", file.name, missing)
    recount = functools.partial(_count_frames, file)
    return _reader(file, points, clock, first, recount, is_exact)


def _count_frames(file: MediaFile) -> VideoReader:
    """The video with the frames that can be decoded, found by decoding all. Raises InputError for none."""
    points, damage, first = [], [], None
    with _open_stream(file) as (container, stream):
        for frame in _frames(container, stream, damage):
            first = first or frame
            points.append(frame.pts if frame.pts is not None else frame.dts)
            if frame.is_corrupt:
                damage.append(None)
        if first is None:
            raise InputError(f"{file.name}: no frame of the video can be decoded")
        if damage:
            used = "%s: damaged video: the %d frames that can be decoded are used, %d errors in it"
            log.warning(used, file.name, len(points), len(damage))
        return _reader(file, points, _clock(stream), first)


def _clock(stream: Any) -> tuple[Any, list[Any]]:
    """The unit of a stream's times, and frames a second by file and FFmpeg, the most trusted first."""
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    return stream.time_base, [rate for rate in rates if rate]


def _frames(container: Any, stream: Any, damage: list[Any] | None) -> Iterator[Any]:
    """The decoded frames as displayed. `damage` gets the errors; without it they raise FramesDiffer."""
    import av

    packets, packet = container.demux(stream), cast(Any, True)
    while packet is not None:
        frames = []
        try:
            # None empties the decoder.
            packet = next(packets, None)
            if damage is not None and packet is not None and packet.is_corrupt:
                damage.append(packet)
            frames = stream.decode(packet)
        except av.EOFError:
            packet = None
        except av.FFmpegError as error:
            if damage is None:
                raise FramesDiffer from None
            damage.append(error)
        yield from frames


@contextlib.contextmanager
def _open_stream(file: MediaFile) -> Iterator[tuple[Any, Any]]:
    """A PyAV container, which opens no other file or address, and its video stream. Raises InputError."""
    import av
    from av.stream import Disposition

    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(file.open())
        try:
            options = {"protocol_whitelist": "none"}
            container = stack.enter_context(av.open(opened, container_options=options))
        except (av.FFmpegError, ValueError, OSError) as e:
            reason = getattr(e, "strerror", None) or one_line(e)
            raise InputError(f"{file.name}: not a video, or its header is cut: {reason}") from e
        cover = Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise InputError(f"{file.name}: no video in this file, it holds {kinds}")
        # A stream of a codec that FFmpeg does not have has no decoder.
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            advice = "the codec of this video is unknown; convert it, as to H.264"
            raise InputError(f"{file.name}: {advice}")
        # Of an animated AVIF not the still image that stands for it.
        best: Any = container.streams.best("video")
        stream = best if best in streams else streams[0]
        held = decode_cost(stream.width, stream.height, _BYTES_A_PIXEL, "a video", file.name)
        stack.enter_context(decode_memory(held))
        # Later frames of a file may be larger than it says.
        stream.codec_context.options = {"max_pixels": str(MAX_IMAGE_BYTES // _BYTES_A_PIXEL)}
        stream.thread_type = "AUTO"
        # Each thread holds frames of its own.
        threads = _THREAD_PIXELS // max(held // _BYTES_A_PIXEL, 1)
        if threads < 16:
            stream.codec_context.thread_count = min(threads, os.cpu_count() or 1)
        try:
            yield container, stream
        except av.FFmpegError as e:
            reason = getattr(e, "strerror", None) or one_line(e)
            raise InputError(f"{file.name}: damaged video: {reason}") from e


def _upright(frame: Any, matrix: Sequence[int]) -> Image.Image:
    """RGB of a frame turned by a display matrix x' = a x + c y, y' = b x + d y, transparency on white."""
    alpha = any(part.is_alpha for part in frame.format.components)
    values = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        values, a, d = values.swapaxes(0, 1), c, b
    values = values[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return to_rgb(Image.fromarray(np.ascontiguousarray(values)))


def _open_animation(file: MediaFile) -> VideoReader:
    """The video in an animated WebP or PNG. Raises InputError."""
    milliseconds, size, error = [], (0, 0), None
    try:
        for frame in _animation_frames(file):
            size = frame.height, frame.width
            milliseconds.append(round(frame.info.get("duration") or _UNTIMED))
    except _BROKEN as e:
        error = e
    if not milliseconds:
        raise InputError(f"{file.name}: no frame of the video can be decoded") from error
    if error is not None:
        log.warning("%s: damaged video: the first %d frames are used", file.name, len(milliseconds))
    points = np.cumsum([0, *milliseconds[:-1]]).tolist()
    fps, times = _timing(points, 0.001, [1000 / milliseconds[0]], file.name)

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        return _picked(_animation_frames(file), places, to_rgb)

    return VideoReader(file.name, len(points), fps, size, np.arange(len(points)), read, times)


def _animation_frames(file: MediaFile) -> Iterator[Image.Image]:
    with file.open() as opened:
        if opened.seek(0, io.SEEK_END) > MAX_IMAGE_BYTES:
            raise InputError(f"{file.name}: expected an animation of at most {LIMIT}")
        opened.seek(0)
        try:
            image = Image.open(opened, formats=("WEBP", "PNG"))
        except (*_BROKEN, Image.DecompressionBombError) as e:
            raise InputError(f"{file.name}: not a video, or its header is cut") from e
        with decode_memory(decode_cost(*image.size, _ANIMATION_BYTES, "an animation", file.name)):
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()
                yield image
