"""Places of files: folders of this machine, and gs:// or whatever else etils.epath opens.

What is annotated as `Path` may be either one; what they do not share is here. An object store knows
whole objects only: nothing is renamed, appended to or locked there, and what is written appears when
it is closed. So what takes several objects is complete when the one that is written last is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen3vl_jax.errors import InputError

_MARK = "://"
_DRIVERS = {"gs": "gcs"}  # fsspec's names of the schemes, where they differ
_EXTRAS = {"gs": "gs", "s3": "s3"}
_PIECE, _PIECES = 32 << 20, 8  # bytes of a request for a part of an object, and how many at a time


def as_path(given: str | os.PathLike[str]) -> Path:
    """A place as a path: etils.epath's for one with a scheme, else the machine's own; nothing is read.

    Raises InputError for a scheme that epath does not know, and where what opens it is not installed.
    """
    text = os.fspath(given)
    if _MARK not in text:
        return Path(text)
    from etils import epath

    scheme = text.split(_MARK)[0]
    try:
        path = epath.Path(text)
    except KeyError:
        raise InputError(
            f"{text}: etils.epath knows no {scheme}://; expected a folder, gs://, s3:// or az://"
        ) from None
    if scheme in ("gs", "s3", "az"):
        _check_installed(text, scheme)
    return cast(Path, path)


def _check_installed(text: str, scheme: str) -> None:
    if importlib.util.find_spec("tensorflow"):
        return  # epath takes it where it is there
    try:
        import fsspec

        fsspec.get_filesystem_class(_DRIVERS.get(scheme, scheme))
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        how = f"pip install 'qwen3vl-jax[{extra}]'" if extra else "install what it names"
        raise InputError(f"{text}: {scheme}:// needs a package: {error}; {how}") from None


def argument(text: str) -> Path:
    """`as_path` for argparse."""
    try:
        return as_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a place is not one of this machine's folders."""
    return _MARK in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The place from any working directory, links followed; a remote one is so already."""
    path = as_path(path)
    return path if is_remote(path) else Path(os.path.realpath(path))


@contextlib.contextmanager
def reached(path: object) -> Iterator[None]:
    """Turns what a store's client raises (no bucket, no right, no network) into one line."""
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:
        if not is_remote(str(path)):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: cannot be reached ({reason})") from error


def kind(path: Path) -> str:
    """What is there: "folder", "file" or "". Raises InputError for a store that cannot be asked."""
    with reached(path):
        return "folder" if path.is_dir() else "file" if path.exists() else ""


def file_size(path: Path) -> int:
    """Bytes of a file. Raises OSError."""
    found: Any = path.stat()
    return found.length if is_remote(path) else found.st_size


def files_under(folder: Path, leave_out: Iterable[str] = ()) -> list[Path]:
    """Every file below a folder, relative to it, sorted; leave_out: names of its own that do not count."""
    left_out = set(leave_out)
    if is_remote(folder):
        return sorted(Path(name) for name in _objects(folder, "", left_out))
    found = []
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        if Path(place) == Path(folder):
            folders[:] = [f for f in folders if f not in left_out]
            names[:] = [n for n in names if n not in left_out]
        found += [here / name for name in names]
    return sorted(path for path in found if (folder / path).is_file())


def _objects(folder: Path, before: str, left_out: set[str]) -> Iterator[str]:
    for path in folder.iterdir():
        # An object named as the folder itself is how some tools show an empty one.
        if path != folder and path.name not in left_out:
            if path.is_dir():
                yield from _objects(path, f"{before}{path.name}/", set())
            else:
                yield before + path.name


def read_range(path: Path, start: int, size: int) -> bytes:
    """Some bytes of a file, of an object only those. Raises OSError for one that ends before."""
    driver = _driver(path) if is_remote(path) else None
    if driver is None:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    text, end = os.fspath(path), start + size
    if size <= _PIECE:
        return driver.cat_file(text, start=start, end=end) if size else b""
    out = bytearray(size)
    cuts = [(at, min(at + _PIECE, end)) for at in range(start, end, _PIECE)]
    for i in range(0, len(cuts), _PIECES):
        group = cuts[i : i + _PIECES]
        begins, ends = zip(*group)
        many = driver.cat_ranges([text] * len(group), list(begins), list(ends), on_error="raise")
        for (a, b), piece in zip(group, many, strict=True):
            out[a - start : b - start] = piece
    return cast(bytes, out)  # a copy would double it


def _driver(path: Path) -> Any:
    """fsspec's client of a scheme, or None: only TensorFlow opens it here."""
    try:
        import fsspec

        scheme = os.fspath(path).split(_MARK)[0]
        return fsspec.filesystem(_DRIVERS.get(scheme, scheme))
    except (ImportError, ValueError):
        return None


def copy_file(source: Path, target: Path) -> None:
    """Copies a file from anywhere to anywhere; the target's folder is there or remote."""
    if not is_remote(source) and not is_remote(target):
        shutil.copyfile(source, target)
        return
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(cast(BinaryIO, read), cast(BinaryIO, write), _PIECE)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; objects need none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a folder with all that is in it, as far as it can."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(Exception):  # each store's client has errors of its own
        cast(Any, path).rmtree()


def for_orbax(path: Path) -> Any:
    """A place as Orbax takes it. Raises InputError for one that Orbax cannot read or write."""
    if not is_remote(path):
        return path.absolute()
    if not str(path).startswith("gs://"):
        raise InputError(
            f"{path}: Orbax reads and writes checkpoints in folders and on gs:// only; take one of "
            "them (Hugging Face files are read and written anywhere)"
        )
    try:
        importlib.import_module("google.cloud.storage")  # Orbax asks it what kind a bucket is
    except ImportError:
        raise InputError(
            f"{path}: Orbax needs google-cloud-storage there: pip install 'qwen3vl-jax[gs]'"
        ) from None
    return path
