"""Matrix products and row lookups with the backward pass that bf16 wants. Dims as in layers.py.

Autodiff of a bf16 product summed in fp32 multiplies an fp32 cotangent with bf16 operands, which a
GPU can only do in fp32; and it rounds a weight's gradient to bf16 before it reaches an fp32 weight.
In fp32 both functions are what autodiff gives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [n in] times w [out in] -> [n out] in fp32; w is cast to the dtype of x."""
    return _dot(x, w.astype(x.dtype), 1, 1)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _product_forward(x, w):
    return product(x, w), (x, w)


def _product_backward(kept, slope):
    x, w = kept
    slope = slope.astype(x.dtype)
    d_x = _dot(slope, w.astype(x.dtype), 1, 0).astype(x.dtype)
    return d_x, _dot(slope, x, 0, 0).astype(w.dtype)


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
