"""Where a program runs: the mesh, and one table from logical axes to mesh axes.

Modules know logical axis names only. The ambient mesh (`jax.set_mesh`) is read here and nowhere
else; without one every function of this file is the identity, and the model runs on one device.
Dims as in layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwen3vl_jax.config import AXES, SHORT
from qwen3vl_jax.errors import InputError

# XLA otherwise cuts a product with a weight that lies cut along its inner axis into one a device, and
# adds each into the whole fp32 result in main memory: five times the traffic of a gathered weight.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# Logical axis -> the mesh axes that may cut it. An array's axis takes the largest set of them that is
# free and divides it; the axes of an array choose in the order of this table.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "rows": ("data", "fsdp", "expert"),  # of tokens
    "step_rows": ("data",),  # of a decode step: its tokens go to the weights
    "step_embed": ("fsdp", "expert", "sequence"),  # of their sums: tensor cuts what is summed
    "lookup_rows": ("data",),  # of tokens that are looked up in a table cut along embed
    "vision_rows": AXES,  # of patches: the ViT is data-parallel over every device
    "patches": ("sequence", "tensor"),  # of a row, where rows are fewer than devices
    "tokens": ("sequence",),  # inside a layer; keys and values are gathered
    "stream": ("sequence", "tensor"),  # tokens between two layers: arXiv 2205.05198
    # both
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert", "tensor"),
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "sequence", "tensor"),
    "router_embed": ("fsdp", "expert", "sequence"),  # by tensor, a decode step would wait for it
    "vision_embed": ("fsdp", "expert", "sequence", "tensor"),
    "vision_heads": (),  # the ViT's weights are cut along vision_embed, to save memory
    "vision_mlp": (),
    "expert_mlp": (),
}
# The axes of the second are taken before others: a device's patches are then of its own rows' pictures,
# and its process reads no other samples.
FIRST = {"vision_rows": "rows"}
MAX_REPLICATED = 64 << 20  # bytes of a parameter that may stay whole on every device
MAX_UNSHARDED = (
    1 / 4
)  # of the bytes of parameters that a mesh axis may cut, what it may leave uncut

Where = Mapping[str, tuple[str, ...]]  # the mesh axes of each logical axis of a call
Axes = Sequence[str | None]


def platform() -> str:
    """cpu, gpu or tpu: of the ambient mesh (jax.set_mesh), else the default device or backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    chosen = getattr(jax.config, "jax_default_device", None)  # a device, a platform's name, or None
    name = getattr(device, "platform", None) or getattr(chosen, "platform", chosen)
    name = name or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of AXES with `sizes` (axes left out are 1, one may be -1: all devices that are left).

    devices: None is all there are; a smaller mesh takes the first of them, in one process. Names are
    those of AXES or of SHORT. Slices of a TPU pod are told apart by the data axis alone. Raises
    InputError where sizes and devices do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _long_names(sizes)
    wanted = math.prod(sizes.values())
    if -1 not in sizes.values() and 0 < wanted < len(devices) and _run_here(devices):
        devices = devices[:wanted]
    shape = mesh_shape(sizes, len(devices))
    slices = slice_count(devices)
    if slices > 1:
        if shape[0] % slices:
            raise InputError(
                f"mesh.data is {shape[0]}, expected a multiple of the {slices} slices: only data goes "
                "over the network between them"
            )
        inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
        try:
            array = mesh_utils.create_hybrid_device_mesh(
                inner, outer, devices, allow_split_physical_axes=True
            )
        except (AssertionError, ValueError) as error:  # slices of different sizes
            raise InputError(
                f"mesh: {len(devices)} devices of {slices} slices make no mesh of {shape}; take all "
                f"devices of each: {' '.join(str(error).split())[:200]}"
            ) from None
    else:
        array = _arranged(shape, devices)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices of one slice by their links; in their own order where they fill no box of it."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, ValueError, NotImplementedError):  # by the kind of chip and of gap
        return np.array(devices, dtype=object).reshape(shape)


def _long_names(sizes: Mapping[str, int]) -> dict[str, int]:
    named = {SHORT.get(name, name): n for name, n in sizes.items()}
    if len(named) < len(sizes):
        raise InputError(f"mesh: an axis stands there twice in {dict(sizes)}")
    return named


def _run_here(devices: Sequence[Any]) -> bool:
    """Whether all are this process's own: another one would have no part in a program of a few."""
    return set(devices) <= set(jax.local_devices())


def slice_count(devices: Sequence[Any]) -> int:
    """How many slices, or hosts of GPUs, devices are in: only the network joins them."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def layout_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of AXES without devices, for what asks only where arrays would lie."""
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
    known = math.prod(n for n in asked if n != -1)
    left = [name for name, n in zip(AXES, asked) if n == -1]
    told = " x ".join(f"{name} {n}" for name, n in zip(AXES, asked) if n != 1) or "1"
    if known > count:
        raise InputError(f"mesh: {told} needs {known} devices, there are {count}")
    if len(left) > 1 or count % known or (not left and known != count):
        raise InputError(
            f"mesh: {told}, expected a product of {count}, the number of devices (one axis may be -1)"
        )
    return tuple(count // known if n == -1 else n for n in asked)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What `jax.jit` tells XLA of programs on a mesh; its names are those of one platform."""
    return dict(_TPU_OPTIONS) if mesh.devices.flat[0].platform == "tpu" else None


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh of these sizes can cut rows."""
    return math.prod(sizes.get(axis, 1) for axis in RULES["rows"])


def ambient_mesh() -> Mesh | None:
    """The mesh of `jax.set_mesh` with its devices; not to be asked for inside jit."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def mesh_sizes() -> dict[str, int]:
    """The ambient mesh's axes of more than one device; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else _sizes(mesh)


def _sizes(mesh: Any) -> dict[str, int]:
    return {name: n for name, n in mesh.shape.items() if n > 1}


def resolve_axes(named: Sequence[tuple[str | None, int]], sizes: Mapping[str, int]) -> Where:
    """Which mesh axes cut which logical axis, for (logical axis, size) pairs of one array or call.

    An axis that stands there more than once is cut so that each size divides.
    """
    wanted: dict[str, list[int]] = {}
    for name, size in named:
        if name is not None:
            wanted.setdefault(name, []).append(size)
    free, found = dict(sizes), {}
    for name in RULES:
        if name in wanted:
            found[name] = _cutters(name, free, wanted[name])
            for axis in found[name]:
                del free[axis]
    if unknown := wanted.keys() - RULES.keys():
        raise KeyError(f"logical axis {min(unknown)!r} has no rule")
    return found


def _cutters(name: str, free: Mapping[str, int], lengths: list[int]) -> tuple[str, ...]:
    """The free mesh axes that cut a logical axis of these lengths."""
    before = RULES.get(FIRST.get(name, ""), ())
    first = _largest([a for a in before if a in free], free, lengths)
    count = math.prod(free[a] for a in first)
    others = [a for a in RULES[name] if a in free and a not in before]
    return first + _largest(others, free, [n // count for n in lengths])


def _largest(axes: list[str], sizes: Mapping[str, int], lengths: list[int]) -> tuple[str, ...]:
    """The subset with the largest product that divides every length; of equal ones the first."""
    best, most = (), 1
    for bits in range(1, 1 << len(axes)):
        chosen = tuple(a for i, a in enumerate(axes) if bits >> i & 1)
        count = math.prod(sizes[a] for a in chosen)
        if count > most and not any(n % count for n in lengths):
            best, most = chosen, count
    return best


def spec(axes: Axes, where: Where) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names."""
    return PartitionSpec(*(where.get(name) or None if name else None for name in axes))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """x laid out over the ambient mesh by the logical names of its axes."""
    sizes = mesh_sizes()
    if not sizes:
        return x
    where = resolve_axes(list(zip(axes, x.shape, strict=True)), sizes)
    return jax.lax.with_sharding_constraint(x, spec(axes, where))


def on_shards(fn: Callable, where: Where, in_axes: Any, out_axes: Any, *args: Any) -> Any:
    """fn(*args), run by each device on its part of the arguments (`jax.shard_map`).

    where: of `mesh_axes_for`, which sees the sizes. in_axes, out_axes: a tuple of logical names for each
    argument and result; in place of one a PartitionSpec tree.
    """
    if not mesh_sizes():
        return fn(*args)

    def specs(axes: Any) -> Any:
        if type(axes) is not tuple:
            return axes
        named = all(a is None or isinstance(a, str) for a in axes)
        return spec(axes, where) if named else tuple(map(specs, axes))

    mapped = jax.shard_map(
        fn, in_specs=tuple(map(specs, in_axes)), out_specs=specs(out_axes), check_vma=False
    )
    return mapped(*args)


def compile_replicated(fn: Callable, *shapes: Any) -> None:
    """Compiles fn for arguments that every device of the ambient mesh has wholly.

    A program of its own, also when it is asked for while another one is traced, inside `on_shards` too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        jax.jit(fn).lower(*shapes).compile()
        return
    whole = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    with jax.sharding.use_abstract_mesh(whole):
        of_each = jax.shard_map(
            fn, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        jax.jit(of_each).lower(*shapes).compile()


def max_parts(name: str) -> int:
    """Into how many parts the ambient mesh can cut a logical axis."""
    sizes = mesh_sizes()
    return math.prod(sizes.get(axis, 1) for axis in RULES[name])


def mesh_axes_for(*named: tuple[str | None, int]) -> Where:
    """`resolve_axes` over the ambient mesh, for one call of `on_shards`."""
    return resolve_axes(named, mesh_sizes())


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def array_sharding(mesh: Mesh | AbstractMesh, axes: Axes, x: Any) -> NamedSharding:
    """The sharding of one array, or shape, by the logical names of its axes."""
    where = resolve_axes(list(zip(axes, x.shape, strict=True)), _sizes(mesh))
    return NamedSharding(mesh, spec(axes, where))


def shardings(
    mesh: Mesh | AbstractMesh | None, shapes: Mapping[str, Any], axes: Mapping[str, Axes]
) -> dict:
    """{name: NamedSharding} of parameters {name: shape and dtype} with the names of their axes.

    mesh None gives None for each. Raises InputError for a parameter over MAX_REPLICATED bytes that
    nothing cuts, though the mesh has axes for parameters.
    """
    if mesh is None:
        return dict.fromkeys(shapes)
    sizes, out = _sizes(mesh), {}
    for name, x in shapes.items():
        out[name] = array_sharding(mesh, axes[name], x)
        cutters = [a for a in RULES["embed"] if a in sizes]
        size = math.prod(x.shape) * np.dtype(x.dtype).itemsize
        if cutters and size > MAX_REPLICATED and out[name].is_fully_replicated:
            raise InputError(
                f"{name} {list(x.shape)}: {size >> 20} MiB would stay whole on every device, since "
                f"{', '.join(f'{a} = {sizes[a]}' for a in cutters)} divides none of its axes "
                f"{list(axes[name])}; take smaller ones and a larger mesh.data"
            )
    return out


def check_divides(
    mesh: Mesh | AbstractMesh | None, shapes: Mapping[str, Any], axes: Mapping[str, Axes]
) -> None:
    """Raises InputError for an axis of the mesh that leaves more than MAX_UNSHARDED of a whole model uncut.

    shapes and axes are those of `shardings`. The largest parameter that the axis does not divide is named.
    """
    sizes = {} if mesh is None else _sizes(mesh)
    size = {n: math.prod(x.shape) * np.dtype(x.dtype).itemsize for n, x in shapes.items()}
    may = {n: {a for name in axes[n] if name for a in RULES[name]} for n in shapes}
    cut = {
        n: {a for cutters in resolve_axes(list(zip(axes[n], x.shape, strict=True)), sizes).values()
            for a in cutters}
        for n, x in shapes.items()
    }  # fmt: skip
    for axis, count in sizes.items():
        asked = [n for n in shapes if axis in may[n]]
        uncut = [n for n in asked if axis not in cut[n]]
        left, all_of_them = (sum(size[n] for n in names) for names in (uncut, asked))
        if left > MAX_UNSHARDED * all_of_them:
            name = max(uncut, key=lambda n: size[n])
            raise InputError(
                f"{name} {list(shapes[name].shape)}: {axis} = {count} divides none of its axes "
                f"{list(axes[name])} that are left to it, and would leave {left / all_of_them:.0%} "
                "of the parameters whole; take a size that divides them, and a larger mesh.data"
            )
