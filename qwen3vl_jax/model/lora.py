"""LoRA adapters on frozen weights: y = x W + scale (dropout(x) A) B. Dims as in layers.py; r rank.

A weight can hold several PEFT modules (q, k and v; gate and up), each with its own A and B; qwix allows
one pair per weight. Nothing is merged inside a step. LoRA: arXiv 2106.09685; QLoRA: arXiv 2305.14314.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen3vl_jax.model.matmul import product
from qwen3vl_jax.model.quantized import Weight, WeightStruct


class Pair(flax.struct.PyTreeNode):
    """The matrices A and B of one PEFT module; experts have one pair each."""

    a: jax.Array  # [r in], experts [E r in]
    b: jax.Array  # [out r], experts [E out r]
    scale: jax.Array  # [] float32, experts [E]
    key: jax.Array | None = None  # Dropout key; None: no dropout.
    rate: float = flax.struct.field(pytree_node=False, default=0.0)


class Adapted(WeightStruct):
    """A weight with LoRA pairs on parts of it.

    Part (name, start, stop) of `spans` is base[start:stop] along output axis `axis`; axis None: the
    base is one part. A part without an entry in `pairs` is not adapted.
    """

    base: Weight
    pairs: dict[str, Pair]
    axis: int | None = flax.struct.field(pytree_node=False, default=None)
    spans: tuple[tuple[str, int, int], ...] = flax.struct.field(pytree_node=False, default=())


def lora_delta(x: jax.Array, w: Adapted, in_dims: int, dtype: Any = jnp.float32) -> jax.Array:
    """The low-rank term of x W: x [.. in..] -> [.. out..] in `dtype`, zero in parts without a pair.

    One product with all A, and one with all B, each B at its part's rows and zeros at the others': the
    terms of a weight of several parts are written once, as the product with the base is.
    """
    lead, out = x.shape[: x.ndim - in_dims], w.shape[: len(w.shape) - in_dims]
    x, axis = x.reshape(*lead, -1), w.axis or 0

    def rows_of(pair: Pair, start: int, stop: int) -> jax.Array:
        b = (pair.b * pair.scale).reshape(*out[:axis], stop - start, *out[axis + 1 :], -1)
        pad = [(start, out[axis] - stop) if i == axis else (0, 0) for i in range(b.ndim)]
        return jnp.pad(b, pad)

    spans = [(w.pairs[name], i, j or out[0]) for name, i, j in w.spans if name in w.pairs]
    masks = [dropout_mask(pair, x.shape, x.dtype) for pair, *_ in spans]
    if all(mask is None for mask in masks):
        low = product(x, jnp.concatenate([pair.a for pair, *_ in spans]), 1, x.dtype)
    else:
        inputs = [x if mask is None else x * mask for mask in masks]
        lows = [product(y, pair.a, 1, x.dtype) for y, (pair, *_) in zip(inputs, spans)]
        low = jnp.concatenate(lows, axis=-1)
    return product(low, jnp.concatenate([rows_of(*span) for span in spans], axis=-1), 1, dtype)


def lora_product(x: jax.Array, pair: Pair) -> jax.Array:
    """scale (x A) B: x [.. in] -> [.. out] float32."""
    return product(product(x, pair.a, 1, x.dtype), pair.b) * pair.scale


def dropout_mask(pair: Pair | None, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """Factors 0 or 1 / (1 - rate) of LoRA's input dropout; None without dropout."""
    if pair is None or pair.key is None or not pair.rate:
        return None
    kept = jax.random.bernoulli(pair.key, 1 - pair.rate, shape)
    return jnp.where(kept, 1 / (1 - pair.rate), 0).astype(dtype)


def split(w: Weight | Adapted) -> tuple[Weight, Pair | None]:
    """(base, pair or None) of a weight that is one part."""
    return (w.base, next(iter(w.pairs.values()))) if isinstance(w, Adapted) else (w, None)


def expert_leaves(w: Weight | Adapted) -> Weight | Adapted:
    """Expert weights whose every leaf has E as its first axis; dropout is left out."""
    base, pair = split(w)
    if pair is None:
        return base
    scale = jnp.broadcast_to(pair.scale, len(pair.a))
    return Adapted(base, {"": pair.replace(scale=scale, key=None)})
