"""How processes that run as one begin and end, without starting any."""

import pytest

from qwen3vl_jax import processes


def test_none_ends_before_the_slowest(monkeypatch):
    """JAX aborts a process that has ended more than the heartbeat before another."""
    done = []
    monkeypatch.setattr(processes, "wait_for_all", done.append)
    assert processes.end_together(lambda: done.append("run") or 3) == 3
    assert done == ["run", "end"]
    with pytest.raises(ZeroDivisionError):
        processes.end_together(lambda: 1 // 0)
    assert done == ["run", "end"]
