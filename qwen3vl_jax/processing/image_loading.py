"""Image files, arrays and PIL images -> upright 8-bit PIL images, within a limit of memory."""

import contextlib
import ctypes
import io
import logging
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from qwen3vl_jax.errors import InputError, unexpected

# Formats that start other programs, hold files of any other format, or show nothing by themselves.
_UNSAFE = ("EPS", "IPTC", "FPX", "MIC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
# Held while one image is decoded, and by all threads together.
MAX_IMAGE_BYTES = 3 * 2**29
LIMIT = f"{MAX_IMAGE_BYTES >> 20} MiB"
# Where Pillow itself refuses.
_MOST_PIXELS = 178_956_970
# Held while decoding; of others 8.
_BYTES_A_PIXEL = {"WEBP": 16, "JPEG2000": 20, "AVIF": 12}
# Of decoders in Python, which take seconds a megapixel.
_SLOW = 768
# Pixels that are converted at a time.
_STRIP = 1 << 20
_BAD_EXIF = (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error)
# Errors name what Pillow finds wrong with a file.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def formats() -> tuple[str, ...]:
    """The names of Pillow's formats, without those that are not safe."""
    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _UNSAFE)


def is_image(data: bytes | BinaryIO) -> bool:
    """Whether a file begins as an image does; the rest of it may be damaged."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with _quiet():
            Image.open(file, formats=formats()).close()
    except Exception as e:
        # Known, and too large or broken: `decoded_image` says so.
        return not isinstance(e, Image.UnidentifiedImageError)
    return True


@contextlib.contextmanager
def decoded_image(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """The image in a file; its memory is counted while the context is open. Raises InputError."""
    with _refusals(name), _quiet():
        if (size := file.seek(0, io.SEEK_END)) > MAX_IMAGE_BYTES:
            raise InputError(f"{name}: {size} bytes, expected an image file of at most {LIMIT}")
        file.seek(0)
        try:
            image = Image.open(file, formats=formats())
        except Image.UnidentifiedImageError as e:
            found = "not an image that Pillow reads" if size else "not an image, it is empty"
            raise InputError(f"{name}: {found}") from e
    with decode_memory(_cost(image, name)):
        with _refusals(name), _quiet():
            _tiff_failed.flag = False
            image.load()
            # Pillow does not notice it.
            if _tiff_failed.flag:
                raise OSError("libtiff found an error")
        yield upright_8bit(image, name)


def upright_8bit(image: Image.Image, name: str) -> Image.Image:
    """A PIL image turned as its EXIF data says, 16 bits scaled to 8. Raises InputError."""
    if 0 in image.size:
        raise InputError(f"{name}: the image is empty ({image.width} x {image.height})")
    _cost(image, name)
    with _refusals(name), _quiet():
        image.load()
        # Unreadable EXIF says nothing of a rotation.
        with contextlib.suppress(*_BAD_EXIF):
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
        return _scaled(image, name) if image.mode[0] in "IF" else image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any 8-bit mode, transparency laid on white. Raises InputError for other modes."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    out = Image.new("RGB", image.size)
    see_through = "A" in image.getbands() or image.info.get("transparency") is not None
    try:
        for box in _strips(*image.size):
            part = image.crop(box)
            if see_through:
                white = Image.new("RGBA", part.size, (255, 255, 255, 255))
                part = Image.alpha_composite(white, part.convert("RGBA"))
            out.paste(part.convert("RGB"), box)
    except ValueError as e:
        raise InputError(f"image: mode {image.mode} cannot be converted to RGB") from e
    return out


def from_array(array: np.ndarray) -> Image.Image:
    """An image of an array [H W], [H W C] or [C H W]: uint8, uint16, bool or floats 0 to 1."""
    channels, shape = (1, 3, 4), f"image array: shape {list(array.shape)}, expected"
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim == 3 and array.shape[2] not in channels and array.shape[0] in channels:
        array = np.moveaxis(array, 0, 2)
    if array.ndim != 3 or array.shape[2] not in channels or not array.size:
        raise InputError(f"{shape} [H W], [H W C] or [C H W] with 1, 3 or 4 channels")
    if array.shape[0] * array.shape[1] * 8 > MAX_IMAGE_BYTES:
        raise InputError(f"{shape} {LIMIT} at most")
    array = array[..., 0] if array.shape[2] == 1 else array
    if array.dtype != np.uint8:
        found = f"image array: dtype {array.dtype}"
        is_16bit, is_float = array.dtype == np.uint16, array.dtype.kind == "f"
        if not (is_16bit or is_float or array.dtype == np.bool_):
            raise InputError(f"{found}, expected uint8, uint16, bool or floats (0 to 1)")
        low, high = float(array.min()), float(array.max())
        if is_float and not (low >= 0 and high <= 1):
            raise InputError(f"{found} from {low:g} to {high:g}, expected 0 to 1 (or uint8)")
        scale, strips = 1 / 257 if is_16bit else 255, _strips(array.shape[1], array.shape[0])
        parts = (array[top:bottom].astype(np.float64) * scale for _, top, _, bottom in strips)
        array = np.concatenate([np.round(part).astype(np.uint8) for part in parts])
    return Image.fromarray(np.ascontiguousarray(array))


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """An image of 16 bits scaled to 8 bits: Pillow itself would cut values off at 255."""
    if image.mode == "F":
        raise InputError(f"{name}: mode F (floats) has no known range; scale it to 8 bits first")
    out = Image.new("L", image.size)
    for box in _strips(*image.size):
        values = np.asarray(image.crop(box))
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise unexpected(name, f"mode {image.mode}, values {low} to {high}", "0 to 65535")
        out.paste(from_array(values.astype(np.uint16)), box)
    return out


def _strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _cost(image: Image.Image, name: str) -> int:
    each = _BYTES_A_PIXEL.get(image.format or "", 8)
    if any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        each = _SLOW
    return decode_cost(*image.size, each, image.format or "an image", name)


def decode_cost(width: int, height: int, each: int, kind: str, name: str) -> int:
    """Bytes held while an image is decoded, `each` a pixel. Raises InputError where they are too many."""
    most = min(MAX_IMAGE_BYTES // each, _MOST_PIXELS)
    if width * height > most:
        found = f"refused as a decompression bomb: {width} x {height} pixels"
        raise InputError(f"{name}: {found}, expected at most {most} of {kind}")
    return width * height * each


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turns Pillow's exceptions of a bad file into an InputError that quotes nothing of the file."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as e:
        raise InputError(f"{name}: refused as a decompression bomb, too many pixels") from e
    except MemoryError as e:
        raise InputError(f"{name}: there is not enough memory for this image") from e
    except Exception as e:  # decoders raise whatever the bytes lead them to
        raise InputError(f"{name}: damaged or truncated image") from e


class _Memory:
    """The bytes that the threads of this process hold while they decode."""

    def __init__(self) -> None:
        self.held, self.free = 0, threading.Condition()

    @contextlib.contextmanager
    def __call__(self, count: int) -> Iterator[None]:
        """Waits until `count` more bytes are allowed, or nothing else is held."""
        with self.free:
            self.free.wait_for(lambda: not self.held or self.held + count <= MAX_IMAGE_BYTES)
            self.held += count
        try:
            yield
        finally:
            with self.free:
                self.held -= count
                self.free.notify_all()


class _Quiet:
    """Silences Pillow's warnings of size and odd metadata while any thread is inside."""

    def __init__(self) -> None:
        self.inside, self.lock, self.scope = 0, threading.Lock(), contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.scope.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=rf"PIL|{re.escape(__name__)}")
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.scope.close()


decode_memory, _quiet = _Memory(), _Quiet()
_tiff_failed = threading.local()


def _set_tiff_handlers() -> Any:
    """Sets libtiff's handlers of errors and warnings in this process; keep the result alive."""

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    def failed(module: Any, text: Any, values: Any) -> None:
        _tiff_failed.flag = True

    # A Pillow whose libtiff cannot be reached is left as it is.
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(Image.core.__file__)
        for setter, handler in ("Error", failed), ("Warning", None):
            set_handler = library[f"TIFFSet{setter}Handler"]
            set_handler.restype = ctypes.c_void_p
            set_handler(handler)
    return failed


_TIFF_HANDLER = _set_tiff_handlers()
