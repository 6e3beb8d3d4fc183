"""What libraries below Python write to stdout and stderr: noise is dropped, an abort can be one line."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

_HEAD = re.compile(rb"[IWEF]\d{4} ")
# Gloo's greeting, and XLA's alarm that a compile takes long.
_NOISE = re.compile(
    rb"\[Gloo\] Rank \d+ is connected|.*slow_operation_alarm\.cc|\*{32}$|.*Very slow compile\?"
    rb"|The operation took \d"
)
# What the coordination service says of a process that is gone, over several lines.
_LOST = re.compile(
    rb"[IWEF]\d{4} .*(coordination_service|preemption_sync_manager|JAX distributed service)"
)
_KEPT = 200  # lines that were dropped, for an abort that has another cause
_SOON = 0.2  # seconds
_handlers: list[object] = []  # of C, which Python would collect


class Filter:
    """Which lines of a library's output pass; `dropped` are the last that did not."""

    def __init__(self) -> None:
        self.dropped: deque[bytes] = deque(maxlen=_KEPT)
        self._inside = False

    def passes(self, line: bytes) -> bool:
        """Whether a line is to be shown."""
        if _HEAD.match(line):
            self._inside = bool(_LOST.match(line))
        if not (self._inside or _NOISE.match(line)):
            return True
        self.dropped.append(line)
        return False


def tidy_output(
    lost: Callable[[str], str] | None = None, code: int = 1, *, stdout: bool = True
) -> None:
    """Filters what libraries write to stdout and stderr from now on; Python's own lines pass as they are.

    lost: what to say where they abort the process, of their words, or "" for an abort as usual; it
    ends with `code` then. stdout: whether it is filtered too; readline edits lines of the real one alone.
    Call it once, in a program's main thread.
    """
    if stdout:
        _filtered(1, "stdout")
    errors, pipe, told = _filtered(2, "stderr")
    logging.basicConfig(format="%(message)s")
    if lost is None:
        return

    def aborted(_: int) -> None:
        # What was written just before is on its way through the thread.
        time.sleep(_SOON)
        os.set_blocking(pipe, False)
        words = b"".join(line + b"\n" for line in told.dropped)
        with contextlib.suppress(BlockingIOError):
            words += os.read(pipe, 1 << 16)
        if line := lost(words.decode(errors="replace")):
            os.write(errors, f"{line}\n".encode())
            os._exit(code)
        os.write(errors, words)

    # abort() runs a handler of C's in the thread that calls it; Python's own would never run.
    aborted_in_c = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _handlers.append(aborted_in_c)
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted_in_c)


def _filtered(number: int, name: str) -> tuple[int, int, Filter]:
    """Puts a pipe in an output's place; (where the output went, the pipe, its filter)."""
    stream = getattr(sys, name)
    stream.flush()
    kept, (reading, writing), told = os.dup(number), os.pipe(), Filter()
    os.dup2(writing, number)
    os.close(writing)
    options = {"encoding": stream.encoding, "errors": stream.errors}
    setattr(sys, name, open(kept, "w", buffering=1, closefd=False, **options))  # noqa: SIM115
    if number == 2:
        faulthandler.enable(kept)

    def pump() -> None:
        with open(reading, "rb", buffering=0) as file:
            rest = b""
            while piece := file.read(1 << 16):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if told.passes(line):
                        os.write(kept, line + b"\n")
            os.write(kept, rest)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()

    def end() -> None:
        os.dup2(kept, number)
        thread.join(1.0)

    atexit.register(end)
    return kept, reading, told
