"""Shardings of a run's arrays on a mesh: weights, optimizer state, batches. Dims as in layers.py."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES
from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import array_sharding, check_divides, replicated, shardings
from qwen3vl_jax.model.sharding import Axes
from qwen3vl_jax.parameters import logical_axes
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.param_groups import Flat
from qwen3vl_jax.training.train_step import TrainState

_STACKS = ("layers.", "vision.blocks.")
_ROWS, _PATCHES = ("batch", "tokens"), ("vision_batch", "patches")
_BATCH: dict[str, Axes] = {  # by field; micro batches are an axis in front
    **dict.fromkeys(("tokens", "segment_ids", "vision_rows", "labels", "weights"), _ROWS),
    **dict.fromkeys(("pixels", "pos_index", "pos_weight", "coords"), (*_PATCHES, None)),
    **dict.fromkeys(("lo", "hi"), _PATCHES),
    "positions": (None, *_ROWS),
    "embeds": (*_ROWS, None),
    "delta": ("batch",),
    "vision_labels": ("vision_batch",),
}


@functools.lru_cache(maxsize=4)
def _known(cfg: Config) -> dict[str, Axes]:
    found = logical_axes(cfg)
    return {n: (None, *axes) if n.startswith(_STACKS) else axes for n, axes in found.items()}


def axes_of(cfg: Config, shapes: Mapping[str, Any]) -> dict[str, Axes]:
    """{name: logical axes} of a flat tree with stacked layers.

    Values and scales of 8-bit weights have the axes of their weight. Arrays without names, such as
    LoRA's matrices, have "embed" for their longest axis.
    """
    known, out = _known(cfg), {}
    for name, x in shapes.items():
        place, _, last = name.rpartition(".")
        axes = known.get(place if last in (VALUES, SCALE) else name)
        out[name] = longest_axis(x) if axes is None else axes
    return out


def longest_axis(x: Any) -> Axes:
    """Logical axes that shard the longest axis of an array, as "embed"."""
    at = int(np.argmax(x.shape)) if x.shape else -1
    return tuple("embed" if i == at else None for i in range(len(x.shape)))


def params_shardings(mesh: Mesh | AbstractMesh | None, cfg: Config, flat: Flat) -> dict[str, Any]:
    """{name: NamedSharding} of weights, or None for each without a mesh. Raises InputError."""
    return shardings(mesh, flat, axes_of(cfg, flat))


def check_mesh(mesh: Mesh | AbstractMesh | None, cfg: Config, model: Flat) -> None:
    """Raises InputError if an axis of the mesh does not divide a model's parameters."""
    check_divides(mesh, model, axes_of(cfg, model))


def state_shardings(mesh: Mesh, cfg: Config, state: TrainState) -> TrainState:
    """The sharding of each array of a state (arrays or shapes). Moments have those of their weights."""
    found = params_shardings(mesh, cfg, state.weights)

    def of(path: Any, x: Any) -> Any:
        name = next((key.key for key in path if getattr(key, "key", None) in found), None)
        if name is None:
            return replicated(mesh)
        same = x.shape == state.weights[name].shape
        return found[name] if same else array_sharding(mesh, longest_axis(x), x)

    return jax.tree_util.tree_map_with_path(of, state)


def batch_axis(path: Any) -> int:
    """The batch axis of an array of a batch, by its path in the tree."""
    axes = _BATCH[path[-1].name]
    return next(i for i, name in enumerate(axes) if name in ("batch", "vision_batch"))


def batch_sharding(mesh: Mesh, path: Any, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one array of micro batches [M ..], by its path in the tree."""
    axes = (None, *_BATCH[path[-1].name])
    return array_sharding(mesh, axes, jax.ShapeDtypeStruct(shape, np.int32))


def batch_shardings(mesh: Mesh, packed: PackedBatch) -> PackedBatch:
    """The sharding of each array of micro batches [M ..] (arrays or shapes)."""
    return jax.tree.map_with_path(lambda path, x: batch_sharding(mesh, path, x.shape), packed)


def put(x: Any, where: NamedSharding | None) -> jax.Array:
    """Puts an array, which every process has in full or which is global, in a sharding."""
    if where is None:
        return jax.numpy.asarray(x)
    if isinstance(x, jax.Array) and (x.sharding == where or not x.is_fully_addressable):
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def with_shardings(shapes: Any, where: Any) -> Any:
    """ShapeDtypeStructs of a tree with shardings, to compile ahead of time."""
    struct = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x, s: struct(x.shape, x.dtype, sharding=s), shapes, where)
