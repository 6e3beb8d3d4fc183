"""The mesh of inference: as asked, or chosen for a model larger than one device."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.device_load import Source, weights_bytes
from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.device_mesh import layout_mesh, make_mesh
from qwen3vl_jax.errors import InputError

# The part of a device's memory for weights; the cache and images need the rest.
ROOM = 0.85


def mesh_for(
    asked: Mapping[str, int] | None, source: Source, dtype: Any, devices: list[Any]
) -> Mesh | None:
    """The asked mesh, or one for a model larger than a device; None if one device is enough.

    asked: sizes of axes; one may be -1 for all devices. Raises InputError for a model that does not fit.
    """
    mesh = make_mesh(chosen(source, dtype, devices) if asked is None else asked, devices)
    return mesh if mesh.size > 1 else None


def chosen(source: Source, dtype: Any, devices: list[Any]) -> dict[str, int]:
    """Sizes of axes for a model larger than one device, {} for others. Raises InputError."""
    limit = bytes_limit(devices[0])
    if not limit or len(devices) == 1:
        return {}
    if (needed := weights_bytes(source, dtype)) <= ROOM * limit:
        return {}
    sizes = auto_mesh(source.cfg.text, len(devices))
    count = math.prod(sizes.values())
    held = weights_bytes(source, dtype, layout_mesh(sizes))
    each = f"{held / 2**30:.1f} GiB"
    message = f"{needed / 2**30:.1f} GiB of weights, devices of {limit / 2**30:.1f} GiB"
    if held > ROOM * limit:
        few = f"of which this host has {len(devices)}: too few, {count} of them would hold {each} each"
        advice = "take --weights int8 or int4, --dtype bfloat16 or a smaller checkpoint"
        raise InputError(f"{source.directory}: {message}, {few}; {advice}")
    mesh = ",".join(f"{name}={n}" for name, n in sizes.items())
    message += f": spread over {count} devices, --mesh {mesh}, {each} on each"
    print(message, file=sys.stderr)
    return sizes


def bytes_limit(device: Any) -> int:
    """Bytes that a device has for arrays; 0 where it does not say, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def auto_mesh(cfg: TextConfig, count: int) -> dict[str, int]:
    """Sizes of axes that shard a model evenly over at most `count` devices: tensor first, for the cache."""
    found: list[tuple[int, int, str]] = []
    for used in range(1, count + 1):
        tensor = math.gcd(used, cfg.num_key_value_heads)
        rest = used // tensor
        if cfg.num_experts and cfg.num_experts % rest == 0:
            found.append((tensor, rest, "expert"))
        elif cfg.hidden_size % rest == 0:
            found.append((tensor, rest, "fsdp"))
    tensor, rest, name = max(found)
    return {axis: n for axis, n in ((name, rest), ("tensor", tensor)) if n > 1}
