"""What the run's machine can do and holds: peak FLOP/s, memory in use, what bit-equality depends on."""

from __future__ import annotations

import os
import platform as system
from typing import Any

# Dense bf16 TFLOP/s of one device, from the vendors' data sheets, by a part of JAX's device_kind.
# The first that the kind holds counts, so longer names stand before shorter ones.
PEAKS = (
    ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("GH200", 989.0), ("B200", 2250.0),
    ("A100", 312.0), ("L40S", 362.0), ("L4", 121.0), ("4090", 165.0), ("TPU v6", 918.0),
    ("TPU v5 lite", 197.0), ("TPU v5e", 197.0), ("TPU v5", 459.0), ("TPU v4", 275.0),
)  # fmt: skip


def peak_tflops(kind: str) -> float | None:
    """bf16 TFLOP/s of a device by JAX's name for it, None for one that is not in the table."""
    return next((peak for name, peak in PEAKS if name.lower() in kind.lower()), None)


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
