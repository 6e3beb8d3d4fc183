"""Directories written atomically: complete or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.paths import absolute, fcntl, is_remote, kind, lock, reached, remove_tree
from qwen3vl_jax.storage.remote_files import sync_folder

CONFIG = "config.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# An object that exists while the others are written beside it.
PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_dir(out: Path, force: bool = False, needs: int = 0) -> Iterator[Path]:
    """A directory to fill that becomes `out` when the block ends well; after an error it is removed.

    Local: `.NAME.partial` beside `out` is renamed at the end; with `force` an old `out` stays until then. A
    killed process leaves it without config.json, so it never loads. Raises InputError if `out` exists, if
    the disk has fewer than `needs` free bytes, and while another process writes to `out`.
    Remote: `out` itself is filled, so write the file that makes it loadable last. A killed process leaves
    PARTIAL in it, and the next run clears it. `force` replaces nothing; there is no lock.
    """
    try:
        with _filled(out) if is_remote(out) else _swapped(out, force, needs) as stage:
            yield stage
    except OSError as e:
        if e.errno not in _FULL:
            raise
        raise InputError(f"{out}: cannot be written ({e.strerror}); make room there") from e


@contextlib.contextmanager
def _filled(out: Path) -> Iterator[Path]:
    if kind(out):
        if kind(out / PARTIAL) != "file" or kind(out / CONFIG):
            why = "already exists, and an object store cannot put a new directory in its place"
            raise InputError(f"{out}: {why}; choose another one, or remove it first")
        with reached(out):
            cast(Any, out).rmtree()
    try:
        with reached(out):
            (out / PARTIAL).write_bytes(b"being written\n")
        yield out
        (out / PARTIAL).unlink()
    except BaseException:
        remove_tree(out)
        raise


@contextlib.contextmanager
def _swapped(out: Path, force: bool, needs: int) -> Iterator[Path]:
    out = absolute(out)
    stage, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    if old.is_dir() and not out.exists():
        # A process was killed between the two renames.
        old.rename(out)
    _check_free_to_write(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(out.parent).free) < needs:
            raise InputError(f"{out.parent}: {free:,} bytes free, {needs:,} needed")
        stage.mkdir(exist_ok=True)
        handle = os.open(stage, os.O_RDONLY) if fcntl else None
    except OSError as e:
        raise InputError(f"{out}: cannot be written ({e.strerror})") from e
    try:
        if handle is not None:
            lock(handle, stage, f"{out}: another process is writing it; wait for it or stop it")
        try:
            # Another process may have finished since.
            _check_free_to_write(out, force)
            for path in stage.iterdir():
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink()
            shutil.rmtree(old, ignore_errors=True)
            yield stage
            # A power cut after the rename loses nothing.
            for folder, _, names in os.walk(stage) if fcntl else ():
                for path in (*(Path(folder, name) for name in names), Path(folder)):
                    sync_folder(path)
        except BaseException:
            remove_tree(stage)
            raise
        if out.exists():
            out.rename(old)
        stage.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)


def _check_free_to_write(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: got a file, expected a directory to write")
    if not force:
        raise InputError(f"{out}: already exists; choose another directory or pass --force")
    if any(out.iterdir()) and not (out / CONFIG).is_file():
        raise InputError(f"{out}: holds no {CONFIG}; --force replaces checkpoints only")


def check_apart(source: Path, out: Path) -> None:
    """Raises InputError if one directory is inside the other, or both are the same."""
    source, out = absolute(source), absolute(out)
    if source == out or source in out.parents or out in source.parents:
        raise InputError(f"{out}: is inside {source} or holds it; choose a directory apart from it")
