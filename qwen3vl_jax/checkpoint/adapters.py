"""LoRA adapters: attached beside weights, or merged into them one tensor in memory at a time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.checkpoint.adapter_map import Adapter, LoraTarget, Matrices, lora_targets
from qwen3vl_jax.checkpoint.lazy_tensor import VALUES, Leaves
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.lora import Adapted, Pair
from qwen3vl_jax.model.quantized import Quantized, dequantize
from qwen3vl_jax.model.structs import Params

KeyOf = Callable[[str], jax.Array]  # of dropout, by a target's name


def merged(cfg: Config, leaves: Leaves, weights: Matrices, adapter: Adapter) -> Leaves:
    """The leaves with an adapter's {NAME.a, NAME.b} added, summed in fp32, rounded to each leaf's dtype.

    bf16 keeps 8 bits of a weight: an update below 1/256 of it is lost. Raises InputError for 8-bit weights.
    """
    known = lora_targets(cfg)
    added: dict[TreePath, list[tuple[LoraTarget, int]]] = {}
    for name, ranks in adapter.ranks.items():
        for i, rank in enumerate(ranks):
            if rank:
                added.setdefault(known[name].paths[i], []).append((known[name], i))

    def load(path: TreePath) -> np.ndarray:
        weight = leaves[path].load().astype(np.float32)
        for target, i in added[path]:
            sides = (np.asarray(weights[f"{target.name}.{side}"]) for side in "ab")
            a, b = (x[i] if target.stacked else x for x in sides)
            span = next(span for span in target.spans if span[0] == target.part)
            weight = _add_product(weight, target.axis, span, a, b, adapter.scales(target.name)[i])
        return weight.astype(leaves[path].dtype)

    out = dict(leaves)
    for path in added:
        if (*path, VALUES) in leaves:
            found = "got weights of 8 or 4 bits, expected 16 or 32 to merge an adapter"
            advice = "take the 16-bit checkpoint, or load with adapter="
            raise InputError(f"{path_str(path)}: {found}; {advice}")
        # Parts are cut from the sum: the file's own would lack the adapter.
        out[path] = dataclasses.replace(leaves[path], load=functools.partial(load, path), read=None)
    return out


def _add_product(weight, axis: int | None, span: tuple[str, int, int], a, b, scale):
    """weight + scale B A in fp32 within a span of its axis (numpy: in place); experts are [E in out]."""
    here = ... if axis is None else (slice(None),) * axis + (slice(*span[1:]),)
    product = b.astype(np.float32) @ a.astype(np.float32)
    product = product.swapaxes(1, 2) if product.ndim == 3 else product
    added = (scale * product).reshape(weight[here].shape)
    if not isinstance(weight, np.ndarray):
        return weight.at[here].add(added)
    weight[here] += added
    return weight


def attach(
    params: Params, cfg: Config, weights: Matrices, adapter: Adapter, key: KeyOf | None = None
) -> Params:
    """The parameters (layers listed or stacked) with an adapter; key(NAME): of a target's dropout."""
    found: dict[str, list[LoraTarget]] = {}
    known = lora_targets(cfg)
    for name in adapter.ranks:
        found.setdefault(known[name].weight, []).append(known[name])
    for weight, parts in found.items():
        pairs = {}
        for target in parts:
            scales = jnp.asarray(adapter.scales(target.name), jnp.float32)
            keys = None if key is None or not adapter.dropout else key(target.name)
            if target.stacked and keys is not None:
                keys = jax.random.split(keys, len(target.modules))
            a, b = (jnp.asarray(weights[f"{target.name}.{side}"]) for side in "ab")
            scale = scales if target.stacked else scales[0]
            pairs[target.part] = Pair(a, b, scale, key=keys, rate=adapter.dropout)
        params = _put(params, weight.split("."), parts[0], pairs)
    return params


def _put(node: Any, path: list[str], target: LoraTarget, pairs: dict[str, Pair]) -> Any:
    """The tree with one weight adapted; everything else is shared."""
    if not path:
        return Adapted(node, pairs, target.axis, target.spans)
    head, *rest = path
    if isinstance(node, (list, tuple)) and head.isdecimal():
        return [_put(x, rest, target, pairs) if i == int(head) else x for i, x in enumerate(node)]
    # The layers, whose index is not in the path.
    if isinstance(node, (list, tuple)):
        layers = (jax.tree.map(lambda x, i=i: x[i], pairs) for i in range(len(node)))
        return [_put(x, path, target, one) for x, one in zip(node, layers, strict=True)]
    return {**node, head: _put(node[head], rest, target, pairs)}


def merge(params: Params, dtype: Any = None) -> Params:
    """Plain parameters: adapters merged into their weights, 8-bit weights dequantized to `dtype`.

    Sums are in fp32 and rounded to the base's dtype: in bf16 an update below 1/256 of a weight is lost.
    """
    wide = params["norm"].dtype if dtype is None else dtype

    def plain(w: Any) -> Any:
        if not isinstance(w, Adapted):
            return dequantize(w, wide) if isinstance(w, Quantized) else w
        to = wide if isinstance(w.base, Quantized) else w.base.dtype
        stacked = next(iter(w.pairs.values())).scale.ndim
        return (jax.vmap(added) if stacked else added)(w).astype(to)

    def added(w: Adapted) -> jax.Array:
        weight = dequantize(w.base, jnp.float32)
        for span in w.spans:
            if pair := w.pairs.get(span[0]):
                weight = _add_product(weight, w.axis, span, pair.a, pair.b, pair.scale)
        return weight

    return jax.tree.map(plain, params, is_leaf=lambda w: isinstance(w, (Adapted, Quantized)))
