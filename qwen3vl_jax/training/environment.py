"""The machine of a run: memory in use, and what two runs need to be equal to the last bit.

jax is imported inside functions: XLA's flags must be set before it starts.
"""

import os
import platform as system
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

# No kernels that add in any order (scatter, cuDNN's backward pass), and no autotuning: which kernel
# is fastest can change from process to process.
FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")
COST = (
    "deterministic: on a GPU no kernel is chosen by measurement and sums have a fixed order. Matrix "
    "products were at most 4 % slower on an H100; scatters and attention can lose more. Results still "
    "change with the card, the number of cards and the versions of jax and its libraries. A CPU or a "
    "TPU needs nothing: there the same number of cores or chips gives the same bits."
)


def memory_gib(device: Any) -> float:
    """Peak memory in GiB: of the device, or of the process on a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    # Windows has no such module.
    with suppress(ImportError):
        import resource

        unit = 1 if system.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return float("nan")


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """What must not change for a resumed run to be bit-identical, as JSON data."""
    import jax

    device = jax.local_devices()[0]
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "cores": cores() if device.platform == "cpu" else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def make_deterministic(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets the XLA_FLAGS with which a GPU's results repeat bit for bit; other flags stay.

    Call it before jax finds its devices. Source: openxla.org/xla/determinism.
    """
    names = {flag.partition("=")[0] for flag in FLAGS}
    flags = environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if flag.partition("=")[0] not in names]
    environ["XLA_FLAGS"] = " ".join([*kept, *FLAGS])
