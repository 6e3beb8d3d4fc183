"""One table from logical axes to mesh axes. Dims as in layers.py; device_mesh.py makes the mesh.

Modules name logical axes only. The ambient mesh (`jax.set_mesh`) is read here and nowhere else;
without one every function of this file is the identity and the model runs on one device.

RULES says which mesh axes may shard a logical axis. An array chooses for its axes in the order of
the table: each takes the largest subset of its mesh axes that divides its size and that no earlier
axis of the same array has taken. For example, on a mesh of fsdp=4, tensor=2 the weight qkv
[K G+2 H D] has the logical axes ("kv_heads", None, None, "embed"):

    kv_heads  may take tensor.                            K = 8 is divisible by 2: tensor.
    embed     may take fsdp, expert, sequence, tensor.    tensor is taken, D % 4 = 0: fsdp.

    PartitionSpec("tensor", None, None, "fsdp"): each of the 8 devices holds 1/8.

With K = 1, tensor would not divide kv_heads, and embed would take both. Change a row to shard otherwise.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec

from qwen3vl_jax.config import AXES

# A logical axis and the mesh axes that may shard it; earlier rows choose first.
RULES: dict[str, tuple[str, ...]] = {
    # Activations
    "batch": ("data", "fsdp", "expert"),
    # A decode step, whose few tokens go to the weights, and the channels of its sums
    "decode_batch": ("data",),
    "decode_embed": ("fsdp", "expert", "sequence"),
    # Tokens that are looked up in a table sharded along embed
    "lookup_batch": ("data",),
    # The ViT is data-parallel over every device; patches are for fewer rows than devices.
    "vision_batch": AXES,
    "patches": ("sequence", "tensor"),
    # Tokens inside a layer; keys and values are gathered (context parallelism).
    "tokens": ("sequence",),
    # Tokens of the residual between layers: sequence parallelism, arXiv 2205.05198
    "residual": ("sequence", "tensor"),
    # Activations and parameters
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert", "tensor"),
    # Parameters
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "sequence", "tensor"),
    # Not tensor: a decode step would wait for the router's sum.
    "router_embed": ("fsdp", "expert", "sequence"),
    # The ViT's weights are sharded along this axis only, to save memory.
    "vision_embed": ("fsdp", "expert", "sequence", "tensor"),
    "vision_heads": (),
    "vision_mlp": (),
    "expert_mlp": (),
}
# Logical axis -> the mesh axes that shard it, in one array or call.
MeshAxes = Mapping[str, tuple[str, ...]]
# The logical axes of an array; None: not sharded.
Axes = Sequence[str | None]


def platform() -> str:
    """cpu, gpu or tpu: of the ambient mesh, else of the default device or backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    # A device, a platform's name, or None.
    default = getattr(jax.config, "jax_default_device", None)
    name = getattr(device, "platform", None) or getattr(default, "platform", default)
    name = name or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def jit_wide(fn: Callable, static_argnames: Any) -> Any:
    """jax.jit(fn) for products of many rows; on a GPU compiled with cuBLAS alone, unless traced.

    Triton's kernels are no faster there, and XLA tries dozens a product, two thirds of its time.
    """
    jit = functools.partial(jax.jit, fn, static_argnames=static_argnames)
    plain, cublas = jit(), jit(compiler_options={"xla_gpu_enable_triton_gemm": False})

    def call(*args):
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
        return (plain if traced or platform() != "gpu" else cublas)(*args)

    return functools.update_wrapper(cast(Any, call), plain)


def mesh_sizes(mesh: Any = None) -> dict[str, int]:
    """The axes of more than one device of a mesh, by default the ambient one; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return {name: n for name, n in mesh.shape.items() if n > 1}


def max_parts(name: str, sizes: Mapping[str, int] | None = None) -> int:
    """The most parts that a mesh of these sizes (None: the ambient mesh) splits a logical axis into."""
    sizes = mesh_sizes() if sizes is None else sizes
    return math.prod(sizes.get(axis, 1) for axis in RULES[name])


def mesh_axes_for(*named: tuple[str | None, int], sizes: Any = None) -> MeshAxes:
    """The mesh axes of each logical axis, from the (logical axis, size) pairs of one array or call.

    A logical axis that is named more than once gets mesh axes that divide each of its sizes. sizes: of
    the mesh, None for the ambient one.
    """
    lengths: dict[str, list[int]] = {}
    for name, size in named:
        if name is not None:
            lengths.setdefault(name, []).append(size)
    if unknown := lengths.keys() - RULES.keys():
        raise KeyError(f"logical axis {min(unknown)!r} has no rule")
    free, found = dict(mesh_sizes() if sizes is None else sizes), {}
    for name in RULES:
        if name in lengths:
            found[name] = _choose_axes(name, free, lengths[name])
            for axis in found[name]:
                del free[axis]
    return found


def _choose_axes(name: str, free: Mapping[str, int], lengths: list[int]) -> tuple[str, ...]:
    """The free mesh axes that shard a logical axis of these lengths."""
    # Those of batch first: each device encodes the images of its own sequences.
    preferred = RULES["batch"] if name == "vision_batch" else ()
    first = _largest([a for a in preferred if a in free], free, lengths)
    count = math.prod(free[a] for a in first)
    others = [a for a in RULES[name] if a in free and a not in preferred]
    return first + _largest(others, free, [n // count for n in lengths])


def _largest(axes: list[str], sizes: Mapping[str, int], lengths: list[int]) -> tuple[str, ...]:
    """The first subset with the largest product that divides every length."""
    best, most = (), 1
    for bits in range(1, 1 << len(axes)):
        subset = tuple(a for i, a in enumerate(axes) if bits >> i & 1)
        count = math.prod(sizes[a] for a in subset)
        if count > most and not any(n % count for n in lengths):
            best, most = subset, count
    return best


def spec(axes: Axes, where: MeshAxes) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(where.get(name) or None if name else None for name in axes))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains x to the sharding of its logical axes on the ambient mesh."""
    if sizes := mesh_sizes():
        return jax.lax.with_sharding_constraint(x, spec_of(axes, x, sizes))
    return x


def spec_of(axes: Axes, x: Any, sizes: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of one array or its shape on a mesh of these sizes."""
    return spec(axes, mesh_axes_for(*zip(axes, x.shape, strict=True), sizes=sizes))


def on_shards(fn: Callable, in_specs: Any, out_specs: Any, *args: Any) -> Any:
    """fn(*args) on each device's shard of the arguments (`jax.shard_map`). Specs are those of `spec`."""
    if not mesh_sizes():
        return fn(*args)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def compile_replicated(fn: Callable, *shapes: Any) -> None:
    """Compiles fn for replicated arguments as its own program, also while another one is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        jax.jit(fn).lower(*shapes).compile()
        return
    everywhere = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    auto = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    with jax.sharding.use_abstract_mesh(auto):
        jax.jit(jax.shard_map(fn, **everywhere)).lower(*shapes).compile()
