"""Images to patches: 8-bit resize, normalisation, merge order.

Source: the image processor of Qwen2-VL with Qwen3-VL's settings (its PIL backend, bit for bit).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError, unexpected
from qwen3vl_jax.processing.image_loading import to_rgb
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.settings import ImageSettings, Size, checks, smart_resize

Patches = tuple[np.ndarray, tuple[int, int, int]]  # and their grid
MAX_PATCH_BYTES = 2**30  # of one image or video
OVERRIDES = (*checks(ImageSettings), "size")


def image_to_patches(
    image: Any, settings: ImageSettings | None = None, **overrides: Any
) -> Patches:
    """Patches of one image and its grid.

    image: anything `load_image` reads; overrides: settings, as in `ImageSettings.override`. Returns patches
    [h*w, C*Tp*P*P] float32 in merge order (the patches of a token follow each other; features are channel,
    frame, row, column) and (1, h, w) in patches. Raises InputError.
    """
    settings = (settings or ImageSettings()).override(**overrides)
    image = load_image(image)
    image = to_rgb(image) if settings.do_convert_rgb else image
    size = None
    if settings.do_resize:
        limits = settings.factor, settings.min_pixels, settings.max_pixels
        size = settings.fixed_size or smart_resize(image.height, image.width, *limits)
    frames, channels = settings.temporal_patch_size, len(image.getbands())
    check_patches(size or (image.height, image.width), 1, frames * channels)
    pixels = resized(image, size, settings)
    return frames_to_patches([pixels], value_table(settings, channels), settings)


def check_patches(size: Size, frames: int, channels: int = 3, most: int = MAX_PATCH_BYTES) -> None:
    """Raises InputError for patches of frames of a size (height, width) that are too many bytes."""
    height, width = size
    if (held := height * width * frames * channels * 4) > most:
        what = f"{frames} frames" if frames > 1 else "an image"
        found = f"{what} of {width} x {height} pixels: {held >> 20} MiB of patches"
        advice = "lower max_pixels, min_pixels or the size"
        raise InputError(f"{found}, expected at most {most >> 20}; {advice}")


def resized(image: Image.Image, size: Size | None, settings: ImageSettings) -> np.ndarray:
    """Values [H W C] uint8 of an image brought to size (height, width), or as it is for None."""
    if size is not None:
        image = image.resize((size[1], size[0]), resample=Image.Resampling(settings.resample))
    pixels = np.asarray(image, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def value_table(settings: ImageSettings, channels: int) -> np.ndarray:
    """The normalised value of each 8-bit value, as the reference rounds it: [C 256]. Raises InputError.

    float32, or uint8 with settings.eight_bit, where the settings leave values as they are.
    """
    if settings.eight_bit and not settings.do_rescale and not settings.do_normalize:
        return np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 256))
    values = np.broadcast_to(np.arange(256, dtype=np.float64), (channels, 256))
    with np.errstate(all="ignore"):
        if settings.do_rescale:
            values = values * settings.rescale_factor
        values = values.astype(np.float32)
        if settings.do_normalize:
            columns = []
            for name in ("image_mean", "image_std"):
                columns.append(np.array(getattr(settings, name), np.float32).reshape(-1, 1))
                if len(columns[-1]) not in (1, channels):
                    numbers = f"{len(columns[-1])} numbers for {channels} channels"
                    raise InputError(f"image setting {name} has {numbers}")
            values = (values - columns[0]) / columns[1]
    if not np.isfinite(values).all():
        found = (
            "rescale_factor, image_mean, image_std: with these, pixel values are infinite or NaN"
        )
        raise InputError(f"{found}; expected settings that give about -1 to 1")
    return values


def frames_to_patches(
    group: Sequence[np.ndarray], table: np.ndarray, settings: ImageSettings
) -> Patches:
    """Patches [h*w, C*Tp*P*P] in merge order of frames [H W C] that share patches; grid (1, h, w).

    table [C 256]: of `value_table`; patches have its dtype. The last frame fills up temporal_patch_size.
    Raises InputError.
    """
    height, width, channels = group[0].shape
    patch, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    if height % settings.factor or width % settings.factor:
        found = f"{width} x {height} pixels with do_resize off"
        expected = f"multiples of patch_size x merge_size = {settings.factor}"
        raise unexpected(settings.KIND, found, expected)
    h, w = height // patch, width // patch
    patches = np.empty((h * w, channels, frames, patch * patch), table.dtype)
    for f, pixels in enumerate(group):
        cells = pixels.reshape(h // merge, merge, patch, w // merge, merge, patch, channels)
        cells = cells.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, channels, patch * patch)
        if table.dtype == np.uint8:
            patches[:, :, f:] = cells[:, :, None]
            continue
        for c in range(channels):
            patches[:, c, f:] = table[c][cells[:, c]][:, None]
    return patches.reshape(h * w, -1), (1, h, w)
