"""A log of whole lines that outlives its process: one file, or on an object store numbered parts.

A file grows by a line at a time and is locked while it is open. Objects do not grow, so there the log
is a folder of parts, each put whole every PartLog.EVERY seconds and at the end: a killed process loses
what it wrote since the last one. No lock keeps two processes from the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.paths import is_remote, reached, remove_tree

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

_READERS = 16  # parts read at a time


class FileLog:
    """A log in a file that one process has open."""

    def __init__(self, path: Path, busy: str):
        """Raises InputError(busy) while another process has it open, and OSError."""
        self.path = path
        self._file: BinaryIO = path.open("ab+")
        try:
            self._lock(busy)
        except BaseException:
            self._file.close()
            raise

    def _lock(self, busy: str) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(busy) from e
        # The other one may have ended, and removed what we opened, just before.
        if not self.path.exists() or not os.path.samestat(
            os.fstat(self._file.fileno()), self.path.stat()
        ):
            raise InputError(busy)

    def read(self) -> bytes:
        """All that is there; its last line may be torn."""
        self._file.seek(0)
        return self._file.read()

    def cut(self, size: int) -> None:
        """Leaves the first bytes, whole lines."""
        self._file.truncate(size)

    def write(self, line: bytes) -> None:
        """Adds a line. Raises OSError."""
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        """Puts what was written on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Puts it on the disk; others may open it then."""
        close_file(self._file)


class PartLog:
    """A log in the objects of a remote folder."""

    EVERY = 15.0  # seconds

    def __init__(self, path: Path):
        self.path, self._waiting = path, []
        names = _parts(path)
        self._number = int(names[-1].name) if names else 0
        self._written = time.monotonic()

    def read(self) -> bytes:
        """All that is there."""
        return b"".join(_texts(self.path))

    def cut(self, size: int) -> None:
        """Leaves all or, for size 0, nothing: parts hold whole lines."""
        if not size:
            remove(self.path)

    def write(self, line: bytes) -> None:
        """Adds a line. Raises InputError where a part cannot be put; the next `sync` tries again."""
        self._waiting.append(line)
        if time.monotonic() - self._written >= self.EVERY:
            self.sync()

    def sync(self) -> None:
        """Puts what was written where it is safe."""
        if self._waiting:
            with reached(self.path):
                (self.path / f"{self._number + 1:08d}").write_bytes(b"".join(self._waiting))
            self._number, self._waiting = self._number + 1, []
        self._written = time.monotonic()

    def close(self) -> None:
        """The last `sync`."""
        self.sync()


def open_log(path: Path, busy: str) -> FileLog | PartLog:
    """The log at a path, begun or not. Raises InputError(busy) where it is seen to be open, and OSError."""
    return PartLog(path) if is_remote(path) else FileLog(path, busy)


def begun(path: Path) -> bool:
    """Whether a log holds anything."""
    if is_remote(path):
        return bool(_parts(path))
    return path.exists() and path.stat().st_size > 0


def pieces(path: Path, size: int) -> Iterator[bytes]:
    """Whole lines of a log, `size` bytes and the rest of a line, or a part, at a time. Raises OSError."""
    if is_remote(path):
        yield from _texts(path)
        return
    with path.open("rb") as file:
        while lines := file.readlines(size):
            yield b"".join(lines)


def digest(path: Path) -> str:
    """Of a log's bytes; empty where there is none."""
    found = hashlib.blake2b()
    try:
        if not begun(path):
            return ""
        for text in pieces(path, 1 << 20):
            found.update(text)
    except OSError:
        return ""
    return found.hexdigest()


def remove(path: Path) -> None:
    """The end of a log."""
    remove_tree(path) if is_remote(path) else path.unlink()


def close_file(file: BinaryIO) -> None:
    """Closes a file of this machine's disk, and puts it there as far as that can be."""
    with contextlib.suppress(OSError):  # a full disk was told before
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(OSError):
        file.close()


def _parts(path: Path) -> list[Path]:
    found = path.iterdir() if path.is_dir() else ()
    return sorted(part for part in found if part.name.isdecimal())


def _texts(path: Path) -> Iterator[bytes]:
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(lambda part: part.read_bytes(), _parts(path))
