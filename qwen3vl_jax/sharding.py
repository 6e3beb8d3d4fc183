"""Where a program runs. Modules know logical axis names only; the ambient mesh is read here."""

from __future__ import annotations

import jax


def platform() -> str:
    """cpu, gpu or tpu: of the ambient mesh (jax.set_mesh), else the default device or backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    chosen = getattr(jax.config, "jax_default_device", None)  # a device, a platform's name, or None
    name = getattr(device, "platform", None) or getattr(chosen, "platform", chosen)
    name = name or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
