"""Expert parallelism: tokens to the devices of their experts and back. Dims as in layers.py; n tokens.

All-gather the tokens over the expert axis, run the local experts on all of them, reduce-scatter the
outputs. On up to A devices this moves no more bytes than an all-to-all, whatever the router chooses.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.model.lora import Adapted
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.model.sharding import MeshAxes, mesh_axes_for, mesh_sizes, on_shards, spec


class ExpertParallel(NamedTuple):
    """Layout of one MoE layer's tokens and experts on the mesh (everything local without a mesh).

    Where D is sharded, weights are gathered for whole sequences; the few tokens of a decode step go to
    every slice of a weight instead, and the partial products are summed (`partial`).
    """

    batch: str  # the logical axis of B
    tokens: MeshAxes  # of B and T
    weights: MeshAxes  # of expert and embed
    experts: int
    sizes: dict[str, int]
    partial: bool  # each device multiplies with its slice of D

    @classmethod
    def of(cls, shape: tuple[int, ...], gate_up: Any, down: Any) -> "ExpertParallel":
        """The layout for tokens of this shape [B T D] and weights of `lora.expert_leaves`."""
        experts, sizes = gate_up.shape[0], mesh_sizes()
        weights = mesh_axes_for(("expert", experts), ("embed", shape[2]))
        parts = math.prod(sizes[a] for a in weights["embed"])
        held = gate_up, down
        equal = jax.tree.map(lambda x, i: i < 0 or x.shape[i] % parts == 0, held, _embed_axes(held))
        partial = shape[1] == 1 < parts and all(jax.tree.leaves(equal))
        batch = "decode_batch" if shape[1] == 1 else "batch"
        tokens = mesh_axes_for((batch, shape[0]), ("residual", shape[1]))
        return cls(batch, tokens, weights, experts, sizes, partial)

    @property
    def shards(self) -> int:
        """Number of shards of the experts."""
        return math.prod(self.sizes[a] for a in self.weights["expert"])

    @property
    def first_expert(self) -> Any:
        """Index of this device's first expert."""
        axes = self.weights["expert"]
        return jax.lax.axis_index(axes) * (self.experts // self.shards) if axes else 0

    @property
    def _gather_axes(self) -> tuple[str, ...]:
        """The expert axes that shard the tokens too; along the others every device has all tokens."""
        used = {a for axes in self.tokens.values() for a in axes}
        return tuple(a for a in self.weights["expert"] if a in used)

    def on_shards(self, fn: Callable, tokens: Any, weights: Any) -> jax.Array:
        """fn(tokens, weights) on each device: arrays [B T ..], the first one [B T D] -> [B T D]."""
        where = {**self.tokens, "embed": self.weights["embed"]}
        hidden = spec((self.batch, "residual", "embed" if self.partial else None), where)
        others = spec((self.batch, "residual", None), where)

        def spec_of(x: jax.Array, axis: int) -> Any:
            named = {0: "expert", axis: "embed"}
            return spec([named.get(i) for i in range(x.ndim)], self.weights)

        held = jax.tree.map(spec_of, weights, _embed_axes(weights, values_only=not self.partial))
        in_specs = ((hidden, *(others for _ in tokens[1:])), held)
        return on_shards(fn, in_specs, hidden, tokens, weights)

    def all_gather_tokens(self, tokens: Any) -> Any:
        """Arrays [b t ..] of this device -> [n ..] with the tokens of all devices of the expert axes."""
        axes = self._gather_axes

        def of(x: jax.Array) -> jax.Array:
            x = x.reshape(-1, *x.shape[2:])
            return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x

        return jax.tree.map(of, tokens)

    def all_gather_weights(self, weights: Any, dtype: Any) -> Any:
        """This device's experts with all of D, cast to dtype first; if `partial`, with its slice of D."""
        axes = self.weights["embed"]
        if self.partial or not axes:
            return weights

        def of(x: jax.Array, axis: int) -> jax.Array:
            # Quantized values, of 8 bits or fewer, are not cast.
            sent = dtype if x.dtype.itemsize > 1 else x.dtype
            return x if axis < 0 else _all_gather(x, axes, axis, sent)

        return jax.tree.map(of, weights, _embed_axes(weights, values_only=True))

    def psum_embed(self, y: jax.Array) -> jax.Array:
        """A product over D, summed over the devices that each hold a slice of D."""
        return jax.lax.psum(y, self.weights["embed"]) if self.partial else y

    def reduce_scatter_tokens(self, out: jax.Array) -> jax.Array:
        """Sums outputs [n D] over the experts' devices; each device keeps its own tokens [b*t D]."""
        axes = self._gather_axes
        copied = tuple(a for a in self.weights["expert"] if a not in axes)
        out = jax.lax.psum(out, copied) if copied else out
        return jax.lax.psum_scatter(out, axes, scatter_dimension=0, tiled=True) if axes else out


def _embed_axes(weights: Any, values_only: bool = False) -> Any:
    """Trees like gate_up [E D 2M] and down [E M D] with the axis of D in each leaf, -1 if it has none."""
    return tuple(_embed_axis(w, dim, values_only) for w, dim in zip(weights, (1, 2), strict=True))


def _embed_axis(w: Any, dim: int, values_only: bool) -> Any:
    if isinstance(w, Adapted):
        a, b = (-1, -1) if values_only else (2, -1) if dim == 1 else (-1, 1)
        pairs = {name: pair.replace(a=a, b=b, scale=-1) for name, pair in w.pairs.items()}
        return w.replace(base=_embed_axis(w.base, dim, values_only), pairs=pairs)
    if isinstance(w, Quantized):
        scaled = w.scale.shape[dim] > 1 and not values_only
        return w.replace(values=dim, scale=dim if scaled else -1)
    return dim


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(w: jax.Array, axes: tuple[str, ...], dim: int, dtype: Any) -> jax.Array:
    """All-gather along one axis in dtype. The gradient is reduce-scattered in the dtype of w."""
    return jax.lax.all_gather(w.astype(dtype), axes, axis=dim, tiled=True)


def _all_gather_backward(axes, dim, dtype, like, gradient):
    if not jnp.issubdtype(like.dtype, jnp.floating):
        return (None,)
    gradient = gradient.astype(like.dtype)
    return (jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True),)


_all_gather.defvjp(
    lambda w, *how: (_all_gather(w, *how), jnp.zeros(0, w.dtype)), _all_gather_backward
)
