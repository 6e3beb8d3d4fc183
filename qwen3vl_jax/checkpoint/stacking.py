"""Layers of both towers: per-layer lists (inference) <-> stacked arrays (training)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen3vl_jax.model.structs import Params


def stack_layers(params: Params) -> Params:
    """Per-layer lists -> one stacked array per parameter, for `lax.scan` (training)."""
    return _map_layers(params, lambda layers: jax.tree.map(lambda *x: jnp.stack(x), *layers))


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""

    def unstack(layers: Any) -> Any:
        if isinstance(layers, (list, tuple)):
            return layers
        count = jax.tree.leaves(layers)[0].shape[0]
        return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]

    return _map_layers(params, unstack)


def _map_layers(params: Params, fn: Callable) -> Params:
    vision = {**params["vision"], "blocks": fn(params["vision"]["blocks"])}
    return {**params, "layers": fn(params["layers"]), "vision": vision}
