"""What the run's machine is and holds: memory in use, what bit-equality depends on."""

from __future__ import annotations

import os
import platform as system
from typing import Any


def memory_gib(device: Any) -> float:
    """The most memory that was in use: the device's, or on a CPU the process's own."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    try:
        import resource

        unit = 1 if system.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    except ImportError:  # Windows
        return float("nan")


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def described() -> dict[str, Any]:
    """What must stay the same for a resumed run to be bit-identical."""
    import jax

    device = jax.local_devices()[0]
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "cores": cores() if device.platform == "cpu" else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def changes(then: dict[str, Any]) -> list[str]:
    """In what this machine differs from the one a checkpoint was written on."""
    now = described()
    return [
        f"{name} {then.get(name)} then, {now[name]} now"
        for name in now
        if now[name] != then.get(name)
    ]
