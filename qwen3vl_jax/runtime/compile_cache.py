"""The compile cache: what XLA compiled, kept for the next process.

It is in the user's own folder, or for several processes in that of their run. JAX runs what it finds
there, so the folder must be one that nobody else can write; an object store is not checked.
"""

import contextlib
import hashlib
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import InputError

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# The folder of a run of several processes.
KEPT_PROGRAMS = "compiled"
HELP = f"compile anew (default: programs are kept in {VARIABLE}, else in ~/.cache/qwen3vl_jax)"


class Programs:
    """Counts the programs that this process compiled and those that it found in the folder `where`."""

    def __init__(self) -> None:
        self.where, self.events, self.heard = "", Counter(), False
        # Programs are compiled in several threads.
        self.lock = threading.Lock()

    def begin(self, where: str) -> None:
        import jax

        self.where, self.events = where, Counter()
        if not self.heard:
            jax.monitoring.register_event_duration_secs_listener(self._count)
            jax.monitoring.register_event_listener(self._count)
        self.heard = True

    def _count(self, event: str, *_: Any, **kwargs: Any) -> None:
        with self.lock:
            self.events[event] += 1

    def __str__(self) -> str:
        found = self.events["/jax/compilation_cache/cache_hits"]
        compiled = self.events["/jax/core/compile/backend_compile_duration"] - found
        where = f"{found} found in {self.where}" if self.where else "no compile cache"
        return f"programs: {compiled} compiled, {where}"


PROGRAMS = Programs()  # of this process


def keep_programs(wanted: bool, shared: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """Makes JAX keep what it compiles, in a folder that others cannot write. Raises InputError.

    shared: the folder of several processes, which may be in an object store; the first one writes.
    """
    import jax

    jax.config.update("jax_enable_compilation_cache", wanted)
    where, in_store = environ.get(VARIABLE, "") if wanted else "", "://" in shared
    if wanted and not where:
        try:
            name = f"{jax.__version__}{_processor(jax.default_backend())}"
            base = Path(shared) if shared else _base(environ)
            where = f"{shared}/{name}" if in_store else str(_made(base, name))
        except OSError as error:
            print(f"compile cache: {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            jax.config.update("jax_compilation_cache_dir", where)
            if in_store and "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in environ:
                # XLA's own files know no object store.
                jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # Small programs too.
    for limit in ("min_compile_time_secs", "min_entry_size_bytes"):
        if where and not in_store and f"JAX_PERSISTENT_CACHE_{limit.upper()}" not in environ:
            jax.config.update(f"jax_persistent_cache_{limit}", 0)
    PROGRAMS.begin(where)


def _base(environ: Mapping[str, str]) -> Path:
    given, home = Path(environ.get("XDG_CACHE_HOME", "")), Path(environ.get("HOME", "/"))
    return Path(given if given.is_absolute() else home / ".cache", "qwen3vl_jax")


def _processor(backend: str) -> str:
    """For a CPU, whose programs use its own instructions: a name of what it has."""
    if backend != "cpu":
        return ""
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    text = repr((os.uname().machine, known)).encode()
    return "-cpu-" + hashlib.blake2b(text, digest_size=4).hexdigest()


def _made(base: Path, name: str) -> Path:
    """The folder `name` in `base`, made where it is not; raises InputError where others can write it."""
    base.parent.mkdir(parents=True, exist_ok=True)
    for folder in (base, base / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        wrong = ""
        if not stat.S_ISDIR(found.st_mode):
            wrong = "which is a link"
        elif found.st_uid != os.geteuid():
            wrong = f"which belongs to another user ({found.st_uid})"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            wrong = f"which others can write (mode {stat.S_IMODE(found.st_mode):04o})"
        if wrong:
            expected = "expected a folder that you alone can write"
            advice = f"remove it, set {VARIABLE}, or give --no-compile-cache"
            raise InputError(f"compile cache: got {folder}, {wrong}, {expected}: {advice}")
    return base / name
