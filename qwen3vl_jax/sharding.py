"""Where a program runs. Modules know logical axis names only; the ambient mesh is read here."""

from __future__ import annotations

import jax


def platform() -> str:
    """cpu, gpu or tpu: that of the ambient mesh (jax.set_mesh), else of the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
