"""A log of whole lines that outlives its process.

A file grows by a line at a time and is locked while it is open. An object store cannot append: a log is a
folder of parts there, one every SYNC_EVERY seconds and one at the end, so that a killed process loses what
it wrote since the last one. No lock keeps two processes from the same folder.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen3vl_jax.storage.paths import is_remote, lock, reached, remove_tree
from qwen3vl_jax.storage.remote_files import sync_folder

SYNC_EVERY = 15.0  # seconds
_READERS = 16  # parts that are read at a time


class AppendLog:
    """Whole lines in a file, locked while it is open; of a remote log a copy here, and parts there."""

    def __init__(self, path: Path, busy: str):
        """Raises InputError(busy) while another process has it open, and OSError."""
        self.path, self.remote = path, is_remote(path)
        self._file: Any = (
            tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            if self.remote
            else path.open("ab+", buffering=0)
        )
        try:
            self._part = self._fetch() if self.remote else 0
            if not self.remote:
                lock(self._file.fileno(), path, busy)
            self.size = self._file.seek(0, os.SEEK_END)
            # Bytes that are known to be on the disk, or in the store.
            self._safe = self.size if self.remote else 0
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    @staticmethod
    def has_begun(path: Path) -> bool:
        """Whether a log holds anything."""
        return bool(_parts(path)) if is_remote(path) else path.exists() and path.stat().st_size > 0

    def _fetch(self) -> int:
        """Copies the parts; gives the number of the last."""
        with reached(self.path), ThreadPoolExecutor(_READERS) as pool:
            parts = _parts(self.path)
            for text in pool.map(lambda part: part.read_bytes(), parts):
                self._put(text if text.endswith(b"\n") else text + b"\n")
        return int(parts[-1].name) if parts else 0

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
        """`size` bytes from `start`."""
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
        if not self.remote:
            os.fsync(self._file.fileno())
            if not self._safe:
                sync_folder(self.path.parent)
        else:
            with reached(self.path):
                text = self.read(self._safe, self.size - self._safe)
                (self.path / f"{self._part + 1:08d}").write_bytes(text)
            self._part += 1
        self._safe, self._synced = self.size, time.monotonic()

    def remove(self) -> None:
        """Deletes the log."""
        remove_tree(self.path) if self.remote else self.path.unlink()

    def close(self) -> None:
        """Lets other processes open it."""
        self._file.close()


def _parts(path: Path) -> list[Path]:
    found = path.iterdir() if path.is_dir() else ()
    return sorted(part for part in found if part.name.isdecimal())
