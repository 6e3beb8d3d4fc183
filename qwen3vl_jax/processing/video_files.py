"""Video files: the frames that a player shows, their times, upright and in RGB."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
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
from qwen3vl_jax.processing.video_reader import FramesDiffer, VideoReader, reason, timing

# Seconds that may be missing at the end of a file that is not cut.
_SLACK = 0.5
# Held while frames are decoded: those of the decoder, and copies in RGB.
_BYTES_A_PIXEL = 32
# Of the frames that the decoder's threads hold.
_THREAD_PIXELS = 1 << 27
log = logging.getLogger("qwen3vl_jax")


def open_file(start: Callable[[], Any], name: str) -> VideoReader:
    """The video in a file that `start` opens; its name is for messages. Raises InputError."""
    try:
        found = _count_packets(start, name)
    except FramesDiffer:
        return _count_frames(start, name)
    return _reader(start, name, found, functools.partial(_count_frames, start, name))


@dataclasses.dataclass(frozen=True)
class _Counted:
    """The frames that were counted in a file: their times in units of `base`, in order."""

    points: list[Any]
    base: Any
    rates: list[Any]
    size: tuple[int, int]
    matrix: tuple[int, ...]
    is_exact: bool  # the points are those of the decoded frames


def _reader(
    start: Any, name: str, found: _Counted, recount: Callable[[], VideoReader] | None
) -> VideoReader:
    points, total = found.points, len(found.points)
    fps, times = timing(points, found.base, found.rates, name)

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        wanted = iter([int(place) for place in places])
        place = next(wanted, None)
        damage: list[Any] | None = [] if recount is None else None
        with _open_stream(start, name) as (container, stream):
            for number, frame in enumerate(_frames(container, stream, damage)):
                is_other = number >= total or (found.is_exact and frame.pts != points[number])
                if recount is not None and (is_other or frame.is_corrupt):
                    raise FramesDiffer
                if number == place:
                    image = _upright(frame, found.matrix)
                while number == place:
                    yield image
                    place = next(wanted, None)
                if place is None:
                    return
        if recount is not None:
            raise FramesDiffer
        raise InputError(f"damaged video: it ends before frame {place} of {total}")

    return VideoReader(name, total, fps, found.size, np.arange(total), read, times, True, recount)


def _count_packets(start: Any, name: str) -> _Counted:
    """The frames of a file by its packets; only the first is decoded.

    Raises FramesDiffer where packets are not enough.
    """
    with _open_stream(start, name) as (container, stream):
        end, packets = _demuxed(container, stream)
        base, rates = stream.time_base, _rates(stream)
        length, begin = container.duration, container.start_time or 0
    is_exact = all(p.pts is not None for p in packets)
    points = [p.pts if p.pts is not None else p.dts for p in packets if not p.is_discard]
    with _open_stream(start, name) as (container, stream):
        first = next(_frames(container, stream, None), None)
    clock = [p.dts for p in packets if p.dts is not None]
    if first is None or not points or any(p.is_corrupt for p in packets) or clock != sorted(clock):
        raise FramesDiffer
    matrix = _matrix(first)
    shown = _upright(first, matrix)
    if None not in points:
        points.sort()
    if is_exact and first.pts is not None:
        # A stream that begins between key frames shows nothing before the first of them.
        points = [point for point in points if point >= first.pts]
    if length and end is not None and (missing := (length + begin) / 1e6 - end) > _SLACK:
        log.warning("%s: the video is cut: its last %.1f seconds are missing", name, missing)
    return _Counted(points, base, rates, (shown.height, shown.width), matrix, is_exact)


def _demuxed(container: Any, video: Any) -> tuple[float | None, list[Any]]:
    """The end of the last packet of any stream, in seconds, and the packets of the video stream."""
    import av

    end, packets = None, []
    try:
        for packet in container.demux():
            point = packet.pts if packet.pts is not None else packet.dts
            if packet.stream.index == video.index and packet.size:
                packets.append(
                    _Packet(packet.pts, packet.dts, packet.is_discard, packet.is_corrupt)
                )
            if point is not None:
                ends = float((point + (packet.duration or 0)) * packet.time_base)
                end = ends if end is None else max(end, ends)
    except av.FFmpegError:
        raise FramesDiffer from None
    return end, packets


@dataclasses.dataclass(frozen=True, slots=True)
class _Packet:
    pts: int | None
    dts: int | None
    is_discard: bool
    is_corrupt: bool


def _count_frames(start: Any, name: str) -> VideoReader:
    """The video with the frames that can be decoded, found by decoding all of them.

    Raises InputError if there is none.
    """
    points: list[Any] = []
    damage: list[Any] = []
    size, matrix = None, (1, 0, 0, 1)
    with _open_stream(start, name) as (container, stream):
        for frame in _frames(container, stream, damage):
            if size is None:
                matrix = _matrix(frame)
                shown = _upright(frame, matrix)
                size = shown.height, shown.width
            points.append(frame.pts if frame.pts is not None else frame.dts)
            if frame.is_corrupt:
                damage.append(None)
        base, rates = stream.time_base, _rates(stream)
    if size is None:
        raise InputError(f"{name}: no frame of the video can be decoded")
    if damage:
        log.warning(
            "%s: damaged video: the %d frames that can be decoded are used, %d errors in it",
            name, len(points), len(damage),
        )  # fmt: skip
    return _reader(start, name, _Counted(points, base, rates, size, matrix, False), None)


def _rates(stream: Any) -> list[Any]:
    """Frames a second as the file and FFmpeg give them, the most trusted first."""
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    return [rate for rate in rates if rate]


def _frames(container: Any, stream: Any, damage: list[Any] | None) -> Iterator[Any]:
    """The decoded frames in the order of their display.

    damage: a list that gets the errors, which are passed over; without it they raise FramesDiffer.
    """
    import av

    packets, is_over = container.demux(stream), False
    while not is_over:
        frames = []
        try:
            packet = next(packets, None)
            is_over = packet is None
            if damage is not None and packet is not None and packet.is_corrupt:
                damage.append(packet)
            # None empties the decoder.
            frames = stream.decode(packet)
        except av.EOFError:
            is_over = True
        except av.FFmpegError as error:
            if damage is None:
                raise FramesDiffer from None
            damage.append(error)
        yield from frames


@contextlib.contextmanager
def _open_stream(start: Callable[[], Any], name: str) -> Iterator[tuple[Any, Any]]:
    """A PyAV container and its video stream; errors of FFmpeg become an InputError.

    Only the file's own bytes are read: a playlist cannot name other files or addresses.
    """
    import av

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(start())
        try:
            options = {"protocol_whitelist": "none"}
            container = stack.enter_context(av.open(file, container_options=options))
        except (av.FFmpegError, ValueError, OSError) as e:
            raise InputError(f"{name}: not a video, or its header is cut: {reason(e)}") from e
        stream = _video_stream(container, name)
        stack.enter_context(decode_memory(_limited(stream, name)))
        try:
            yield container, stream
        except av.FFmpegError as e:
            raise InputError(f"{name}: damaged video: {reason(e)}") from e


def _limited(stream: Any, name: str) -> int:
    """Bytes held while a stream is decoded; sets the decoder's limits of size and threads.

    Raises InputError for frames that are too large.
    """
    held = decode_bytes(stream.width, stream.height, _BYTES_A_PIXEL, "a video", name)
    # Later frames of a file may be larger than it says.
    most = MAX_IMAGE_BYTES // _BYTES_A_PIXEL
    stream.codec_context.options = {"max_pixels": str(most)}
    stream.thread_type = "AUTO"
    # Each thread holds frames of its own.
    threads = _THREAD_PIXELS // max(held // _BYTES_A_PIXEL, 1)
    if threads < 16:
        stream.codec_context.thread_count = min(threads, os.cpu_count() or 1)
    return held


def _video_stream(container: Any, name: str) -> Any:
    from av.stream import Disposition

    cover = Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise InputError(f"{name}: no video in this file, it holds {', '.join(kinds)}")
    # A stream of a codec that FFmpeg does not have has no decoder.
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise InputError(f"{name}: the codec of this video is unknown; convert it, as to H.264")
    # Of an animated AVIF not the still image that stands for it.
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _matrix(frame: Any) -> tuple[int, ...]:
    """a, b, c, d of the display matrix: x' = a x + c y, y' = b x + d y.

    Reading it keeps the frame in memory until the garbage is collected: read it once a file.
    """
    from av.sidedata.sidedata import Type

    if (data := frame.side_data.get(Type.DISPLAYMATRIX)) is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), "=i4")[:5].tolist()
    return a, b, c, d


def _upright(frame: Any, matrix: tuple[int, ...]) -> Image.Image:
    """RGB of a decoded frame, turned and mirrored by a display matrix, transparency on white."""
    alpha = any(part.is_alpha for part in frame.format.components)
    values = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        values, a, d = values.swapaxes(0, 1), c, b
    values = values[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return to_rgb(Image.fromarray(np.ascontiguousarray(values)))
