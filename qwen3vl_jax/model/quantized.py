"""Weights of 8 or 4 bits: values and scales, how a product or a lookup uses them. Dims as in layers.py."""

import math
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen3vl_jax.model.matmul import gather_rows


class WeightStruct(flax.struct.PyTreeNode):
    """A weight of several arrays; Flax compares the first one with the shape that a module declares."""

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.tree.leaves(self)[0].shape


class Quantized(WeightStruct):
    """values * scale, where each scale covers a box of values.

    Both have the same rank; along axis i a box has values.shape[i] // scale.shape[i] values.
    """

    values: jax.Array  # int8, float8_e4m3fn or int4
    scale: jax.Array  # float32


Weight = jax.Array | Quantized


def dequantize(w: Weight, dtype) -> jax.Array:
    """The weight in `dtype`; values of few bits are scaled in float32 and then rounded."""
    if not isinstance(w, Quantized):
        return w.astype(dtype)
    return (w.values.astype(jnp.float32) * _expand_scales(w.scale, w.shape)).astype(dtype)


def matmul_parts(w: Weight, dtype, axes: Iterable[int]) -> tuple[jax.Array, jax.Array | None]:
    """(values, scale or None) of a product that contracts `axes` of w: result = (x values) * scale.

    A scale that is constant along the contracted axes multiplies the product (float32, in the shape
    of w without those axes), so w is never written out in 16 bits. Other scales are multiplied in.
    """
    axes = tuple(axes)
    if not isinstance(w, Quantized) or math.prod(w.scale.shape[i] for i in axes) > 1:
        return dequantize(w, dtype), None
    out_shape = [n for i, n in enumerate(w.shape) if i not in axes]
    scale = _expand_scales(jnp.squeeze(w.scale, axes), out_shape)
    return w.values.astype(dtype), jnp.broadcast_to(scale, out_shape)


def embedding_lookup(w: Weight, index: Any, dtype) -> jax.Array:
    """w[index] in `dtype`, of a table [V D]."""
    if not isinstance(w, Quantized):
        return gather_rows(jnp.asarray(w), index).astype(dtype)
    box = w.shape[0] // w.scale.shape[0]
    return dequantize(Quantized(w.values[index], w.scale[index // box]), dtype)


def _expand_scales(scale: jax.Array, shape: Iterable[int]) -> jax.Array:
    """Scales repeated to `shape`; an axis of one scale is left to broadcasting."""
    for axis, (n, count) in enumerate(zip(shape, scale.shape, strict=True)):
        if 1 < count < n:
            scale = jnp.repeat(scale, n // count, axis)
    return scale
