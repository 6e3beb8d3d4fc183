"""Reads a checkpoint straight into stacked layers, one tensor at a time, each process its own shards."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3vl_jax.checkpoint import param_paths
from qwen3vl_jax.checkpoint.device_load import Source, as_structs, on_devices
from qwen3vl_jax.checkpoint.name_map import param_specs, tree_of
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str, split_layer_index
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.training.state_sharding import params_shardings


def stacked(cfg: Config, path: TreePath, shape: tuple[int, ...]) -> tuple[TreePath, Any]:
    """The path and the shape with layers stacked, from those of one layer's parameter."""
    path, layer = split_layer_index(path)
    layers = cfg.vision.depth if path[0] == "vision" else cfg.text.num_hidden_layers
    return path, shape if layer is None else (layers, *shape)


def load_stacked(
    ckpt: str | os.PathLike[str],
    dtype_of: Callable[[str], Any],
    weights: str | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """The parameters of a checkpoint (as in `load`, with its `weights`) with stacked layers.

    dtype_of: by stacked name; 8-bit values and scales keep theirs. Each tensor is written into its stack
    by a donated update, so that the peak is the parameters and one tensor. Raises InputError as `load`
    does, and for a checkpoint without the head of its config.
    """
    directory = resolve(ckpt)
    cfg = Config.from_hf(directory)
    known = {split_layer_index(param.path)[0] for param in param_specs(cfg)}
    found: dict[TreePath, jax.Array] = {}
    for leaf_path, leaf in Source(directory, cfg, weights).asked().items():
        layer = split_layer_index(leaf_path)[1]
        path, shape = stacked(cfg, leaf_path, leaf.shape)
        # A path that is not known is the values or the scale of a weight held in 8 bits.
        name = path_str(path)
        dtype = jnp.dtype(dtype_of(name)) if path in known else leaf.dtype
        where = params_shardings(mesh, cfg, {name: jax.ShapeDtypeStruct(shape, dtype)})[name]
        if layer is None:
            array = on_devices(leaf, where).astype(dtype)
        else:
            stack = found.pop(path) if path in found else jnp.zeros(shape, dtype, device=where)
            inner = where and NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
            array = _write(stack, on_devices(leaf, inner), layer, where=where)
        # Otherwise the host copies of many tensors are alive at once.
        found[path] = array.block_until_ready()
    if missing := known - {path if path in known else path[:-1] for path in found}:
        names = ", ".join(sorted(map(path_str, missing)))
        raise InputError(f"{directory}: holds no {names}, which training needs")
    return as_structs(tree_of(cfg, found))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="where")
def _write(stack: jax.Array, layer: jax.Array, index: Any, *, where: Any) -> jax.Array:
    stack = jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)
    return stack if where is None else jax.lax.with_sharding_constraint(stack, where)


def layers_of(name: str, array: np.ndarray) -> list[tuple[TreePath, np.ndarray]]:
    """(tree path, array) of each layer of a stacked parameter, or of a parameter outside the layers."""
    paths = paths_of(name, array.shape)
    alone = path_str(paths[0]) == name
    return [(paths[0], array)] if alone else list(zip(paths, array, strict=True))


def paths_of(name: str, shape: tuple[int, ...]) -> list[TreePath]:
    """The tree paths of a stacked parameter's layers, or of a parameter outside the layers."""
    return param_paths.join_layer_index(param_paths.parse_path(name), shape[0] if shape else 0)
