"""The mesh of devices, and the shardings of a model's parameters on it (rules: model/sharding.py)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwen3vl_jax.config import AXES, SHORT
from qwen3vl_jax.errors import InputError, one_line
from qwen3vl_jax.model.sharding import RULES, Axes, mesh_axes_for, mesh_sizes, spec_of

# The largest parameter, in bytes, that every device may hold whole.
MAX_REPLICATED = 64 << 20
# The largest part of the bytes that a mesh axis could shard that it may leave unsharded.
MAX_UNSHARDED = 1 / 4
# XLA otherwise splits a product whose weight is sharded along its inner axis into one per device and
# adds each into the fp32 result in main memory: five times the traffic of gathering the weight.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Weight gathers and gradient reductions of a training step, for which XLA otherwise waits. A chip with
# SparseCores moves the bytes there. A v5e fuses an exchange with a product that runs meanwhile; libtpu
# 0.0.50 refuses that on other chips, where it may hang or compute wrong numbers.
_GATHER_ON_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}
_REDUCE_ON_SPARSE_CORE = {
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_all_reduce_offload_tracing": "true",
}
_FUSED = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_enable_async_all_reduce": "true",
}
# By jax's device_kind. Bytes that move while the chip computes, 8B, fsdp=16, 16 rows of 8,192 (libtpu
# 0.0.42): v6e 99.9 %, v5p 65 %, v5e (rows of 2,048) 52 %; without the options none.
_OVERLAP = {
    "TPU v5 lite": _FUSED,
    # Its compiler sends no all-gather to the SparseCores.
    "TPU v5": _REDUCE_ON_SPARSE_CORE,
    "TPU v5p": _REDUCE_ON_SPARSE_CORE,
    "TPU v6 lite": _GATHER_ON_SPARSE_CORE | _REDUCE_ON_SPARSE_CORE,
    "TPU7x": _GATHER_ON_SPARSE_CORE | _REDUCE_ON_SPARSE_CORE,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of AXES with `sizes`, by names of AXES or SHORT.

    An axis left out is 1; one may be -1 and takes the devices that are left. devices: None is all; in
    one process a smaller mesh takes the first of them. Only the data axis crosses slices of a TPU pod.
    Raises InputError where sizes and devices do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    given, sizes = sizes, {SHORT.get(name, name): n for name, n in sizes.items()}
    if len(sizes) < len(given):
        raise InputError(f"mesh: an axis stands there twice in {dict(given)}")
    wanted = math.prod(sizes.values())
    local = set(devices) <= set(jax.local_devices())
    if -1 not in sizes.values() and 0 < wanted < len(devices) and local:
        devices = devices[:wanted]
    shape = mesh_shape(sizes, len(devices))
    return Mesh(_arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices by their links; several slices are joined along the data axis.

    Devices of one slice keep their own order if they fill no box of it. Raises InputError for slices that
    make no such mesh.
    """
    split, slices = {"allow_split_physical_axes": True}, slice_count(devices)
    if slices == 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices, **split)
        # Which one depends on the chip and on the gap.
        except (AssertionError, ValueError, NotImplementedError):
            return np.array(devices, dtype=object).reshape(shape)
    if shape[0] % slices:
        expected = f"expected a multiple of the {slices} slices"
        why = "only data goes over the network between them"
        raise InputError(f"mesh.data is {shape[0]}, {expected}: {why}")
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
    try:
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
    except (AssertionError, ValueError) as error:  # slices of different sizes
        found = f"{len(devices)} devices of {slices} slices make no mesh of {shape}"
        why = f"take all devices of each: {one_line(error)[:200]}"
        raise InputError(f"mesh: {found}; {why}") from None


def slice_count(devices: Sequence[Any]) -> int:
    """Number of slices (hosts, for GPUs) of the devices: only the network joins them."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def layout_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of AXES without devices, to compute shardings."""
    shape = tuple(sizes.get(name, 1) for name in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """The sizes of AXES for `count` devices. Raises InputError where they do not fit."""
    for name, n in sizes.items():
        if name not in AXES:
            raise InputError(f"mesh.{name}: unknown axis; known: {', '.join(AXES)}")
        if n != -1 and n < 1:
            raise InputError(f"mesh.{name} is {n}, expected a number from 1, or -1")
    asked = [sizes.get(name, 1) for name in AXES]
    known, free = math.prod(n for n in asked if n != -1), asked.count(-1)
    shown = " x ".join(f"{name} {n}" for name, n in zip(AXES, asked) if n != 1) or "1"
    if known > count:
        raise InputError(f"mesh: {shown} needs {known} devices, there are {count}")
    if free > 1 or count % known or (not free and known != count):
        expected = f"sizes that multiply to {count}, the number of devices"
        raise InputError(f"mesh: {shown}, expected {expected} (one axis may be -1)")
    return tuple(count // known if n == -1 else n for n in asked)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """XLA options of a training step on a mesh; their names exist on one platform only."""
    chip = mesh.devices.flat[0]
    return _TPU_OPTIONS | _OVERLAP.get(chip.device_kind, {}) if chip.platform == "tpu" else None


def shardings(
    mesh: Mesh | AbstractMesh | None, shapes: Mapping[str, Any], axes: Mapping[str, Axes]
) -> dict:
    """{name: NamedSharding} of parameters {name: array or ShapeDtypeStruct} with their logical axes.

    mesh None gives None for each. Raises InputError for a parameter over MAX_REPLICATED bytes that
    stays whole on a mesh that has axes for parameters.
    """
    if mesh is None:
        return dict.fromkeys(shapes)
    sizes, out = mesh_sizes(mesh), {}
    usable = [a for a in RULES["embed"] if a in sizes]
    for name, x in shapes.items():
        out[name] = array_sharding(mesh, axes[name], x)
        size = _bytes(x)
        if usable and size > MAX_REPLICATED and out[name].is_fully_replicated:
            whole = f"{size >> 20} MiB would stay whole on every device"
            counts = ", ".join(f"{a} = {sizes[a]}" for a in usable)
            why = f"since {counts} divides none of its axes {list(axes[name])}"
            advice = "take smaller ones and a larger mesh.data"
            raise InputError(f"{name} {list(x.shape)}: {whole}, {why}; {advice}")
    return out


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize


def check_divides(
    mesh: Mesh | AbstractMesh | None, shapes: Mapping[str, Any], axes: Mapping[str, Axes]
) -> None:
    """Raises InputError for a mesh axis that leaves too much of a whole model unsharded.

    Too much is MAX_UNSHARDED of the bytes that RULES let it shard. shapes and axes: as in `shardings`.
    The message names the largest parameter that the axis does not divide.
    """
    sizes, used = {} if mesh is None else mesh_sizes(mesh), {}
    for name, x in shapes.items():
        found = mesh_axes_for(*zip(axes[name], x.shape, strict=True), sizes=sizes)
        used[name] = {axis for mesh_axes in found.values() for axis in mesh_axes}
    for axis, count in sizes.items():
        allowed = [n for n in shapes if any(axis in RULES[a] for a in axes[n] if a)]
        missed = [n for n in allowed if axis not in used[n]]
        left, total = (sum(_bytes(shapes[n]) for n in names) for names in (missed, allowed))
        if left > MAX_UNSHARDED * total:
            name = max(missed, key=lambda n: _bytes(shapes[n]))
            none = f"{axis} = {count} divides none of its axes {list(axes[name])}"
            whole = f"would leave {left / total:.0%} of the parameters whole"
            advice = "take a size that divides them, and a larger mesh.data"
            why = f"{none} that are left to it, and {whole}; {advice}"
            raise InputError(f"{name} {list(shapes[name].shape)}: {why}")


def array_sharding(mesh: Mesh | AbstractMesh, axes: Axes, x: Any) -> NamedSharding:
    """The sharding of one array or ShapeDtypeStruct with these logical axes."""
    return NamedSharding(mesh, spec_of(axes, x, mesh_sizes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
