"""Adapters added to the weights of a checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from convert.places import Adapter, Place, places
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.tensors import VALUES, LazyTensor, TreePath, spell


def merged(
    cfg: Config,
    leaves: Mapping[TreePath, LazyTensor],
    weights: Mapping[str, np.ndarray],
    adapter: Adapter,
) -> dict[TreePath, LazyTensor]:
    """The leaves with what an adapter adds, summed in fp32 and rounded to each leaf's dtype.

    weights: {NAME.a, NAME.b} of `places`, layers stacked. bf16 keeps 8 bits of a weight, so what is
    below 1/256 of it is rounded off. Raises InputError for weights that are held in 8 bits.
    """
    known = places(cfg)
    added: dict[TreePath, list[tuple[Place, int]]] = {}
    for name, ranks in adapter.ranks.items():
        for i, rank in enumerate(ranks):
            if rank:
                added.setdefault(known[name].paths[i], []).append((known[name], i))
    out = dict(leaves)
    for path, parts in added.items():
        if (*path, VALUES) in leaves:
            raise InputError(
                f"{spell(path)} is held in 8 bits, which an adapter cannot be added to; merge it into "
                f"the 16-bit checkpoint, or keep it beside the weights (load with adapter=)"
            )
        out[path] = _sum(leaves[path], parts, weights, adapter)
    return out


def _sum(leaf: LazyTensor, parts: list[tuple[Place, int]], weights, adapter: Adapter) -> LazyTensor:
    def load() -> np.ndarray:
        whole = leaf.load().astype(np.float32)
        for place, i in parts:
            _, start, stop = next(span for span in place.spans if span[0] == place.part)
            here = (
                ... if place.axis is None else (slice(None),) * place.axis + (slice(start, stop),)
            )
            sides = (np.asarray(weights[f"{place.name}.{side}"]) for side in "ab")
            a, b = (x[i] if place.stacked else x for x in sides)
            made = adapter.scales(place.name)[i] * _product(place, a, b)
            whole[here] += made.reshape(whole[here].shape)
        return whole.astype(leaf.dtype)

    return dataclasses.replace(leaf, load=load)


def _product(place: Place, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """B A [outer inner], or experts' A^T B^T [E inner outer], in fp32."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return (b @ a).swapaxes(1, 2) if place.experts else b @ a
