"""Weights held in 8 bits, and the only code that knows how a weight is held. Dims as in layers.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen3vl_jax.model.matmul import gather_rows


class Quantized(flax.struct.PyTreeNode):
    """A weight that is values * scale. Both have the same rank, so each scale covers a box of values:
    along every axis values.shape[i] // scale.shape[i] of them.

    `values` comes first, in the shape the module declares: flax compares a parameter's first leaf.
    """

    values: jax.Array  # int8 or float8_e4m3fn
    scale: jax.Array  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


Weight = jax.Array | Quantized


def dequantize(w: Weight, dtype) -> jax.Array:
    """The weight itself, in `dtype`; an 8-bit one is multiplied out in float32 and then rounded."""
    if not isinstance(w, Quantized):
        return w.astype(dtype)
    return (w.values.astype(jnp.float32) * _scale_of_each(w.scale, w.shape)).astype(dtype)


def scaled_matmul_parts(
    w: Weight, dtype, axes: Iterable[int]
) -> tuple[jax.Array, jax.Array | None]:
    """(values to multiply with, factor of the product or None) where a product sums over `axes`.

    Scales that do not change along the axes stay outside (float32, in the shape of w without the
    axes): nobody has to write the weight out in 16 bits. Others are multiplied in, as `dequantize` does.
    """
    axes = tuple(axes)
    if not isinstance(w, Quantized) or math.prod(w.scale.shape[i] for i in axes) > 1:
        return dequantize(w, dtype), None
    scale = jnp.squeeze(w.scale, axes)
    rest = [n for i, n in enumerate(w.shape) if i not in axes]
    return w.values.astype(dtype), jnp.broadcast_to(_scale_of_each(scale, rest), rest)


def embedding_lookup(w: Weight, index: Any, dtype) -> jax.Array:
    """Rows w[index] in `dtype`: the embedding."""
    if not isinstance(w, Quantized):
        return gather_rows(jnp.asarray(w), index).astype(dtype)
    covered = w.shape[0] // w.scale.shape[0]
    return dequantize(Quantized(w.values[index], w.scale[index // covered]), dtype)


def _scale_of_each(scale: jax.Array, shape: Iterable[int]) -> jax.Array:
    """Scales repeated to `shape` (axes of one scale are left to broadcasting)."""
    for axis, (n, count) in enumerate(zip(shape, scale.shape, strict=True)):
        if 1 < count < n:
            scale = jnp.repeat(scale, n // count, axis)
    return scale
