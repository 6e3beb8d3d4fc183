"""A picture from anywhere (file, bytes, base64, URL, array, PIL) as an 8-bit PIL image."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.paths import as_path, reached

# Opening by name keeps decoders that start other programs (EPS) or rarely see use out of reach.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PICTURE_PIXELS = 178_956_970  # where Pillow itself refuses: 0.5 GB once decoded to RGB
MAX_FETCH_BYTES = 64 * 2**20
FETCH_SECONDS = 20.0
_FETCH_CHUNK = 1 << 16
_FETCH_SCHEMES = ("http", "https")
_STORED = re.compile("(gs|s3|az)://")
# First bytes of base64 text of a picture: without them, text is far more likely a path with a typo.
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def load_image(
    source: Any, *, max_bytes: int = MAX_FETCH_BYTES, timeout: float = FETCH_SECONDS
) -> Image.Image:
    """Reads a picture: PIL image, array, bytes, path, base64 text, data URI, file, gs:// or http(s) URL.

    Arrays are [H W], [H W C] or [C H W] with 1, 3 or 4 channels: uint8, uint16 (scaled to 8 bits),
    bool, or floats from 0 to 1. Returns an upright 8-bit image of mode L, LA, P, RGB, RGBA, CMYK
    or the like (`to_rgb` makes it RGB); of an animation the first frame. `max_bytes` and `timeout`
    (seconds, all told) bound a URL. Raises InputError.
    """
    if isinstance(source, Image.Image):
        with _refusals("picture"):
            source.load()
            return _upright_8bit(source, "picture")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), "picture bytes")
    if isinstance(source, os.PathLike):
        return _open(os.fspath(source))
    if isinstance(source, str):
        return _from_text(source, max_bytes, timeout)
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source))
    raise InputError(
        f"picture: found {type(source).__name__}, expected a path, URL, base64 text, bytes, array "
        "or PIL image"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any 8-bit mode, transparency laid on white. Raises InputError for other modes."""
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except ValueError as e:
        raise InputError(f"picture: mode {image.mode} cannot be converted to RGB ({e})") from e


def is_picture(path: str) -> bool:
    """Whether a file begins as a picture does; what stands behind that may be damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = io.BytesIO(stored(path)) if is_place(path) else path
            Image.open(file, formats=FORMATS).close()
    except Image.UnidentifiedImageError:
        return False
    except Exception:  # known, and too large or broken: `load_image` says so
        return True
    return True


def decode_base64(text: str, name: str = "base64 picture") -> bytes:
    """Bytes of base64 text; line breaks, the URL alphabet and missing padding are fine.

    Raises InputError.
    """
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"{name}: not base64 text ({e}): {short(text)}") from e


def _from_text(text: str, max_bytes: int, timeout: float) -> Image.Image:
    scheme = text[:8].split(":", 1)[0].lower() if ":" in text[:8] else ""
    if scheme in _FETCH_SCHEMES:
        return _decode(io.BytesIO(fetch(text, max_bytes, timeout)), short(text))
    if scheme == "data":
        return _decode(io.BytesIO(data_uri(text)), "data URI")
    if scheme == "file":
        return _open(local_path(text))
    if is_place(text):
        return _open(text)
    if not _exists(text):
        try:
            data = decode_base64(text)
        except InputError:
            data = b""
        if data.startswith(_MAGIC):
            return _decode(io.BytesIO(data), "base64 picture")
    return _open(text)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except (OSError, ValueError):  # too long for a name, or a null byte: not a path
        return False


def _open(path: str) -> Image.Image:
    name = short(path)
    try:
        if is_place(path):
            return _decode(io.BytesIO(stored(path)), name)
        with open(path, "rb") as file:
            return _decode(file, name)
    except InputError:
        raise
    except (OSError, ValueError) as e:
        reason = "no such file" if isinstance(e, FileNotFoundError) else getattr(e, "strerror", e)
        raise InputError(f"{name}: cannot read this picture: {reason}") from e


def is_place(text: str) -> bool:
    """Whether a text names an object of a store: gs://bucket/cat.png."""
    return _STORED.match(text) is not None


def stored(place: str) -> bytes:
    """Bytes of an object. Raises InputError."""
    name = short(place)
    try:
        with reached(name):
            return as_path(place).read_bytes()
    except FileNotFoundError as e:
        raise InputError(f"{name}: cannot be read: no such file") from e


def local_path(uri: str) -> str:
    """The path of a file: address."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.request.url2pathname(parts.netloc + parts.path)


def data_uri(text: str) -> bytes:
    """Bytes of a data: URI, base64 or percent-encoded. Raises InputError."""
    head, comma, body = text.partition(",")
    if not comma:
        raise InputError(f"data URI: no comma after its media type: {short(text)}")
    if head.lower().endswith(";base64"):
        return decode_base64(urllib.parse.unquote(body), "data URI")
    return urllib.parse.unquote_to_bytes(body)


def _decode(file: Any, name: str) -> Image.Image:
    """An upright 8-bit image from an open binary file."""
    with _refusals(name), warnings.catch_warnings():
        # Pillow warns of large pictures, which have a limit of their own here, and of odd metadata.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.UnidentifiedImageError as e:
            file.seek(0)
            found = file.read(12)
            what = f"it begins with {found!r}" if found else "it is empty"
            raise InputError(f"{name}: not a picture ({', '.join(FORMATS)}); {what}") from e
        _check_pixels(image, name)
        image.load()
        return _upright_8bit(image, name)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turns what Pillow raises for a bad file into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as e:
        raise InputError(f"{name}: refused as a decompression bomb: {one_line(e)}") from e
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error) as e:
        raise InputError(f"{name}: damaged or truncated picture: {one_line(e)}") from e


def _check_pixels(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PICTURE_PIXELS:
        raise InputError(
            f"{name}: refused as a decompression bomb: {image.width} x {image.height} pixels, at "
            f"most {MAX_PICTURE_PIXELS} are read"
        )


def _upright_8bit(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name}: the picture is empty ({image.width} x {image.height})")
    _check_pixels(image, name)
    # Unreadable EXIF says nothing of a rotation.
    with contextlib.suppress(OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error):
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError(f"{name}: mode F (floats) has no known range; scale it to 8 bits first")
    if not image.mode.startswith("I"):
        return image
    # Pillow saturates at 255 when it converts these; the picture would be white.
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(f"{name}: mode {image.mode}, values {low} to {high}, expected 0 to 65535")
    return Image.fromarray(_scale_16bit(values))


def _scale_16bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[2] not in channels and array.shape[0] in channels:
        array = np.moveaxis(array, 0, 2)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in channels)) or not array.size:
        raise InputError(
            f"picture array: shape {list(array.shape)}, expected [H W], [H W C] or [C H W] with "
            "1, 3 or 4 channels"
        )
    if array.dtype == np.uint16:
        array = _scale_16bit(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"picture array: {array.dtype} from {low:g} to {high:g}, expected 0 to 1 (or uint8)"
            )
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(
            f"picture array: dtype {array.dtype}, expected uint8, uint16, bool or floats (0 to 1)"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return _upright_8bit(Image.fromarray(np.ascontiguousarray(array)), "picture array")


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    # The signature is urllib's.
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str):
        if urllib.parse.urlsplit(newurl).scheme not in _FETCH_SCHEMES:
            fp.close()
            raise InputError(
                f"{short(req.full_url)}: redirected away from http(s): {short(newurl)}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, max_bytes: int = MAX_FETCH_BYTES, timeout: float = FETCH_SECONDS) -> bytes:
    """Bytes of an http(s) URL, at most `max_bytes`, within `timeout` seconds. Raises InputError."""
    name = short(url)
    result: list[bytes | Exception] = []

    def work() -> None:
        try:
            result.append(_read_url(url, name, max_bytes, time.monotonic() + timeout, timeout))
        except Exception as e:
            if isinstance(e, urllib.error.HTTPError):
                e.close()
            result.append(e)

    # A socket's own timeout starts again with each byte that drips in; none covers a name look-up.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout)
    found = result[0] if result else TimeoutError()
    if isinstance(found, bytes):
        return found
    if isinstance(found, InputError):
        raise found
    if isinstance(found, TimeoutError) or isinstance(getattr(found, "reason", None), TimeoutError):
        raise InputError(f"{name}: no picture within {timeout:g} seconds") from found
    reason = one_line(getattr(found, "reason", found))
    if isinstance(found, urllib.error.HTTPError):
        raise InputError(f"{name}: the server answered {found.code} {reason}") from found
    raise InputError(f"{name}: cannot fetch this picture: {reason}") from found


def _read_url(url: str, name: str, max_bytes: int, deadline: float, timeout: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "qwen3vl-jax"})
    with urllib.request.build_opener(_HttpOnly).open(request, timeout=timeout) as response:
        data = bytearray()
        while chunk := response.read1(_FETCH_CHUNK):
            data += chunk
            if len(data) > max_bytes:
                raise InputError(
                    f"{name}: the answer is longer than the limit of {max_bytes} bytes"
                )
            if time.monotonic() > deadline:
                raise TimeoutError
        expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and len(data) != int(expected):
        raise InputError(f"{name}: the answer ended after {len(data)} of {expected} bytes")
    return bytes(data)


def one_line(error: Any) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def short(text: str, limit: int = 120) -> str:
    """A path or address as a message shows it."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
