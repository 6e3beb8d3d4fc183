"""Files that are written bit by bit, in folders and where only whole objects can be put (see paths.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen3vl_jax.storage.paths import (
    copy_file,
    files_under,
    is_remote,
    reached,
)

_PIECE = 32 << 20  # bytes in memory while a file is put to its place


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that a killed process leaves as it was, or as it is to be."""
    if is_remote(path):
        path.write_bytes(data)
        return
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill that takes the place of `path` when the block ends well and it is on the disk.

    After an error, a full disk's too, `path` is as it was. A remote one is put whole.
    """
    if is_remote(path):
        with Spool(path) as file:
            yield cast(BinaryIO, file)
        return
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            if path.exists():
                shutil.copymode(path, new)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on the disk. Raises OSError."""
    if os.name != "posix":
        return  # Windows opens no folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Spool:
    """A file that lies on this machine's disk (TMPDIR) until `close` puts it to its place, whole."""

    def __init__(self, path: Path):
        self._path, self._file = path, tempfile.TemporaryFile()  # noqa: SIM115
        self.write, self.flush, self.fileno = (
            self._file.write, self._file.flush, self._file.fileno,
        )  # fmt: skip

    def close(self) -> None:
        """Writes the object; nothing the second time."""
        if self._file.closed:
            return
        try:
            self._file.seek(0)
            with self._path.open("wb") as out:
                shutil.copyfileobj(self._file, cast(BinaryIO, out), _PIECE)
        finally:
            self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """`close`, or after an error none of it."""
        self._file.close() if error else self.close()


def new_file(path: Path) -> BinaryIO:
    """An empty file to write anywhere in; a remote one appears when it is closed."""
    return cast(BinaryIO, Spool(path)) if is_remote(path) else path.open("w+b")


class Growing:
    """A text that grows: a line that was written is in the file; a remote one is rewritten now and then."""

    EVERY = 30.0  # seconds

    def __init__(self, path: Path, text: str):
        """text: what it holds to begin with."""
        write_whole(path, text.encode())
        self._path, self._parts, self._written = path, [text], time.monotonic()
        self._stale = False  # whether the object lacks something
        self._file = None if is_remote(path) else path.open("a", newline="", encoding="utf-8")

    def write(self, text: str) -> None:
        """Adds a text."""
        if self._file:
            self._file.write(text)
            self._file.flush()
            return
        self._parts.append(text)
        self._stale = True
        if time.monotonic() - self._written >= self.EVERY:
            self._written = time.monotonic()
            with contextlib.suppress(Exception):  # of the store: it is tried again
                self.sync()

    def sync(self) -> None:
        """Has all of it where it belongs."""
        if not self._file and self._stale:
            self._parts = ["".join(self._parts)]
            with reached(self._path):
                write_whole(self._path, self._parts[0].encode())
            self._written, self._stale = time.monotonic(), False

    def close(self) -> None:
        """The end of it."""
        self.sync()
        if self._file:
            self._file.close()


class Mirrored:
    """A folder for those who write files in ways of their own: `place`, or one that is copied there."""

    def __init__(self, place: Path):
        self._place, self._copied = place, {}
        self.folder = Path(tempfile.mkdtemp()) if is_remote(place) else place

    def sync(self) -> None:
        """Copies the files that have grown."""
        if not is_remote(self._place):
            return
        for name in files_under(self.folder):
            size = (self.folder / name).stat().st_size
            if self._copied.get(name) != size:
                copy_file(self.folder / name, self._place / name)
                self._copied[name] = size

    def close(self) -> None:
        """The last `sync`."""
        self.sync()
        if is_remote(self._place):
            shutil.rmtree(self.folder, ignore_errors=True)
