"""The settings of images and videos, with the released values; each value is checked by name or type.

Names are those of transformers' processors and of preprocessor_config.json, whose smart_resize gives
the sizes that follow: multiples of a token's side.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError, shown, unexpected
from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import as_path

log = logging.getLogger("qwen3vl_jax")
MAX_ASPECT = 200
Size = tuple[int, int]  # height, width
# Of settings that count; patches have a limit of bytes besides.
_MOST = 2**40
# Frames a second: others are typing errors.
_SLOWEST, _FASTEST = 1e-6, 1e6
# No call or item changes them.
MODEL_SIZES = ("patch_size", "temporal_patch_size", "merge_size")
# The limits of pixels by their names, and as size {shortest_edge, longest_edge} has them.
_AREAS = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
_AREAS |= {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
# Settings of transformers' base class that its Qwen3-VL processor never reads.
WITHOUT_EFFECT = ("size_divisor", "default_to_square", "do_center_crop", "crop_size")


def check_number(name: str, value: Any) -> float:
    """The value of a setting that is a finite number. Raises InputError."""
    kinds = (int, float, np.integer, np.floating)
    with contextlib.suppress(OverflowError):  # an integer beyond all floats
        if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise unexpected(name, shown(value), "a number")


def check_count(name: str, value: Any) -> int:
    """The value of a setting that counts from 1. Raises InputError."""
    found = check_number(name, value)
    if found != int(found) or not 1 <= found <= _MOST:
        raise unexpected(name, shown(value), f"a whole number from 1 to {_MOST}")
    return int(value)


def frame_rate(name: str, value: Any) -> float:
    """Frames a second, from a number or its text. Raises InputError."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    found = check_number(name, value)
    if not _SLOWEST <= found <= _FASTEST:
        raise unexpected(name, f"{found:g}", f"frames a second from {_SLOWEST} to {_FASTEST:g}")
    return found


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise unexpected(name, shown(value), "true or false")
    return bool(value)


def _check_channels(name: str, value: Any) -> tuple[float, ...] | float:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    several = isinstance(value, (list, tuple))
    found = tuple(check_number(name, v) for v in (value if several else (value,)))
    if name.endswith("image_std") and 0 in found:
        raise unexpected(name, shown(value), "no zero")
    return found if several else found[0]


def _check_filter(name: str, value: Any) -> int:
    kinds = (int, float, str, np.integer, np.floating)
    if isinstance(value, kinds) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            found = Image.Resampling.__members__.get(str(value).upper(), value)
            return int(Image.Resampling(found))
    names = ", ".join(f"{n:d} {n.name.lower()}" for n in sorted(Image.Resampling))
    raise unexpected(name, shown(value), f"one of {names}")


_BY_NAME = {"resample": _check_filter, "fps": frame_rate}
_BY_TYPE: dict[Any, Any] = {bool: _check_bool, int: check_count, int | None: check_count}
_BY_TYPE |= {float: check_number, tuple[float, ...] | float: _check_channels}


def checks(settings: type) -> dict[str, Callable[[str, Any], Any]]:
    """The check of each setting of a dataclass, by its name or its annotation; `eight_bit` is none."""
    fields = (f for f in dataclasses.fields(settings) if f.name != "eight_bit")
    return {f.name: _BY_NAME.get(f.name) or _BY_TYPE[f.type] for f in fields}


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Every setting of images that changes numbers; min_pixels and max_pixels are areas."""

    KIND: ClassVar[str] = "image"
    SECTION: ClassVar[str] = "image_processor"  # of processor_config.json
    FILE: ClassVar[str] = "preprocessor_config.json"

    do_resize: bool = True
    min_pixels: int = 65536
    max_pixels: int = 16777216
    resample: int = int(Image.Resampling.BICUBIC)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] | float = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] | float = (0.5, 0.5, 0.5)
    do_convert_rgb: bool = True
    # With resized_width in place of the limits, as in qwen-vl-utils.
    resized_height: int | None = None
    resized_width: int | None = None
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    # Training's own, which no file or call sets: patches are uint8 where nothing changes the values.
    eight_bit: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], base: Self | None = None) -> Self:
        """The settings in a file's data; an absent key keeps that of `base`. Raises InputError."""
        raw = raw.get(cls.SECTION, raw)
        if not isinstance(raw, Mapping):
            raise unexpected(f"{cls.KIND} settings", type(raw).__name__, "an object")
        known = {k: raw[k] for k in (*checks(cls), "size") if raw.get(k) is not None}
        return (base or cls()).override(**known)

    @classmethod
    def from_dir(cls, directory: str | Path, base: Self | None = None) -> Self:
        """The settings in a directory's processor_config.json or FILE, else `base`. Raises InputError."""
        for name in ("processor_config.json", cls.FILE):
            path = as_path(directory) / name
            raw = read_json_file(path) if path.is_file() else None
            if raw is not None and (name == cls.FILE or cls.SECTION in raw):
                return cls.from_dict(raw, base)
        log.warning("%s: no %s; released %s settings are used", directory, cls.FILE, cls.KIND)
        return base or cls()

    def override(self, **changes: Any) -> Self:
        """A copy with some settings changed: the fields, and size {shortest_edge, longest_edge}.

        None keeps one; a new limit of pixels moves the other where they would cross. Raises InputError.
        """
        kind, known = self.KIND, checks(type(self))
        given = {k: v for k, v in changes.items() if v is not None}
        size, size_name = given.pop("size", {}), f"{kind} setting size"
        expected = "shortest_edge and longest_edge (areas)"
        if not isinstance(size, Mapping):
            raise unexpected(size_name, shown(size), expected)
        areas = {k: v for k, v in size.items() if v is not None}
        if wrong := [k for k in areas if k not in _AREAS]:
            raise unexpected(size_name, shown(wrong[0]), expected)
        given = {_AREAS[k]: v for k, v in areas.items()} | given
        if unknown := [name for name in given if name not in known]:
            names = ", ".join((*known, "size"))
            raise InputError(f"{kind} setting {unknown[0]!r} is unknown, known: {names}")
        checked = {k: known[k](f"{kind} setting {k}", v) for k, v in given.items()}
        moved: dict[str, Any] = {}
        if "max_pixels" in checked:
            moved["min_pixels"] = min(self.min_pixels, checked["max_pixels"])
        if "min_pixels" in checked:
            moved["max_pixels"] = max(self.max_pixels, checked["min_pixels"])
        settings = dataclasses.replace(self, **{**moved, **checked})
        low, high = settings.min_pixels, settings.max_pixels
        if low > high:
            raise InputError(f"{kind} settings: min_pixels {low} is above max_pixels {high}")
        if (settings.resized_height is None) != (settings.resized_width is None):
            raise InputError(f"{kind} settings: give both resized_height and resized_width")
        return settings

    @property
    def factor(self) -> int:
        """Pixels of a token's side: sides of a resized image are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def fixed_size(self) -> Size | None:
        """Height and width, in multiples of `factor`, that resized_height and resized_width ask for."""
        if self.resized_height is None or self.resized_width is None:
            return None
        limits = self.factor, 4 * self.factor**2, 16384 * self.factor**2
        return smart_resize(self.resized_height, self.resized_width, *limits)


@dataclasses.dataclass(frozen=True)
class VideoSettings(ImageSettings):
    """Every setting of videos that changes numbers; min_pixels and max_pixels bound all frames together.

    Frames are sampled at `fps` a second, from min_frames to max_frames, or num_frames if that is set.
    cap_pixels_per_frame also bounds each frame, to max_video_tokens tokens.
    """

    KIND: ClassVar[str] = "video"
    SECTION: ClassVar[str] = "video_processor"
    FILE: ClassVar[str] = "video_preprocessor_config.json"

    min_pixels: int = 4096
    max_pixels: int = 25165824
    do_sample_frames: bool = True
    fps: float | None = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    def override(self, **changes: Any) -> "VideoSettings":
        """A copy with some settings changed, as `ImageSettings.override`.

        fps and num_frames take each other's place. Raises InputError for both, and for what has no effect.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if useless := [name for name in WITHOUT_EFFECT if name in changes]:
            raise InputError(f"video setting {useless[0]}: it has no effect; leave it out")
        rates = changes.keys() & {"fps", "num_frames"}
        if len(rates) > 1:
            raise InputError("video settings: fps and num_frames are both given, expected one")
        settings = super().override(**changes)
        other = {"num_frames": "fps", "fps": "num_frames"}
        return dataclasses.replace(settings, **{other[name]: None for name in rates})


def smart_resize(
    height: int,
    width: int,
    factor: int = 32,
    min_pixels: float = 65536,
    max_pixels: float = 16777216,
    smallest: int = 0,
    kind: str = "image",
    frames: tuple[int, int] = (1, 1),
) -> Size:
    """Height and width that an image is resized to: multiples of `factor`, area within the limits.

    Sides are rounded half to even, to at least `smallest`, then scaled by one ratio, down (floor) or
    up (ceil). frames: of a video, as given and as padded; the limits are of all together. Raises
    InputError for a ratio of sides above 200.
    """
    if min(height, width) < 1:
        raise InputError(f"{kind}: {width} x {height} pixels, expected at least 1 x 1")
    if max(height, width) > MAX_ASPECT * min(height, width):
        found = f"{width} x {height} pixels, one side is more than {MAX_ASPECT} times the other"
        raise InputError(f"{kind}: {found}; crop it or paste it on a larger background")
    sides, (given, padded) = (height, width), frames
    # A side may be rounded to 0: the lower limit brings it back.
    high, wide = (max(smallest, round(side / factor) * factor) for side in sides)
    if padded * high * wide > max_pixels:
        ratio = math.sqrt(given * height * width / max_pixels)
        high, wide = (max(factor, math.floor(x / ratio / factor) * factor) for x in sides)
    elif padded * high * wide < min_pixels:
        ratio = math.sqrt(min_pixels / (given * height * width))
        high, wide = (math.ceil(x * ratio / factor) * factor for x in sides)
    return high, wide


def smart_resize_video(
    frames: int,
    height: int,
    width: int,
    factor: int = 32,
    temporal_factor: int = 2,
    min_pixels: int = 4096,
    max_pixels: int = 25165824,
) -> Size:
    """Height and width of a video's frames, as `smart_resize` for their joint area. Raises InputError."""
    if frames < temporal_factor:
        found = f"video: {frames} frame(s), expected at least {temporal_factor}"
        raise InputError(f"{found}; pass a single frame as an image")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    counts = frames, round(frames / temporal_factor) * temporal_factor
    return smart_resize(height, width, factor, min_pixels, max_pixels, 0, "video", counts)
