"""Files written piece by piece, and logs, locally or on stores that take whole objects only (paths.py)."""

import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen3vl_jax.storage import paths
from qwen3vl_jax.storage.paths import is_remote, reached

SYNC_EVERY = 15.0  # seconds
_READERS = 16  # parts that are read at a time


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file atomically: a killed process leaves the old content or the new."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the block ends well and its bytes are on the disk."""
    if is_remote(path):
        with new_file(path) as file:
            yield file
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


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """An empty file for writes at any offset; a remote one appears at the end (until then in TMPDIR)."""
    with tempfile.TemporaryFile() if is_remote(path) else path.open("w+b") as file:
        yield cast(BinaryIO, file)
        if is_remote(path):
            file.seek(0)
            with path.open("wb") as out:
                shutil.copyfileobj(cast(BinaryIO, file), cast(BinaryIO, out), paths.PIECE)


class Mirrored:
    """A local folder that `sync` copies to a remote one; for a local `place` it is that folder."""

    def __init__(self, place: Path):
        self._place, self._copied = place, {}
        self.folder = Path(tempfile.mkdtemp()) if is_remote(place) else place

    def sync(self) -> None:
        """Copies the files that have grown. Raises InputError for a store that fails."""
        if not is_remote(self._place):
            return
        for name in paths.files_under(self.folder):
            size = (self.folder / name).stat().st_size
            if self._copied.get(name) != size:
                with reached(self._place):
                    paths.copy_file(self.folder / name, self._place / name)
                self._copied[name] = size

    def close(self) -> None:
        """Syncs and removes the local copy of a remote folder."""
        self.sync()
        if is_remote(self._place):
            shutil.rmtree(self.folder, ignore_errors=True)


class Growing(Mirrored):
    """A file that begins with `text` and grows; a remote one is put anew by sync or after EVERY seconds."""

    EVERY = 30.0

    def __init__(self, path: Path, text: str):
        super().__init__(path.parent)
        local = self.folder / path.name
        write_atomic(local, text.encode())
        self.sync()
        self._file = local.open("a", newline="", encoding="utf-8")

    def write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
        if time.monotonic() - self._synced >= self.EVERY:
            # A store that fails is tried again later.
            with contextlib.suppress(Exception):
                self.sync()

    def sync(self) -> None:
        """Puts all of the text into the file. Raises InputError for a store that fails."""
        self._synced = time.monotonic()
        super().sync()

    def close(self) -> None:
        self._file.close()
        super().close()


class AppendLog:
    """Whole lines in a locked file. A remote log is a folder of parts, not locked, with a copy here."""

    def __init__(self, path: Path, busy: str):
        """Raises InputError(busy) while another process has it open, and OSError."""
        self.path, self.remote, self._part = path, is_remote(path), 0
        new = tempfile.TemporaryFile if self.remote else functools.partial(path.open, "ab+")
        self._file: Any = new(buffering=0)
        try:
            if self.remote:
                with reached(path), ThreadPoolExecutor(_READERS) as pool:
                    parts = _parts(path)
                    for part, text in zip(parts, pool.map(lambda part: part.read_bytes(), parts)):
                        self._put(text if text.endswith(b"\n") else text + b"\n")
                        self._part = int(part.name)
            else:
                paths.lock(self._file.fileno(), path, busy)
        except BaseException:
            self._file.close()
            raise
        self.size = self._file.seek(0, os.SEEK_END)
        # Bytes that are known to be on the disk, or in the store.
        self._safe, self._synced = self.size if self.remote else 0, time.monotonic()

    @staticmethod
    def has_begun(path: Path) -> bool:
        """Whether a log holds anything."""
        return bool(_parts(path)) if is_remote(path) else path.exists() and path.stat().st_size > 0

    def _put(self, text: bytes) -> None:
        rest = memoryview(text)
        while rest:
            rest = rest[self._file.write(rest) :]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(first byte, text) of each line; the last may be torn."""
        start = 0
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            for text in file:
                yield start, text
                start += len(text)

    def read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        return self._file.read(size)

    def cut(self, size: int) -> None:
        """Keeps the first `size` bytes, which are whole lines."""
        self._file.truncate(size)
        self.size = size

    def append(self, line: bytes) -> int:
        """Adds a line; gives its first byte. Raises OSError, and tries to leave nothing of it then."""
        start = self.size
        try:
            self._file.seek(start)
            self._put(line)
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise
        self.size = start + len(line)
        if time.monotonic() - self._synced >= SYNC_EVERY:
            self.sync()
        return start

    def sync(self) -> None:
        """Puts all lines on the disk, or in the store. Raises OSError; InputError for a store's failure."""
        if self.size == self._safe:
            return
        if self.remote:
            with reached(self.path):
                text = self.read(self._safe, self.size - self._safe)
                (self.path / f"{self._part + 1:08d}").write_bytes(text)
            self._part += 1
        else:
            os.fsync(self._file.fileno())
            if not self._safe:
                sync_folder(self.path.parent)
        self._safe, self._synced = self.size, time.monotonic()

    def remove(self) -> None:
        paths.remove_tree(self.path) if self.remote else self.path.unlink()

    def close(self) -> None:
        self._file.close()


def _parts(path: Path) -> list[Path]:
    found = path.iterdir() if path.is_dir() else ()
    return sorted(part for part in found if part.name.isdecimal())
