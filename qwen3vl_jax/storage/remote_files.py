"""Files written piece by piece, locally or on stores that take whole objects only (see paths.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen3vl_jax.storage.paths import PIECE, copy_file, files_under, is_remote, reached


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file atomically: a killed process leaves the old content or the new."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill that replaces `path` when the block ends well and the bytes are on the disk.

    After an error, such as a full disk, `path` is unchanged. A remote file is written whole.
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
    """Flushes a folder's file names, or a file, to the disk. Raises OSError."""
    # Windows opens no folder.
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Spool:
    """A local temporary file (TMPDIR) that `close` copies whole to its remote path."""

    def __init__(self, path: Path):
        self._path, self._file = path, tempfile.TemporaryFile()  # noqa: SIM115
        self.write, self.flush = self._file.write, self._file.flush
        self.fileno = self._file.fileno

    def close(self) -> None:
        """Writes the object; a second call does nothing."""
        if self._file.closed:
            return
        try:
            self._file.seek(0)
            with self._path.open("wb") as out:
                shutil.copyfileobj(self._file, cast(BinaryIO, out), PIECE)
        finally:
            self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Closes; after an error nothing is written."""
        self._file.close() if error else self.close()


def new_file(path: Path) -> BinaryIO:
    """An empty file for writes at any offset; a remote one appears when it is closed."""
    return cast(BinaryIO, Spool(path)) if is_remote(path) else path.open("w+b")


class Mirrored:
    """A local folder that `sync` copies to a remote one; for a local `place` it is that folder."""

    def __init__(self, place: Path):
        self._place, self._copied = place, {}
        self.folder = Path(tempfile.mkdtemp()) if is_remote(place) else place

    def sync(self) -> None:
        """Copies the files that have grown. Raises InputError for a store that fails."""
        if not is_remote(self._place):
            return
        for name in files_under(self.folder):
            size = (self.folder / name).stat().st_size
            if self._copied.get(name) != size:
                with reached(self._place):
                    copy_file(self.folder / name, self._place / name)
                self._copied[name] = size

    def close(self) -> None:
        """Syncs and removes the local copy of a remote folder."""
        self.sync()
        if is_remote(self._place):
            shutil.rmtree(self.folder, ignore_errors=True)


class Growing:
    """A text file that grows by appends; a remote one is rewritten every EVERY seconds and on `sync`."""

    EVERY = 30.0

    def __init__(self, path: Path, text: str):
        """text: the first content."""
        self._mirror, self._synced = Mirrored(path.parent), time.monotonic()
        local = self._mirror.folder / path.name
        write_atomic(local, text.encode())
        self._mirror.sync()
        self._file = local.open("a", newline="", encoding="utf-8")

    def write(self, text: str) -> None:
        """Appends a text."""
        self._file.write(text)
        self._file.flush()
        if time.monotonic() - self._synced >= self.EVERY:
            # A store that fails is tried again later.
            with contextlib.suppress(Exception):
                self.sync()

    def sync(self) -> None:
        """Puts all of the text into the file. Raises InputError for a store that fails."""
        self._synced = time.monotonic()
        self._mirror.sync()

    def close(self) -> None:
        """Syncs and closes the file."""
        self._file.close()
        self._mirror.close()
