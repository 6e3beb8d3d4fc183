"""What bit-equality of two runs needs. No jax in here: the flags must be set before it starts."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Kernels that add in any order (scatter, cuDNN's backward pass) are left out; XLA also stops
# choosing kernels by measuring them, which could end differently in the next process.
FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")
COST = (
    "deterministic: on a GPU no kernel is chosen by measurement and sums have a fixed order. Matrix "
    "products were at most 4 % slower on an H100; scatters and attention can lose more. Results still "
    "change with the card, the number of cards and the versions of jax and its libraries. A CPU or a "
    "TPU needs nothing: there the same number of cores or chips gives the same bits."
)


def deterministic_flags(flags: str = "") -> str:
    """The value of XLA_FLAGS with what makes a GPU's results the same in each run.

    flags: the value so far, whose other flags stay; what contradicts is replaced. On a CPU or a TPU
    the flags change nothing. Source: openxla.org/xla/determinism.
    """
    names = {flag.partition("=")[0] for flag in FLAGS}
    kept = [flag for flag in flags.split() if flag.partition("=")[0] not in names]
    return " ".join([*kept, *FLAGS])


def make_deterministic(environ: MutableMapping[str, str] | None = None) -> None:
    """Sets XLA_FLAGS of this process. Call it before jax meets a device."""
    environ = os.environ if environ is None else environ
    environ["XLA_FLAGS"] = deterministic_flags(environ.get("XLA_FLAGS", ""))
