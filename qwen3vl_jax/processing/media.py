"""Sources of images and videos: every form of a source, opened as a file."""

import base64
import contextlib
import dataclasses
import functools
import io
import os
import re
import stat
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError, unexpected
from qwen3vl_jax.processing.fetching import MediaRules, fetch, short
from qwen3vl_jax.processing.image_loading import decoded_image, from_array, is_image, upright_8bit
from qwen3vl_jax.storage.paths import as_path, is_remote, reached

_URL = re.compile("https?://", re.IGNORECASE)
_DATA = re.compile("data:[^;,/]{0,64}[;,/]", re.IGNORECASE)
_FILE = re.compile("file:/", re.IGNORECASE)
STORED = re.compile("(gs|s3|az)://")
_KEYS = ("bytes", "url", "path", "base64")
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {"d": "directory", "p": "FIFO", "s": "socket", "c": "device", "b": "device"}


def load_image(source: Any, rules: MediaRules | None = None) -> Image.Image:
    """An upright 8-bit PIL image of a PIL image, an array, or any form that `open_source` takes.

    The mode is L, LA, P, RGB, RGBA, CMYK or the like (`to_rgb` makes it RGB); an animation gives its
    first frame. rules: as in `open_source`; arrays: as in `from_array`. Raises InputError.
    """
    with loaded_image(source, rules) as image:
        return image


@contextlib.contextmanager
def loaded_image(source: Any, rules: MediaRules | None = None) -> Iterator[Image.Image]:
    """`load_image`, whose memory is counted while the context is open."""
    if isinstance(source, Image.Image):
        yield upright_8bit(source, "image")
    elif hasattr(source, "__array__"):
        try:
            array = np.asarray(source)
        except Exception as e:  # a class of its own: whatever it raises
            raise InputError(f"image: {type(source).__name__} gives no array") from e
        yield from_array(array)
    else:
        found = open_source(source, "image", rules)
        with found.open() as file, decoded_image(file, found.name) as image:
            yield image


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """An image or video that is not read yet; `open` gives a new file at its start. Raises InputError."""

    name: str
    open: Callable[[], BinaryIO]


def open_source(source: Any, key: str = "image", rules: MediaRules | None = None) -> MediaFile:
    """The file of a source that is no array, PIL image or list. Raises InputError.

    Forms of a source: path, http(s), gs:// or file URL, data URI, base64 text, bytes, and an object
    with bytes, url, path or base64, as {"bytes": .., "path": ..}. key: "image" or "video".
    """
    rules = rules or MediaRules()
    if isinstance(source, Mapping):
        source = inner(source, key)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return MediaFile(f"{key} bytes", functools.partial(io.BytesIO, bytes(source)))
    is_path = isinstance(source, os.PathLike)
    text = os.fspath(source) if is_path else source
    if not isinstance(text, str) or not text:
        found = "an empty text" if isinstance(text, str) else type(source).__name__
        forms = "a path, URL, data URI, base64 text, bytes, array, PIL image"
        raise unexpected(key, found, f"{forms}, or an object with one of them")
    name = short(text)
    form = "path" if is_path and not is_remote(text) else form_of(text, key, rules.root)
    if form in ("path", "file"):
        path = local_path(text) if form == "file" else text
        return MediaFile(name, lambda: _open(path, key, rules))
    if form == "url":
        data = fetch(text, rules)
    elif form == "store":
        rules.check_host("/".join(text.split("/")[:3]), None, key)
        try:
            with reached(name):
                data = as_path(text).read_bytes()
        except FileNotFoundError as e:
            raise InputError(f"{name}: cannot be read: no such file") from e
    else:
        name = "data URI" if form == "data" else f"base64 {key}"
        data = decode_base64(text) if form == "base64" else _data_uri(text)
    return MediaFile(name, functools.partial(io.BytesIO, data))


def _data_uri(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise unexpected("data URI", short(text), "a comma after its media type")
    if head.lower().endswith(";base64"):
        return decode_base64(urllib.parse.unquote(body), "data URI")
    return urllib.parse.unquote_to_bytes(body)


def inner(given: Mapping[str, Any], key: str) -> Any:
    """The source in an object: of {bytes, path} the bytes, where there are any. Raises InputError."""
    found = {k: v for k, v in given.items() if v is not None and not is_empty(v)}
    found.pop("detail", None)  # a key of OpenAI's models alone
    if "bytes" in found:
        found.pop("path", None)
    if len(found) != 1 or not set(found) <= set(_KEYS):
        names = short(", ".join(map(str, found or given)) or "nothing")
        raise unexpected(key, f"an object with {names}", "bytes, url, path or base64")
    ((name, source),) = found.items()
    if name in ("bytes", "base64") and isinstance(source, str) and not _DATA.match(source):
        return "data:;base64," + source
    return source


def is_empty(value: Any) -> bool:
    """Whether a source is "" or b"", which mean none."""
    return isinstance(value, (str, bytes)) and not value


def form_of(text: str, key: str, folder: str = "") -> str:
    """ "url", "data", "file", "store", "path", or "base64" for an image's or video's that names no file."""
    for form, pattern in (("url", _URL), ("data", _DATA), ("file", _FILE), ("store", STORED)):
        if pattern.match(text):
            return form
    try:
        data = decode_base64(text)
    except InputError:
        return "path"
    is_known = key == "image" and is_image(data)
    if key == "video":
        import av

        options, errors = {"protocol_whitelist": "none"}, (av.FFmpegError, ValueError, OSError)
        held = io.BytesIO(data)
        with contextlib.suppress(*errors), av.open(held, container_options=options) as file:
            is_known = bool(file.streams.video)
    return "base64" if is_known and not os.path.exists(os.path.join(folder, text)) else "path"


def within(source: Any, key: str, folder: str) -> Any:
    """A source whose relative paths, in any form and in lists, begin in a folder."""
    if isinstance(source, (list, tuple)):  # the frames of a video
        return [within(frame, "image", folder) for frame in source]
    if isinstance(source, Mapping):
        return {k: within(v, key, folder) if k in ("url", "path") else v for k, v in source.items()}
    is_path = isinstance(source, os.PathLike) and not is_remote(source)
    if is_path or (isinstance(source, str) and source and form_of(source, key, folder) == "path"):
        return os.path.join(folder, source)
    return source


def _open(path: str, key: str, rules: MediaRules) -> BinaryIO:
    """Opens a regular file without waiting for it; links that leave the root are not followed."""
    refused = f"{short(path)}: cannot read this {key}"
    try:
        real = rules.local(path, key)
        if os.path.realpath(real).startswith(("/proc/", "/sys/")):
            raise InputError(f"{refused}: it is of /proc or /sys, expected a regular file")
        # Opening a device may already do something.
        _check_regular(os.stat(real), refused)
        handle = _open_below(rules.root, real) if rules.root else os.open(real, _FLAGS)
        try:
            _check_regular(os.fstat(handle), refused)
        except BaseException:
            os.close(handle)
            raise
        return os.fdopen(handle, "rb")
    except (OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        reason = "no such file" if isinstance(e, FileNotFoundError) else getattr(e, "strerror", e)
        raise InputError(f"{refused}: {reason}") from e


def _open_below(root: str, real: str) -> int:
    """Opens a file below a folder, folder by folder, so that links made meanwhile are not followed."""
    handle = os.open(os.path.realpath(root), _FLAGS | os.O_DIRECTORY)
    for part in os.path.relpath(real, os.path.realpath(root)).split(os.sep):
        try:
            below = os.open(part, _FLAGS | os.O_NOFOLLOW, dir_fd=handle)
        finally:
            os.close(handle)
        handle = below
    return handle


def _check_regular(found: os.stat_result, refused: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.filemode(found.st_mode)[0], "special file")
        raise InputError(f"{refused}: it is a {kind}, expected a regular file")


def local_path(uri: str) -> str:
    """The local path that a `file:` URI names."""
    parts = urllib.parse.urlsplit(uri)
    host = "" if parts.netloc.lower() == "localhost" else parts.netloc
    return urllib.request.url2pathname(host + parts.path)


def decode_base64(text: str, name: str = "base64 text") -> bytes:
    """Bytes of base64 text; line breaks, URL alphabet, missing padding are fine. Raises InputError."""
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError as e:
        raise InputError(f"{name}: not base64 text ({e}): {short(text)}") from e
