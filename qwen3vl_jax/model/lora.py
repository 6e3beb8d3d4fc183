"""Low-rank adapters on frozen weights: y = x W + scale (drop(x) A) B, never merged inside a step.

A weight of ours can stand for several modules of PEFT (q, k and v; gate and up), which have an A and
a B each; qwix gives a weight one pair, and so could not exchange adapters with PEFT: hence this tree.
Dims as in layers.py; r rank. Source: LoRA, arXiv 2106.09685; QLoRA, 2305.14314.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen3vl_jax.model.quantized import Weight


class Pair(flax.struct.PyTreeNode):
    """The two matrices of one module, as PEFT lays them out; experts have one each."""

    a: jax.Array  # [r in], experts [E r in]
    b: jax.Array  # [out r], experts [E out r]
    scale: jax.Array  # [] fp32
    key: jax.Array | None = None  # of dropout; None: nothing is dropped
    rate: float = flax.struct.field(pytree_node=False, default=0.0)


class Adapted(flax.struct.PyTreeNode):
    """A weight with low-rank pairs beside it.

    `base` comes first, in the shape the module declares: flax compares a parameter's first leaf.
    """

    base: Weight
    pairs: dict[str, Pair]  # by part; parts without one are not adapted
    axis: int | None = flax.struct.field(pytree_node=False, default=None)
    spans: tuple[tuple[str, int, int], ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim


def lora_delta(x: jax.Array, w: Adapted, in_dims: int) -> jax.Array:
    """What the pairs of w add to x W, fp32: x [..., in] -> [..., out], each part in its own place."""
    lead, out = x.shape[: x.ndim - in_dims], w.shape[: w.ndim - in_dims]
    flat = x.reshape(*lead, -1)
    pieces = []
    for name, start, stop in w.spans:
        shape = out if w.axis is None else (*out[: w.axis], stop - start, *out[w.axis + 1 :])
        pair = w.pairs.get(name)
        whole = (*lead, *shape)
        pieces.append(
            lora_product(flat, pair).reshape(whole) if pair else jnp.zeros(whole, jnp.float32)
        )
    return pieces[0] if w.axis is None else jnp.concatenate(pieces, len(lead) + w.axis)


def lora_product(x: jax.Array, pair: Pair) -> jax.Array:
    """scale (drop(x) A) B in fp32: x [.. in] -> [.. out]."""
    kept = dropout_mask(pair, x.shape, x.dtype)
    x = x if kept is None else x * kept
    low = _dot(x, pair.a).astype(x.dtype)
    return _dot(low, pair.b) * pair.scale


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), contract, preferred_element_type=jnp.float32)


def dropout_mask(pair: Pair | None, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """What dropout multiplies values of a shape with: 0, or 1 / (1 - rate); None without dropout."""
    if pair is None or pair.key is None or not pair.rate:
        return None
    kept = jax.random.bernoulli(pair.key, 1 - pair.rate, shape)
    return jnp.where(kept, 1 / (1 - pair.rate), 0).astype(dtype)


def split(w: Weight | Adapted) -> tuple[Weight, Pair | None]:
    """The base of a weight that is one part, and its pair."""
    return (w.base, next(iter(w.pairs.values()))) if isinstance(w, Adapted) else (w, None)


def each_expert(w: Weight | Adapted) -> Weight | Adapted:
    """Weights of experts with every leaf's first axis that of experts; dropout is left out."""
    base, pair = split(w)
    if pair is None:
        return base
    scale = jnp.broadcast_to(pair.scale, len(pair.a))
    return Adapted(base, {"": pair.replace(scale=scale, key=None)})
