"""Matrix products and row lookups with the backward pass that bf16 wants. Dims as in layers.py.

Autodiff of a bf16 product summed in fp32 multiplies an fp32 cotangent with bf16 operands, which a
GPU can only do in fp32; and it rounds a weight's gradient to bf16 before it reaches an fp32 weight.
In fp32 both functions are what autodiff gives.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, w: jax.Array, in_dims: int = 1) -> jax.Array:
    """x [.. in..] times w [out.. in..] -> [.. out..] in fp32; w is cast to the dtype of x.

    in_dims: how many trailing axes of both are summed over.
    """
    return _dot(x, w.astype(x.dtype), _last(x, in_dims), _last(w, in_dims))


def _dot(a: jax.Array, b: jax.Array, i: tuple[int, ...], j: tuple[int, ...]) -> jax.Array:
    return jax.lax.dot_general(a, b, ((i, j), ((), ())), preferred_element_type=jnp.float32)


def _last(x: jax.Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


def _product_forward(x, w, in_dims):
    return product(x, w, in_dims), (x, w)


def _product_backward(in_dims, kept, slope):
    x, w = kept
    slope, lead = slope.astype(x.dtype), tuple(range(x.ndim - in_dims))
    outs = tuple(range(w.ndim - in_dims))
    d_x = _dot(slope, w.astype(x.dtype), _last(slope, len(outs)), outs).astype(x.dtype)
    return d_x, _dot(slope, x, lead, lead).astype(w.dtype)


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index]; the gradients of a row that is looked up often are summed in fp32."""
    return table[index]


def _rows_forward(table, index):
    return table[index], (table, index)


def _rows_backward(kept, slope):
    table, index = kept
    total = jnp.zeros(table.shape, jnp.float32).at[index].add(slope.astype(jnp.float32))
    return total.astype(table.dtype), None


rows.defvjp(_rows_forward, _rows_backward)
