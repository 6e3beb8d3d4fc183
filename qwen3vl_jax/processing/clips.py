"""A clip from anywhere (file, bytes, URL, list of frames, array), read frame by frame."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.media import load_image, open_source
from qwen3vl_jax.processing.media_rules import one_line, short
from qwen3vl_jax.processing.pictures import to_rgb

_CHANNELS = (1, 3, 4)
_TURNS = {0: 0, 90: 1, 180: 2, 270: 3}  # degrees counterclockwise to np.rot90's k
_ADVICE = 'give the rate of its frames: video_metadata={"fps": ...} or sample_fps'


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is known of a clip before its frames are decoded.

    size is (height, width); `indices` [total] is each frame's number in its source, which differs
    from 0, 1, ... where frames were chosen before; `times` [total] seconds from the first frame,
    where they do not follow from `fps`. `read` yields the RGB frames at places that do not fall.
    """

    name: str
    total: int
    fps: float
    size: tuple[int, int]
    indices: np.ndarray
    read: Callable[[np.ndarray], Iterator[Image.Image]]
    times: np.ndarray | None = None
    can_sample: bool = True

    def seconds(self, places: np.ndarray) -> list[float]:
        """When the frames at some places are shown."""
        if self.times is not None:
            return [float(t) for t in self.times[places]]
        return [int(i) / self.fps for i in self.indices[places]]

    def even_in_time(self, places: np.ndarray) -> np.ndarray:
        """Places spread evenly over frames, moved to be even in time where the rate varies."""
        if self.times is None:
            return places
        wanted = np.linspace(self.times[places[0]], self.times[places[-1]], len(places))
        after = np.clip(np.searchsorted(self.times, wanted), 1, self.total - 1)
        before_is_nearer = wanted - self.times[after - 1] <= self.times[after] - wanted
        return np.clip(after - before_is_nearer, places[0], places[-1])


def open_clip(
    source: Any,
    metadata: Any = None,
    sample_fps: Any = None,
    **limits: Any,
) -> Clip:
    """A clip of any form that `open_source` takes, a list of frames, or an array.

    Files hold their own times. Arrays are [T H W C] or [T C H W], whole numbers 0 to 255; lists
    hold what `load_image` reads, one frame each, and are used whole. Both need the rate of their
    frames: metadata {fps, frames_indices (the frames' numbers in their source), total_num_frames},
    or sample_fps. limits: max_bytes and timeout (seconds) of a URL, rules. Raises InputError.
    """
    if isinstance(source, (list, tuple)):
        return _from_list(source, _Given.of(metadata, sample_fps), limits)
    if hasattr(source, "__array__"):
        return _from_array(source, _Given.of(metadata, sample_fps))
    if metadata is not None or sample_fps is not None:
        raise InputError(
            "video_metadata and sample_fps describe arrays and lists of frames; a file has its own"
        )
    found = open_source(source, "video", **limits)
    return _from_file(found.open, found.name)


@dataclasses.dataclass(frozen=True)
class _Given:
    """What a caller said of an array or a list of frames."""

    fps: float
    indices: list[int] | None
    total: int | None

    @classmethod
    def of(cls, metadata: Any, sample_fps: Any) -> _Given:
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, Mapping):
            raise InputError(f"video_metadata: found {type(metadata).__name__}, expected an object")
        if sample_fps is not None and metadata.get("fps") is not None:
            raise InputError("video: sample_fps and video_metadata's fps are both given")
        fps = metadata.get("fps") if sample_fps is None else sample_fps
        if fps is None:
            raise InputError(f"video: frames without times; {_ADVICE}")
        number = isinstance(fps, (int, float, np.number)) and not isinstance(fps, bool)
        if not number or not fps > 0 or not math.isfinite(fps):
            raise InputError(f"video: fps is {fps!r}, expected frames a second above 0")
        indices = metadata.get("frames_indices")
        if indices is not None:
            indices = _whole_numbers("video_metadata: frames_indices", indices)
        return cls(float(fps), indices, metadata.get("total_num_frames"))

    def clip(self, total: int, size: tuple[int, int], read: Any, can_sample: bool) -> Clip:
        if total == 0:
            raise InputError("video: it has no frame")
        indices = list(range(total)) if self.indices is None else self.indices
        if len(indices) != total:
            raise InputError(
                f"video_metadata: {len(indices)} frames_indices for {total} frames, expected one each"
            )
        if any(b < a for a, b in itertools.pairwise(indices)) or indices[0] < 0:
            raise InputError("video_metadata: frames_indices fall or are negative")
        whole = self.indices is None or indices == list(range(total))
        if can_sample and whole and self.total not in (None, total):
            raise InputError(
                f"video_metadata: total_num_frames is {self.total} for an array of {total} frames; if "
                "they were chosen before, pass frames_indices and do_sample_frames=False"
            )
        array = np.asarray(indices, np.int64)
        return Clip("", total, self.fps, size, array, read, can_sample=can_sample and whole)


def _from_list(frames: Sequence[Any], given: _Given, limits: Mapping[str, Any]) -> Clip:
    if not frames:
        raise InputError("video: the list has no frame")
    size = _size(to_rgb(load_image(frames[0], **limits)))

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        for place in places:
            frame = to_rgb(load_image(frames[place], **limits))
            if _size(frame) != size:
                raise InputError(
                    f"video: frame {place} has {frame.width} x {frame.height} pixels and the first "
                    f"{size[1]} x {size[0]}; all must have one size"
                )
            yield frame

    return given.clip(len(frames), size, read, can_sample=False)


def _from_array(source: Any, given: _Given) -> Clip:
    array = np.asarray(source)
    if array.ndim == 4 and array.shape[1] in _CHANNELS:
        array = np.moveaxis(array, 1, 3)
    if array.ndim != 4 or array.shape[3] not in _CHANNELS or not array.size:
        raise InputError(
            f"video array: shape {list(np.shape(source))}, expected [T H W C] or [T C H W] with 1, 3 "
            "or 4 channels"
        )
    if array.dtype != np.uint8 and not _whole_bytes(array):
        raise InputError(
            f"video array: {array.dtype} from {array.min():g} to {array.max():g}, expected whole "
            "numbers from 0 to 255 that are not all 0 or 1 (scale and round it to uint8)"
        )

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        for place in places:
            frame = np.ascontiguousarray(array[place].astype(np.uint8))
            yield to_rgb(Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame))

    return given.clip(len(array), array.shape[1:3], read, can_sample=True)


def _whole_numbers(name: str, given: Any) -> list[int]:
    """A list of whole numbers, from any array type; raises InputError."""
    try:
        found = np.asarray(given).reshape(-1)
        whole = found.astype(np.int64)
        exact = found.dtype != np.bool_ and bool((whole == found).all())
    except (ValueError, TypeError, OverflowError):
        exact = False
    if not exact:
        raise InputError(f"{name}: found {short(repr(given), 60)}, expected whole numbers")
    return whole.tolist()


def _size(picture: Image.Image) -> tuple[int, int]:
    return picture.height, picture.width


def _whole_bytes(array: np.ndarray) -> bool:
    """Whether an array of another dtype holds 8-bit values; one of 0 and 1 alone may be scaled."""
    if array.dtype == np.bool_ or not np.issubdtype(array.dtype, np.number):
        return False
    low, high = array.min(), array.max()
    return bool(low >= 0 and 1 < high <= 255 and (array == np.floor(array)).all())


def _from_file(start: Callable[[], Any], name: str) -> Clip:
    with _opened(start, name) as container:
        stream = _video_stream(container, name)
        points = [p.pts if p.pts is not None else p.dts for p in container.demux(stream) if p.size]
        rate, base = stream.average_rate, stream.time_base
    if not points:
        raise InputError(f"{name}: the video has no frame")
    with _opened(start, name) as container:
        first = next(_frames(container, name), None)
    if first is None:
        raise InputError(f"{name}: no frame of the video can be decoded")
    fps, times = _times(points, rate, base, name)

    def read(places: np.ndarray) -> Iterator[Image.Image]:
        wanted = iter([int(place) for place in places])
        place = next(wanted, None)
        with _opened(start, name) as container:
            for number, frame in enumerate(_frames(container, name)):
                if number == place:
                    picture = _upright(frame)
                while number == place:
                    yield picture
                    place = next(wanted, None)
                if place is None:
                    return
        raise InputError(
            f"the file is cut or damaged: it ends before frame {place} of {len(points)}"
        )

    size = _size(_upright(first))
    return Clip(name, len(points), fps, size, np.arange(len(points)), read, times)


def _times(
    points: Sequence[Any], rate: Any, base: Any, name: str
) -> tuple[float, np.ndarray | None]:
    """Frames a second, and the seconds of each frame if the rate varies by more than half a frame."""
    known = [point for point in points if point is not None]
    if len(points) == 1:
        return float(rate or 1), None
    if base is None or len(known) != len(points):
        if not rate:
            raise InputError(f"{name}: the file says neither the times nor the rate of its frames")
        return float(rate), None
    times = np.sort(np.asarray(known, np.float64)) * float(base)
    times -= times[0]
    fps = float(rate) if rate else (len(times) - 1) / max(float(times[-1]), 1e-9)
    if np.abs(times - np.arange(len(times)) / fps).max() <= 0.5 / fps:
        return fps, None
    return (len(times) - 1) / max(float(times[-1]), 1e-9), times


class _opened:
    """A PyAV container over an open file; what FFmpeg raises becomes an InputError.

    Only the file's own bytes are read: a playlist cannot name other files or addresses.
    """

    def __init__(self, start: Callable[[], Any], name: str):
        self.start, self.name = start, name

    def __enter__(self) -> Any:
        import av

        self.file = self.start()
        try:
            options = {"protocol_whitelist": "none"}
            self.container = av.open(self.file, container_options=options)
        except (av.FFmpegError, ValueError, OSError) as e:
            self.file.close()
            raise InputError(f"{self.name}: not a video, or its header is cut: {_reason(e)}") from e
        return self.container

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import av

        self.container.close()
        self.file.close()
        if isinstance(error, av.FFmpegError):
            raise InputError(f"{self.name}: damaged video: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def _video_stream(container: Any, name: str) -> Any:
    from av.stream import Disposition

    cover = Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise InputError(f"{name}: no video in this file, it holds {', '.join(kinds)}")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _frames(container: Any, name: str) -> Iterator[Any]:
    return container.decode(_video_stream(container, name))


def _upright(frame: Any) -> Image.Image:
    """RGB of a decoded frame, turned as its metadata says, transparency laid on white."""
    alpha = any(part.is_alpha for part in frame.format.components)
    values = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    turns = _TURNS.get(round(frame.rotation) % 360, 0)
    return to_rgb(Image.fromarray(np.ascontiguousarray(np.rot90(values, turns))))
