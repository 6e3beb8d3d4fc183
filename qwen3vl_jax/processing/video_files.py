"""Video files: the frames that a player shows, their times, upright and in RGB."""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError, one_line
from qwen3vl_jax.processing.image_loading import MAX_IMAGE_BYTES, decode_cost, decode_memory, to_rgb
from qwen3vl_jax.processing.video_reader import FramesDiffer, VideoReader, picked, timing

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
        return _count_packets(start, name)
    except FramesDiffer:
        return _count_frames(start, name)


def _reader(start, name, points, clock, first, recount=None, is_exact=False) -> VideoReader:
    """The video shown at `points` of a clock, exact or not; without `recount` errors are skipped."""
    from av.sidedata.sidedata import Type

    total, matrix = len(points), (1, 0, 0, 1)
    # Reading it keeps the frame in memory until the garbage is collected: it is read once a file.
    if (data := first.side_data.get(Type.DISPLAYMATRIX)) is not None:
        a, b, _, c, d = np.frombuffer(bytes(data), "=i4")[:5].tolist()
        matrix = a, b, c, d
    shown = _upright(first, matrix)
    fps, times = timing(points, clock[0], clock[1], name)

    def checked(frames: Iterator[Any]) -> Iterator[Any]:
        for number, frame in enumerate(frames):
            is_other = number >= total or (is_exact and frame.pts != points[number])
            if recount is not None and (is_other or frame.is_corrupt):
                raise FramesDiffer
            yield frame

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        with _open_stream(start, name) as (container, stream):
            frames = checked(_frames(container, stream, [] if recount is None else None))
            try:
                yield from picked(frames, places, lambda frame: _upright(frame, matrix))
            except FramesDiffer as e:
                if recount is not None:
                    raise
                raise InputError(f"damaged video: it ends before frame {e} of {total}") from None

    size = shown.height, shown.width
    return VideoReader(name, total, fps, size, np.arange(total), read, times, True, recount)


def _count_packets(start: Callable[[], Any], name: str) -> VideoReader:
    """The video by its packets; only the first frame is decoded. Raises FramesDiffer if that fails."""
    import av

    end, packets = -math.inf, []
    with _open_stream(start, name) as (container, stream):
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
    with _open_stream(start, name) as (container, stream):
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
        log.warning("%s: the video is cut: its last %.1f seconds are missing", name, missing)
    recount = functools.partial(_count_frames, start, name)
    return _reader(start, name, points, clock, first, recount, is_exact)


def _count_frames(start: Callable[[], Any], name: str) -> VideoReader:
    """The video with the frames that can be decoded, found by decoding all. Raises InputError for none."""
    points: list[Any] = []
    damage: list[Any] = []
    first = None
    with _open_stream(start, name) as (container, stream):
        for frame in _frames(container, stream, damage):
            first = first or frame
            points.append(frame.pts if frame.pts is not None else frame.dts)
            if frame.is_corrupt:
                damage.append(None)
        if first is None:
            raise InputError(f"{name}: no frame of the video can be decoded")
        if damage:
            used = "%s: damaged video: the %d frames that can be decoded are used, %d errors in it"
            log.warning(used, name, len(points), len(damage))
        return _reader(start, name, points, _clock(stream), first)


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
def _open_stream(start: Callable[[], Any], name: str) -> Iterator[tuple[Any, Any]]:
    """A PyAV container, which opens no other file or address, and its video stream. Raises InputError."""
    import av

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(start())
        try:
            options = {"protocol_whitelist": "none"}
            container = stack.enter_context(av.open(file, container_options=options))
        except (av.FFmpegError, ValueError, OSError) as e:
            raise InputError(f"{name}: not a video, or its header is cut: {_reason(e)}") from e
        stream = _video_stream(container, name)
        held = decode_cost(stream.width, stream.height, _BYTES_A_PIXEL, "a video", name)
        stack.enter_context(decode_memory(held))
        # Later frames of a file may be larger than it says.
        most = MAX_IMAGE_BYTES // _BYTES_A_PIXEL
        stream.codec_context.options = {"max_pixels": str(most)}
        stream.thread_type = "AUTO"
        # Each thread holds frames of its own.
        threads = _THREAD_PIXELS // max(held // _BYTES_A_PIXEL, 1)
        if threads < 16:
            stream.codec_context.thread_count = min(threads, os.cpu_count() or 1)
        try:
            yield container, stream
        except av.FFmpegError as e:
            raise InputError(f"{name}: damaged video: {_reason(e)}") from e


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


def _upright(frame: Any, matrix: tuple[int, ...]) -> Image.Image:
    """RGB of a frame turned by a display matrix x' = a x + c y, y' = b x + d y, transparency on white."""
    alpha = any(part.is_alpha for part in frame.format.components)
    values = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        values, a, d = values.swapaxes(0, 1), c, b
    values = values[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return to_rgb(Image.fromarray(np.ascontiguousarray(values)))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
