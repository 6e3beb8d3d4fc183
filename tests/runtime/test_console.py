"""The clock that knows compiling, and the line that says what a command is doing."""

import sys
import threading
import time

import pytest

from qwen3vl_jax.runtime.console import Clock, Status


def test_time_of_compiling_is_counted_once_and_of_this_thread_alone():
    """An inner trace lies within its outer one; what another thread compiles takes no time here."""
    clock, event = Clock(), "/jax/core/compile/jaxpr_trace_duration"
    time.sleep(0.05)
    clock._heard(event, 0.01)
    clock._heard(event, 0.04)
    clock._heard("/jax/other", 5.0)
    other = threading.Thread(target=clock._heard, args=(event, 5.0))
    other.start()
    other.join()
    assert clock.compiling == pytest.approx(0.04)
    first = clock.lap()
    assert 0.005 < first < 1
    time.sleep(0.02)
    clock._heard(event, 0.01)
    assert clock.compiling == pytest.approx(0.05)
    assert 0.005 < clock.lap() < 1


def test_a_running_spinner_says_the_next_step_in_place(monkeypatch):
    """One spinner from the first step to the last."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Status() as status:
        status.show("loading")
        spinner = status._spinner
        status.show("compiling")
        assert status._spinner is spinner and str(spinner.status) == "compiling"
