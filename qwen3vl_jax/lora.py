"""Low-rank adapters on frozen weights: y = x W + scale (drop(x) A) B, never merged inside a step.

A weight of ours can stand for several modules of PEFT (q, k and v; gate and up), which have an A and
a B each; qwix gives a weight one pair, and so could not exchange adapters with PEFT: hence this tree.
Dims as in layers.py; r rank. Source: LoRA, arXiv 2106.09685; QLoRA, 2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from convert.places import Adapter, Place, places
from qwen3vl_jax.config import Config
from qwen3vl_jax.quantized import Quantized, Weight, dense
from qwen3vl_jax.structs import Params


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


def low_rank(x: jax.Array, w: Adapted, in_dims: int) -> jax.Array:
    """What the pairs of w add to x W, fp32: x [..., in] -> [..., out], each part in its own place."""
    lead, out = x.shape[: x.ndim - in_dims], w.shape[: w.ndim - in_dims]
    flat = x.reshape(*lead, -1)
    pieces = []
    for name, start, stop in w.spans:
        shape = out if w.axis is None else (*out[: w.axis], stop - start, *out[w.axis + 1 :])
        pair = w.pairs.get(name)
        whole = (*lead, *shape)
        pieces.append(times(flat, pair).reshape(whole) if pair else jnp.zeros(whole, jnp.float32))
    return pieces[0] if w.axis is None else jnp.concatenate(pieces, len(lead) + w.axis)


def times(x: jax.Array, pair: Pair) -> jax.Array:
    """scale (drop(x) A) B in fp32: x [.. in] -> [.. out]."""
    kept = kept_share(pair, x.shape, x.dtype)
    x = x if kept is None else x * kept
    low = _dot(x, pair.a).astype(x.dtype)
    return _dot(low, pair.b) * pair.scale


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), contract, preferred_element_type=jnp.float32)


def kept_share(pair: Pair | None, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
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


def attach(
    params: Params, cfg: Config, weights: Mapping[str, Any], adapter: Adapter,
    key: Callable[[str], jax.Array] | None = None,
) -> Params:  # fmt: skip
    """The parameters with an adapter's matrices beside them; layers may be lists or stacked.

    weights: {NAME.a, NAME.b} of `places`. key(NAME): of a place's dropout, None for no dropout.
    """
    known, found = places(cfg), {}
    for name in adapter.ranks:
        found.setdefault(known[name].weight, []).append(known[name])
    for weight, parts in found.items():
        pairs = {p.part: _pair(p, weights, adapter, key) for p in parts}
        params = _put(params, weight.split("."), parts[0], pairs)
    return params


def _pair(place: Place, weights, adapter: Adapter, key) -> Pair:
    scales = jnp.asarray(adapter.scales(place.name), jnp.float32)
    keys = None if key is None or not adapter.dropout else key(place.name)
    if place.stacked and keys is not None:
        keys = jax.random.split(keys, len(place.modules))
    return Pair(
        a=jnp.asarray(weights[f"{place.name}.a"]),
        b=jnp.asarray(weights[f"{place.name}.b"]),
        scale=scales if place.stacked else scales[0],
        key=keys,
        rate=adapter.dropout,
    )


def _put(node: Any, path: list[str], place: Place, pairs: dict[str, Pair]) -> Any:
    """A copy of a tree, shared but for the path to one weight, which is adapted."""
    if not path:
        return Adapted(node, pairs, place.axis, place.spans)
    head, *rest = path
    if isinstance(node, (list, tuple)) and head.isdecimal():
        at = int(head)
        return [_put(x, rest, place, pairs) if i == at else x for i, x in enumerate(node)]
    if isinstance(node, (list, tuple)):  # layers, whose number no name holds
        layers = (jax.tree.map(lambda x, i=i: x[i], pairs) for i in range(len(node)))
        return [_put(x, path, place, one) for x, one in zip(node, layers, strict=True)]
    return {**node, head: _put(node[head], rest, place, pairs)}


def merge(params: Params, dtype: Any = None) -> Params:
    """Plain parameters: each adapted weight with its pairs added, and 8-bit ones multiplied out.

    Sums are fp32, then rounded to the base's dtype (bf16 keeps 8 bits of a weight: an update below
    1/256 of it is lost, which adapters kept beside their weights never are). dtype: of what was held
    in 8 bits, None is that of the norms.
    """
    wide = params["norm"].dtype if dtype is None else dtype

    def plain(w: Any) -> Any:
        if not isinstance(w, Adapted):
            return dense(w, wide) if isinstance(w, Quantized) else w
        to = wide if isinstance(w.base, Quantized) else w.base.dtype
        whole = jax.vmap(_whole) if next(iter(w.pairs.values())).scale.ndim else _whole
        return whole(w).astype(to)

    return jax.tree.map(plain, params, is_leaf=lambda w: isinstance(w, (Adapted, Quantized)))


def _whole(w: Adapted) -> jax.Array:
    """The weight that an adapted one stands for, in fp32."""
    base = dense(w.base, jnp.float32)
    pieces = []
    for name, start, stop in w.spans:
        shape = w.shape
        if w.axis is not None:
            shape = (*shape[: w.axis], stop - start, *shape[w.axis + 1 :])
        pair = w.pairs.get(name)
        if pair is None:
            pieces.append(jnp.zeros(shape, jnp.float32))
            continue
        a, b = pair.a.astype(jnp.float32), pair.b.astype(jnp.float32)
        product = jnp.einsum("eor,eri->eio", b, a) if a.ndim == 3 else b @ a
        pieces.append((pair.scale * product).reshape(shape))
    return base + (pieces[0] if w.axis is None else jnp.concatenate(pieces, w.axis))
