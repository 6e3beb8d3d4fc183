"""Paths, local or remote: gs:// and the other stores that etils.epath opens.

An annotation `Path` means either kind. This module holds what the two do not share. An object store
writes whole objects: it has no rename, append or lock, and an object appears when it is closed. A
checkpoint of several objects is therefore complete when the last one is there.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen3vl_jax.errors import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The folder of demo/ and configs/: inside the installed package, beside it in a clone.
_PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED = next(x for x in (_PACKAGE / "bundled", _PACKAGE.parent) if x.is_dir())
AnyPath = str | os.PathLike[str]
_MARK = "://"
_DRIVERS = {"gs": "gcs"}  # fsspec's names of the schemes, where they differ
# Bytes of one request for a part of an object, and requests at a time.
PIECE, _PIECES = 32 << 20, 8


def as_path(given: AnyPath) -> Path:
    """A path from text, etils.epath's with a scheme (gs://..). Nothing is read. Raises InputError."""
    text = os.fspath(given)
    if _MARK not in text:
        return Path(text)
    from etils import epath

    scheme = text.split(_MARK)[0]
    try:
        path = epath.Path(text)
    except KeyError:
        expected = "expected a folder, gs://, s3:// or az://"
        raise InputError(f"{text}: etils.epath knows no {scheme}://; {expected}") from None
    # epath uses TensorFlow if it is installed.
    if scheme in ("gs", "s3", "az") and not importlib.util.find_spec("tensorflow"):
        try:
            import fsspec

            fsspec.get_filesystem_class(_DRIVERS.get(scheme, scheme))
        except ImportError as error:
            extra = f"pip install 'qwen3vl-jax[{scheme}]'"
            how = extra if scheme in ("gs", "s3") else "install what it names"
            raise InputError(f"{text}: {scheme}:// needs a package: {error}; {how}") from None
    return cast(Path, path)


def argument(text: str) -> Path:
    """`as_path` for argparse."""
    try:
        return as_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_remote(path: AnyPath) -> bool:
    """Whether a path is on a remote store."""
    return _MARK in os.fspath(path)


def absolute(path: AnyPath) -> Path:
    """The absolute path with links resolved; a remote path as it is."""
    path = as_path(path)
    return path if is_remote(path) else Path(os.path.realpath(path))


@contextlib.contextmanager
def reached(path: object) -> Iterator[None]:
    """Turns errors of a store's client (no bucket, no access, no network) into InputError."""
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:
        if not is_remote(str(path)):
            raise
        raise InputError(f"{path}: cannot be reached ({one_line(error)[:200]})") from error


def kind(path: Path) -> str:
    """The kind of a path: "folder", "file", or "" if nothing is there. Raises InputError."""
    with reached(path):
        return "folder" if path.is_dir() else "file" if path.exists() else ""


def file_size(path: Path) -> int:
    """Size of a file in bytes. Raises OSError."""
    found: Any = path.stat()
    return found.length if is_remote(path) else found.st_size


def files_under(folder: Path, leave_out: Iterable[str] = ()) -> list[Path]:
    """Every file below a folder but `leave_out` in it, relative and sorted; linked folders do not count."""
    remote, left_out, found, folders = is_remote(folder), set(leave_out), [], [(folder, "")]
    # The list grows meanwhile.
    for place, prefix in folders:
        inside: list[Path] = []
        # A folder that may not be read, as lost+found, has no file for us.
        with contextlib.suppress(PermissionError):
            inside = list(place.iterdir())
        for path in inside:
            # Some tools show an empty folder as an object of its own name.
            if path == place or (place == folder and path.name in left_out):
                continue
            if path.is_dir():
                if remote or not path.is_symlink():
                    folders.append((path, f"{prefix}{path.name}/"))
            elif remote or path.is_file():
                found.append(Path(prefix + path.name))
    return sorted(found)


def read_range(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`; of an object only these are fetched. Raises OSError."""
    driver: Any = None
    # Where TensorFlow alone opens a scheme there is no client of fsspec's.
    with contextlib.suppress(ImportError, ValueError):
        if is_remote(path):
            import fsspec

            scheme = os.fspath(path).split(_MARK)[0]
            driver = fsspec.filesystem(_DRIVERS.get(scheme, scheme))
    if driver is None:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    text, end = os.fspath(path), start + size
    begins, out = range(start, end, PIECE), bytearray()
    for i in range(0, len(begins), _PIECES):
        group = list(begins[i : i + _PIECES])
        ends = [min(at + PIECE, end) for at in group]
        for piece in driver.cat_ranges([text] * len(group), group, ends, on_error="raise"):
            out += piece
    # Not bytes(out): a copy would double the memory.
    return cast(bytes, out)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, local or remote; a local target's folder has to exist."""
    if not is_remote(source) and not is_remote(target):
        # It refuses to copy a file onto itself, which opening the target would empty.
        shutil.copyfile(source, target)
        return
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(cast(BinaryIO, read), cast(BinaryIO, write), PIECE)


def lock(handle: int, path: Path, busy: str) -> None:
    """Locks an open file or folder until it is closed. Raises InputError(busy) if another has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(busy) from e
    # The other process may have ended, and removed or renamed what we opened, just before.
    if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
        raise InputError(busy)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; a store needs none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a folder and its contents; errors are ignored.

    For up to 2 seconds it tries again: threads of an interrupted writer may still write into it.
    """
    if not is_remote(path):
        for _ in range(100):
            shutil.rmtree(path, ignore_errors=True)
            if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
                return
            time.sleep(0.02)
        return
    # Each store's client raises errors of its own.
    with contextlib.suppress(Exception):
        cast(Any, path).rmtree()


def for_orbax(path: Path) -> Any:
    """A path as Orbax takes it. Raises InputError for a store that Orbax cannot read or write."""
    if not is_remote(path):
        return path.absolute()
    if not str(path).startswith("gs://"):
        where = "Orbax reads and writes checkpoints in folders and on gs:// only"
        raise InputError(f"{path}: {where} (Hugging Face files can be anywhere); take one of them")
    try:
        # Orbax asks it for the kind of a bucket.
        importlib.import_module("google.cloud.storage")
    except ImportError:
        needs = "needs google-cloud-storage there: pip install 'qwen3vl-jax[gs]'"
        raise InputError(f"{path}: Orbax {needs}") from None
    return path
