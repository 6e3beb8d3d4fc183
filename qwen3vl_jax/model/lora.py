"""LoRA adapters on frozen weights: y = x W + scale (dropout(x) A) B. Dims as in layers.py; r rank.

One weight here can hold several PEFT modules (q, k and v; gate and up), each with its own A and B;
qwix allows one pair per weight. Nothing is merged inside a step.
Sources: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314.
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


def lora_delta(x: jax.Array, w: Adapted, in_dims: int) -> jax.Array:
    """The low-rank term of x W: x [.. in..] -> [.. out..] float32, zero in parts without a pair."""
    lead, out = x.shape[: x.ndim - in_dims], w.shape[: w.ndim - in_dims]
    x = x.reshape(*lead, -1)
    parts = []
    for name, start, stop in w.spans:
        part = out if w.axis is None else (*out[: w.axis], stop - start, *out[w.axis + 1 :])
        shape, pair = (*lead, *part), w.pairs.get(name)
        parts.append(lora_product(x, pair).reshape(shape) if pair else jnp.zeros(shape))
    return parts[0] if w.axis is None else jnp.concatenate(parts, len(lead) + w.axis)


def lora_product(x: jax.Array, pair: Pair) -> jax.Array:
    """scale (dropout(x) A) B: x [.. in] -> [.. out] float32."""
    mask = dropout_mask(pair, x.shape, x.dtype)
    x = x if mask is None else x * mask
    low = product(x, pair.a).astype(x.dtype)
    return product(low, pair.b) * pair.scale


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
