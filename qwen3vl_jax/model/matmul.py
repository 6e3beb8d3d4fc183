"""Matrix products and table lookups whose backward pass suits bf16. Dims as in layers.py.

Autodiff of a bf16 product summed in fp32 multiplies an fp32 cotangent with bf16 operands, which a
GPU can only do in fp32. It also rounds a weight's gradient to bf16 before it reaches an fp32 weight.
In fp32 both functions equal autodiff. Forward mode (jax.jvp) works where x and w have one dtype; fp32
weights with 16-bit activations, as in training, have reverse mode only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def product(x: jax.Array, w: jax.Array, in_dims: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    """x [.. in..] times w [out.. in..] -> [.. out..] in `dtype`, summed in fp32.

    The `in_dims` trailing axes of both are contracted. w is cast to the dtype of x.
    """
    if x.dtype != w.dtype:
        return _cast_product(x, w, in_dims, dtype)
    return (_dot if x.dtype == jnp.float32 else _short_product)(x, w, in_dims, dtype)


def _dot(x: jax.Array, w: jax.Array, in_dims: int, dtype: Any) -> jax.Array:
    return _contract(x, w, _last(x, in_dims), _last(w, in_dims), dtype)


def _contract(a, b, i: tuple[int, ...], j: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.lax.dot_general(a, b, ((i, j), ((), ())), preferred_element_type=dtype)


def _last(x: jax.Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _short_product(x, w, in_dims, dtype):
    """`product` of two arrays of one 16-bit dtype."""
    return _dot(x, w, in_dims, dtype)


@functools.partial(_short_product.defjvp, symbolic_zeros=True)
def _short_jvp(in_dims, dtype, primals, tangents):
    """Each tangent is a product with a 16-bit result, so its transpose has a 16-bit cotangent."""
    (x, w), (d_x, d_w) = primals, tangents
    out = _dot(x, w, in_dims, dtype)
    parts = ((d_x, w), (x, d_w))
    more = [_dot(*pair, in_dims, x.dtype) for pair in parts if not _is_zero(*pair)]
    wide = [part.astype(jnp.float32) for part in more]
    return out, sum(wide[1:], wide[0]).astype(dtype) if wide else jnp.zeros_like(out)


def _is_zero(*arrays) -> bool:
    return any(isinstance(array, SymbolicZero) for array in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cast_product(x, w, in_dims, dtype):
    """`product` with a weight that is cast; its gradient is rounded to its own dtype only."""
    return _dot(x, w.astype(x.dtype), in_dims, dtype)


def _cast_backward(in_dims, dtype, saved, d_y):
    x, w = saved
    d_y, lead = d_y.astype(x.dtype), tuple(range(x.ndim - in_dims))
    outs = tuple(range(w.ndim - in_dims))
    d_x = _contract(d_y, w.astype(x.dtype), _last(d_y, len(outs)), outs, x.dtype)
    return d_x, _contract(d_y, x, lead, lead).astype(w.dtype)


_cast_product.defvjp(lambda x, w, *how: (_cast_product(x, w, *how), (x, w)), _cast_backward)


@jax.custom_jvp
def gather_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index]; the gradients of repeated indices are summed in fp32."""
    return table[index]


@functools.partial(gather_rows.defjvp, symbolic_zeros=True)
def _rows_jvp(primals, tangents):
    (table, index), (slope, _) = primals, tangents
    found = table[index]
    if _is_zero(slope):
        return found, jnp.zeros_like(found)
    return found, slope.astype(jnp.float32)[index].astype(table.dtype)
