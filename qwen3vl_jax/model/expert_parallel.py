"""Tokens to the devices that hold their experts, and back. Dims as in layers.py; n tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.model.lora import Adapted, split
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.model.sharding import (
    Where,
    mesh_axes_for,
    mesh_sizes,
    on_shards,
    spec,
)

_EMBED = (1, 2)  # the axis D of gate_up [E D 2M] and of down [E M D]


class ExpertParallel(NamedTuple):
    """How the tokens [B T ..] of one layer and its E experts lie on the mesh; without one, whole.

    Where D is cut, the many tokens of whole rows have the weights gathered to them; the few of a decode
    step go to all parts of a weight, and what these make of them is summed.
    """

    rows: str  # the logical axis of the tokens' rows
    tokens: Where  # of rows and stream
    weights: Where  # of expert and embed
    experts: int
    sizes: dict[str, int]
    partial: bool  # whether each device multiplies with its part of D

    @classmethod
    def of(cls, shape: tuple[int, ...], gate_up: Any, down: Any) -> ExpertParallel:
        """For a stream of this shape [B T D] and the matrices of `each_expert`."""
        experts, sizes = gate_up.shape[0], mesh_sizes()
        weights = mesh_axes_for(("expert", experts), ("embed", shape[2]))
        parts = math.prod(sizes[a] for a in weights["embed"])
        pairs = zip((gate_up, down), _EMBED, strict=True)
        partial = shape[1] == 1 < parts and all(_divides(w, dim, parts) for w, dim in pairs)
        rows = "step_rows" if shape[1] == 1 else "rows"
        tokens = mesh_axes_for((rows, shape[0]), ("stream", shape[1]))
        return cls(rows, tokens, weights, experts, sizes, partial)

    @property
    def owners(self) -> tuple[str, ...]:
        """The mesh axes that cut the experts."""
        return self.weights["expert"]

    @property
    def count(self) -> int:
        """Into how many sets the experts are cut."""
        return math.prod(self.sizes[a] for a in self.owners)

    @property
    def _gathered(self) -> tuple[str, ...]:
        """Those owners' axes that cut the tokens too; along the others each has all of them."""
        cut = {a for axes in self.tokens.values() for a in axes}
        return tuple(a for a in self.owners if a in cut)

    def on_shards(self, fn: Callable, tokens: Any, weights: Any) -> jax.Array:
        """fn(tokens, weights) on each device: [B T ..] arrays and experts' matrices -> [B T D].

        The first of the tokens' arrays has the axis D.
        """
        others = (self.rows, "stream", None)
        stream = (self.rows, "stream", "embed" if self.partial else None)
        held = tuple(self._specs(w, dim) for w, dim in zip(weights, _EMBED, strict=True))
        in_axes = ((stream, *(others for _ in tokens[1:])), held)
        where = {**self.tokens, "embed": self.weights["embed"]}
        return on_shards(fn, where, in_axes, stream, tokens, weights)

    def _specs(self, w: Any, dim: int) -> Any:
        """The layout of a matrix's leaves: all are cut along E, its values along D too.

        So is what else has an axis D, where each device multiplies with its part.
        """
        cut = _along_embed(w, dim)[: None if self.partial else 1]

        def of(leaf: jax.Array) -> Any:
            axis = next((axis for x, axis in cut if x is leaf), None)
            named = {0: "expert", axis: "embed"}
            return spec([named.get(i) for i in range(leaf.ndim)], self.weights)

        return jax.tree.map(of, w)

    def gather(self, tokens: Any) -> Any:
        """The tokens [n ..] that this device and those with the other experts have between them."""

        def of(x: jax.Array) -> jax.Array:
            x = x.reshape(-1, *x.shape[2:])
            axes = self._gathered
            return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x

        return jax.tree.map(of, tokens)

    def whole(self, weights: Any, dtype: Any) -> Any:
        """This device's experts with all of D, floating values cast before they are sent.

        With its part of D alone where each device multiplies with that.
        """
        axes = () if self.partial else self.weights["embed"]

        def of(w: Any, dim: int) -> Any:
            values = _base(w)
            to = (
                dtype
                if jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize > 1
                else None
            )
            full = _whole(values, axes, dim, to) if axes else values
            return jax.tree.map(lambda leaf: full if leaf is values else leaf, w)

        return tuple(of(w, dim) for w, dim in zip(weights, _EMBED, strict=True))

    def summed(self, y: jax.Array) -> jax.Array:
        """What a product over D gives, from the devices' parts of it."""
        return jax.lax.psum(y, self.weights["embed"]) if self.partial else y

    def first(self) -> Any:
        """The number of this device's first expert."""
        if not self.owners:
            return 0
        return jax.lax.axis_index(self.owners) * (self.experts // self.count)

    def scatter(self, out: jax.Array) -> jax.Array:
        """Sums over the experts' devices of [n D], each of which keeps its own tokens: [b t D]."""
        copied = tuple(a for a in self.owners if a not in self._gathered)
        out = jax.lax.psum(out, copied) if copied else out
        if self._gathered:
            out = jax.lax.psum_scatter(out, self._gathered, scatter_dimension=0, tiled=True)
        return out


def _base(w: Any) -> jax.Array:
    """The array that holds a weight's values."""
    w = w.base if isinstance(w, Adapted) else w
    return w.values if isinstance(w, Quantized) else w


def _along_embed(w: Any, dim: int) -> list[tuple[jax.Array, int]]:
    """The leaves of a matrix that have an axis D, its values first, and which axis that is."""
    base, pair = split(w)
    found = [(_base(w), dim)]
    if isinstance(base, Quantized) and base.scale.shape[dim] > 1:
        found.append((base.scale, dim))
    if pair is not None:  # of gate_up what it takes, of down what it gives
        found.append((pair.a, 2) if dim == 1 else (pair.b, 1))
    return found


def _divides(w: Any, dim: int, parts: int) -> bool:
    """Whether all of a matrix that has an axis D can be cut along it alike."""
    return not any(x.shape[axis] % parts for x, axis in _along_embed(w, dim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _whole(w: jax.Array, axes: tuple[str, ...], dim: int, dtype: Any) -> jax.Array:
    """A weight put together along one axis; its gradient is summed in fp32 and cut again."""
    w = w if dtype is None else w.astype(dtype)
    return jax.lax.all_gather(w, axes, axis=dim, tiled=True)


def _whole_forward(w, axes, dim, dtype):
    return _whole(w, axes, dim, dtype), jnp.zeros(0, w.dtype)


def _whole_backward(axes, dim, dtype, kept, slope):
    if not jnp.issubdtype(kept.dtype, jnp.floating):
        return (None,)
    slope = slope.astype(jnp.float32)
    cut = jax.lax.psum_scatter(slope, axes, scatter_dimension=dim, tiled=True)
    return (cut.astype(kept.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)
