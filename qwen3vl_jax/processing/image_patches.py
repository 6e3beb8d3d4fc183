"""Images to patches: resizing rule, 8-bit resize, normalisation, merge order.

Source: the image processor of Qwen2-VL with Qwen3-VL's settings (its PIL backend, bit for bit).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_loading import to_rgb
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.setting_checks import checks
from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import as_path

__all__ = ["ImageSettings", "load_image", "image_to_patches", "smart_resize"]

log = logging.getLogger("qwen3vl_jax")
MAX_ASPECT = 200
MAX_PATCH_BYTES = 2**30  # of one image or video


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Every setting that changes numbers, with the released values.

    Names are those of preprocessor_config.json; min_pixels and max_pixels are areas, the file's
    size {shortest_edge, longest_edge}.
    """

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

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], base: Self | None = None) -> Self:
        """Reads preprocessor_config.json or processor_config.json {image_processor: ...} as a dict.

        A key that is absent or null keeps the value of `base` (the released ones); a key that
        changes no numbers is ignored. Raises InputError.
        """
        raw = raw.get(cls.SECTION, raw)
        if not isinstance(raw, Mapping):
            raise InputError(f"{cls.KIND} settings: found {type(raw).__name__}, expected an object")
        known = {k: raw[k] for k in (*checks(cls), "size") if raw.get(k) is not None}
        return (base or cls()).override(**known)

    @classmethod
    def from_dir(cls, directory: str | Path, base: Self | None = None) -> Self:
        """Reads processor_config.json or the file of FILE in a directory, or takes `base`.

        Raises InputError.
        """
        for name in ("processor_config.json", cls.FILE):
            path = as_path(directory) / name
            if not path.is_file():
                continue
            raw = read_json_file(path)
            if name == cls.FILE or cls.SECTION in raw:
                return cls.from_dict(raw, base)
        log.warning("%s: no %s; released %s settings are used", directory, cls.FILE, cls.KIND)
        return base or cls()

    def override(self, **changes: Any) -> Self:
        """A copy with some settings changed: the fields, and size {shortest_edge, longest_edge}.

        None keeps a setting; a new limit of pixels moves the other where they would cross. Raises
        InputError for a name or value that is not one.
        """
        changes = {k: v for k, v in changes.items() if v is not None}
        kind = self.KIND
        given = {**_size_pixels(kind, changes.pop("size", {})), **changes}
        known = checks(type(self))
        for name in given:
            if name not in known:
                names = ", ".join((*known, "size"))
                raise InputError(f"{kind} setting {name!r} is unknown, known: {names}")
        checked = {k: known[k](f"{kind} setting {k}", v) for k, v in given.items()}
        if "min_pixels" not in checked and "max_pixels" in checked:
            checked["min_pixels"] = min(self.min_pixels, checked["max_pixels"])
        if "max_pixels" not in checked and "min_pixels" in checked:
            checked["max_pixels"] = max(self.max_pixels, checked["min_pixels"])
        settings = dataclasses.replace(self, **checked)
        if settings.min_pixels > settings.max_pixels:
            raise InputError(
                f"{kind} settings: min_pixels {settings.min_pixels} is above max_pixels "
                f"{settings.max_pixels}"
            )
        if (settings.resized_height is None) != (settings.resized_width is None):
            raise InputError(f"{kind} settings: give both resized_height and resized_width")
        return settings

    @property
    def factor(self) -> int:
        """Pixels of a token's side: sides of a resized picture are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width, in whole tokens, that resized_height and resized_width ask for."""
        if self.resized_height is None or self.resized_width is None:
            return None
        area = self.factor**2
        given = self.resized_height, self.resized_width
        return smart_resize(*given, self.factor, 4 * area, 16384 * area)


def _size_pixels(kind: str, size: Any) -> dict[str, Any]:
    if not isinstance(size, Mapping):
        raise InputError(
            f"{kind} setting size is {type(size).__name__}, expected shortest_edge and longest_edge"
        )
    size = {k: v for k, v in size.items() if v is not None}
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    names |= {name: name for name in names.values()}
    for key in size:
        if key not in names:
            raise InputError(
                f"{kind} setting size has {key!r}, expected shortest_edge and longest_edge (areas)"
            )
    return {names[key]: value for key, value in size.items()}


OVERRIDES = (*checks(ImageSettings), "size")


def smart_resize(
    height: int, width: int, factor: int = 32, min_pixels: int = 65536, max_pixels: int = 16777216
) -> tuple[int, int]:
    """Height and width that a picture is resized to: multiples of `factor`, area within the limits.

    Sides are rounded half to even, then scaled by one ratio, down (floor) or up (ceil). Raises
    InputError for a ratio of sides above 200. Source: smart_resize of the reference implementation.
    """
    if min(height, width) < 1:
        raise InputError(f"image: {width} x {height} pixels, expected at least 1 x 1")
    check_aspect(height, width, "image")
    high, wide = (round(side / factor) * factor for side in (height, width))
    # A side may have been rounded to 0: the lower limit brings it back.
    return fit_area((height, width), (high, wide), factor, min_pixels, max_pixels)


def check_aspect(height: int, width: int, kind: str) -> None:
    """Raises InputError for a ratio of sides above 200."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"{kind}: {width} x {height} pixels, one side is more than {MAX_ASPECT} times the other; "
            "crop it or paste it on a larger background"
        )


def fit_area(
    sides: tuple[int, int],
    rounded: tuple[int, int],
    factor: int,
    least: float,
    most: float,
    frames: int = 1,
    padded: int = 1,
) -> tuple[int, int]:
    """The rounded sides, or where their area is not within the limits the sides scaled by one ratio.

    The area is that of `frames`, padded to `padded` of them.
    """
    area = padded * rounded[0] * rounded[1]
    if area > most:
        ratio = math.sqrt(frames * sides[0] * sides[1] / most)
        high, wide = (max(factor, math.floor(x / ratio / factor) * factor) for x in sides)
    elif area < least:
        ratio = math.sqrt(least / (frames * sides[0] * sides[1]))
        high, wide = (math.ceil(x * ratio / factor) * factor for x in sides)
    else:
        high, wide = rounded
    return high, wide


def image_to_patches(
    image: Any, settings: ImageSettings | None = None, **overrides: Any
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patch rows of one picture and its grid.

    image: anything `load_image` reads; overrides: settings for this call, as in
    `ImageSettings.override`. Returns rows [h*w, C*Tp*P*P] float32 in merge order (the patches of a
    token follow each other; features are channel, frame, row, column) and (1, h, w) in patches.
    Raises InputError.
    """
    settings = (settings or ImageSettings()).override(**overrides)
    picture = load_image(image)
    if settings.do_convert_rgb:
        picture = to_rgb(picture)
    size = None
    if settings.do_resize:
        limits = settings.factor, settings.min_pixels, settings.max_pixels
        size = settings.fixed_size or smart_resize(picture.height, picture.width, *limits)
    frames, channels = settings.temporal_patch_size, len(picture.getbands())
    check_patches(size or (picture.height, picture.width), 1, frames * channels)
    pixels = resized(picture, size, settings)
    table = value_table(settings, pixels.shape[2])
    return patch_rows([pixels], table, settings)


def check_patches(
    size: tuple[int, int], frames: int, channels: int = 3, most: int = MAX_PATCH_BYTES
) -> None:
    """Raises InputError for patches of frames of a size (height, width) that are too many bytes."""
    height, width = size
    whole = f"{frames} frames of " if frames > 1 else "an image of "
    if (held := height * width * frames * channels * 4) > most:
        raise InputError(
            f"{whole}{width} x {height} pixels: {held >> 20} MiB of patches, expected at "
            f"most {most >> 20}; lower max_pixels, min_pixels or the size"
        )


def resized(
    picture: Image.Image, size: tuple[int, int] | None, settings: ImageSettings
) -> np.ndarray:
    """Values [H W C] uint8 of a picture brought to size (height, width), or as it is for None."""
    if size is not None:
        picture = picture.resize((size[1], size[0]), resample=Image.Resampling(settings.resample))
    pixels = np.asarray(picture)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def value_table(settings: ImageSettings, channels: int) -> np.ndarray:
    """What an 8-bit value of a channel becomes, rounded as the reference does: [C 256] float32."""
    values = np.broadcast_to(np.arange(256, dtype=np.float64), (channels, 256))
    with np.errstate(all="ignore"):
        values = _normalized(values, settings, channels)
    if not np.isfinite(values).all():
        raise InputError(
            "rescale_factor, image_mean, image_std: values that are not finite, expected about -1 to 1"
        )
    return values


def _normalized(values: np.ndarray, settings: ImageSettings, channels: int) -> np.ndarray:
    if settings.do_rescale:
        values = values * settings.rescale_factor
    values = values.astype(np.float32)
    if settings.do_normalize:
        mean, std = (
            np.asarray(given, dtype=np.float32).reshape(-1, 1)
            for given in (settings.image_mean, settings.image_std)
        )
        for name, given in (("image_mean", mean), ("image_std", std)):
            if len(given) not in (1, channels):
                raise InputError(
                    f"image setting {name} has {len(given)} numbers for {channels} channels"
                )
        values = (values - mean) / std
    return values


def patch_rows(
    group: Sequence[np.ndarray], table: np.ndarray, settings: ImageSettings
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Rows [h*w, C*Tp*P*P] in merge order of the frames [H W C] that share patches; grid (1, h, w).

    At most temporal_patch_size frames; the last fills what is missing, so a picture fills all.
    table [C 256] is of `value_table`. Raises InputError for sides that are not whole tokens.
    """
    height, width, channels = group[0].shape
    patch, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    if height % settings.factor or width % settings.factor:
        raise InputError(
            f"{settings.KIND}: {width} x {height} pixels with do_resize off, expected multiples of "
            f"patch_size x merge_size = {settings.factor}"
        )
    h, w = height // patch, width // patch
    rows = np.empty((h * w, channels, frames, patch * patch), np.float32)
    for f, pixels in enumerate(group):
        cells = pixels.reshape(h // merge, merge, patch, w // merge, merge, patch, channels)
        cells = cells.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, channels, patch * patch)
        for c in range(channels):
            rows[:, c, f:] = table[c][cells[:, c]][:, None]
    return rows.reshape(h * w, -1), (1, h, w)
