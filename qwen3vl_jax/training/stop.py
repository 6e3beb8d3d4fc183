"""SIGTERM as a flag that a run reads between two steps, and between two batches of an evaluation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Stopped(Exception):
    """An evaluation that SIGTERM cut short."""


class Stop:
    """Whether SIGTERM has asked the run to save and end."""

    asked = False

    def asked_at(self, step: int) -> bool:
        """Whether the run ends before the next step; of several processes all hear it at the same one."""
        if jax.process_count() > 1 and not self.asked:
            from jax.experimental import multihost_utils

            self.asked = multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def check(self) -> None:
        """Raises Stopped where it has."""
        if self.asked:
            raise Stopped


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Turns SIGTERM into a flag that the loop reads between two steps."""
    stop = Stop()
    if jax.process_count() > 1:
        yield stop  # jax.distributed hears of SIGTERM and tells the other processes
        return
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set a handler
        return

    def ask(*_: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
