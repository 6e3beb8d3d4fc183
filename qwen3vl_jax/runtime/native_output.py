"""Filters what C++ libraries write to stdout and stderr: drops noise, turns an abort into one line."""

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
# Gloo's greetings, which its threads may write into one line, and XLA's alarm of a long compile.
_NOISE = re.compile(
    rb".*\[Gloo\] Rank |.* is connected to \d+ peer ranks"
    rb"|.*slow_operation_alarm\.cc|\*{32}$|.*Very slow compile\?|The operation took \d"
)
# The coordination service's report of a process that is gone, over several lines.
_LOST = re.compile(
    rb"[IWEF]\d{4} .*(coordination_service|preemption_sync_manager|JAX distributed service)"
)
_REMEMBERED = 200  # dropped lines, printed after an abort of another cause
_DELAY = 0.2  # seconds in which the last lines come through the thread
_handlers: list[object] = []  # C's, which Python would collect


def tidy_output(
    lost: Callable[[str], str] | None = None, code: int = 1, *, stdout: bool = True
) -> None:
    """Filters what libraries write to stdout and stderr from now on; call it once, in the main thread.

    lost: gives the line to print when a library aborts the process, made of its output, and `code` is
    the exit code then; "" leaves the abort as it is. stdout: False where readline needs the real one.
    """
    if stdout:
        _filtered(1, "stdout")
    errors, pipe, dropped = _filtered(2, "stderr")
    logging.basicConfig(format="%(message)s")
    if lost is None:
        return

    def aborted(_: int) -> None:
        time.sleep(_DELAY)
        os.set_blocking(pipe, False)
        words = b"".join(line + b"\n" for line in dropped)
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


def _filtered(number: int, name: str) -> tuple[int, int, deque[bytes]]:
    """Replaces an output by a pipe; gives (the original output, the pipe, the last lines dropped)."""
    stream, dropped = getattr(sys, name), deque[bytes](maxlen=_REMEMBERED)
    stream.flush()
    original, (reading, writing) = os.dup(number), os.pipe()
    os.dup2(writing, number)
    os.close(writing)
    options = {"encoding": stream.encoding, "errors": stream.errors}
    setattr(sys, name, open(original, "w", buffering=1, closefd=False, **options))  # noqa: SIM115
    if number == 2:
        faulthandler.enable(original)

    def pump() -> None:
        with open(reading, "rb", buffering=0) as file:
            rest, inside = b"", False
            while piece := file.read(1 << 16):
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    if _HEAD.match(line):
                        inside = bool(_LOST.match(line))
                    if inside or _NOISE.match(line):
                        dropped.append(line)
                    else:
                        os.write(original, line + b"\n")
            os.write(original, rest)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()

    def end() -> None:
        os.dup2(original, number)
        thread.join(1.0)

    atexit.register(end)
    return original, reading, dropped
