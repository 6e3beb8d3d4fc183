"""SIGTERM and Ctrl-C as a flag that a run reads between two steps, and between evaluation batches."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_SAVING = "stopping: what was done is saved first; Ctrl-C again ends at once"
_ENDED = "interrupted: the same command goes on from the last checkpoint"
_SHOW_CURSOR = "\x1b[?25h"


class Stopped(Exception):
    """An evaluation that a signal cut short."""


class Stop:
    """What has asked the run to save and end: "", "SIGTERM" or "Ctrl-C"."""

    asked = ""
    # Before the first step there is nothing to save, and Ctrl-C ends the run as it ends any program.
    under_way = False

    def asked_at(self, step: int) -> bool:
        """Whether the run ends before the next step; of several processes all hear it at the same one."""
        self.under_way = True
        if jax.process_count() > 1 and not self.asked:
            from jax.experimental import multihost_utils

            self.asked = "SIGTERM" * multihost_utils.reached_preemption_sync_point(step)
        return bool(self.asked)

    def check(self) -> None:
        """Raises Stopped where something has."""
        if self.asked:
            raise Stopped


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Turns SIGTERM, and Ctrl-C once steps are under way, into a flag that the loop reads.

    A second Ctrl-C ends the process at once, also while it compiles. Raises KeyboardInterrupt at the end
    where the first stopped the run; of several processes it is a SIGTERM, which all of them hear.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set a handler
        return
    several = jax.process_count() > 1

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT and not stop.under_way:
            raise KeyboardInterrupt
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.asked = stop.asked or ("Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    # jax.distributed hears of SIGTERM itself.
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, ask) for number in numbers}
    with _second_ctrl_c_ends(stop):
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if stop.asked == "Ctrl-C":
        raise KeyboardInterrupt


@contextmanager
def _second_ctrl_c_ends(stop: Stop) -> Iterator[None]:
    """Counts Ctrl-C in a thread: the main one hears of signals only between calls into jax."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def count() -> None:
        seen = 0
        while data := reading.recv(64):
            for _ in range(data.count(signal.SIGINT)):
                seen += 1
                if seen == 1 and stop.under_way:
                    _tell(_SAVING)
                elif seen > 1:
                    _tell((_SHOW_CURSOR if sys.stderr.isatty() else "") + _ENDED)
                    os._exit(130)

    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()
        thread.join()
        reading.close()


def _tell(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
