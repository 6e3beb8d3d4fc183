"""Files to arrays on devices: few tensors in host memory at a time, on a mesh only their shards."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from qwen3vl_jax.checkpoint import hf_reader, lazy_tensor, name_map, orbax_io, quantize, validate
from qwen3vl_jax.checkpoint.config_files import PARAMS, read_config
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, Index, LazyTensor, Leaves, eight_bit
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str, split_layer_index
from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import array_sharding, check_divides, shardings
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.parameters import logical_axes

# A part's (start, stop, step) along each axis: the same part has one spelling, and a hash.
Spans = tuple[tuple[int, ...], ...]
Parts = dict[Spans, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's directory and the wanted form of its weights, as in `load`."""

    directory: Path
    cfg: Config
    weights: str | None = None
    expert_layout: str | None = None
    # Reads the arrays of a run of train.py: training/run_params.py.
    read_run: Callable[[], Leaves] | None = None

    def stored(self) -> Leaves:
        """The arrays as the files hold them. Raises InputError."""
        directory = self.directory
        if self.read_run is not None:
            validate.check_weights(directory, None, self.weights)
            return self.read_run()
        if not (directory / PARAMS).is_dir():
            if any(directory.glob(f"{PARAMS}.orbax-checkpoint-tmp*")):
                what = "its Orbax checkpoint was never finished; write it again"
                raise InputError(f"{directory}: {what}")
            return hf_reader.open_hf(directory, self.cfg, self.expert_layout, self.weights)
        held = orbax_io.open_tree(directory / PARAMS)
        validate.check_stored(directory, self.cfg, held, read_config(directory))
        validate.check_weights(directory, validate.stored_kind(held), self.weights)
        return held

    def asked(self) -> Leaves:
        """The arrays as devices hold them: values and scale in place of what int8 or int4 rounds."""
        stored = self.stored()
        if self.weights not in quantize.CODES or validate.stored_kind(stored) is not None:
            return stored
        return quantize.quantize_leaves(self.cfg, stored, self.weights)


def weights_bytes(source: Source, dtype: Any = None, mesh: AbstractMesh | None = None) -> int:
    """Bytes of the parameters on one device, alone or of a mesh; reads headers only. Raises InputError."""
    leaves, total = source.asked(), 0
    codes, where = eight_bit(leaves), path_shardings(mesh, source.cfg, leaves)
    for path, leaf in leaves.items():
        held = leaf.dtype if path in codes or dtype is None else np.dtype(dtype)
        place = where[path]
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        total += lazy_tensor.device_bytes(math.prod(shape), held)
    return total


def load_params(source: Source, mesh: Mesh | None, dtype: Any) -> Params:
    """The parameters of a checkpoint on the default device, or sharded over a mesh. Raises InputError."""
    leaves = source.asked()
    where, codes = path_shardings(mesh, source.cfg, leaves), eight_bit(leaves)
    arrays, read = {}, lambda path: _read(leaves[path], where[path])
    for path, parts in lazy_tensor.read_ahead(read, leaves):
        array = _placed(leaves[path], where[path], parts)
        if dtype is not None and path not in codes:
            array = array.astype(dtype)
        laid_out = placement(path, array.sharding)
        # device_put ties an array to its device: without a mesh and with other devices it stays free.
        if isinstance(laid_out, Format) and (mesh is not None or jax.device_count() == 1):
            array = jax.device_put(array, laid_out)
        # Otherwise the host copies of many tensors are alive at once.
        arrays[path] = array.block_until_ready()
    return as_structs(name_map.tree_of(source.cfg, arrays))


def placement(path: TreePath, sharding: Any) -> Any:
    """How an array lies: on a TPU attn.o [D N H] with N outermost, else each decode loop copies it."""
    (device, *_), name = sharding.device_set, [part for part in path if part != VALUES]
    heads_first = device.platform == "tpu" and path[0] == "layers" and name[-2:] == ["attn", "o"]
    return Format(Layout((1, 0, 2)), sharding) if heads_first else sharding


def path_shardings(
    mesh: Mesh | AbstractMesh | None, cfg: Config, leaves: Mapping[TreePath, Any]
) -> dict[TreePath, NamedSharding | None]:
    """The sharding of each array by path; 8-bit values and scales as their weight. Raises InputError."""
    if mesh is None:
        return dict.fromkeys(leaves)
    known, codes = logical_axes(cfg), eight_bit(leaves)
    weight = {path: path[:-1] if path in codes else path for path in leaves}
    axes = {path_str(path): known[path_str(split_layer_index(weight[path])[0])] for path in leaves}
    shapes = {path_str(path): leaf for path, leaf in leaves.items()}
    found = shardings(mesh, shapes, axes)
    check_divides(mesh, shapes, axes)
    return {path: found[path_str(path)] for path in leaves}


def on_devices(leaf: LazyTensor, sharding: NamedSharding | None) -> jax.Array:
    """A tensor on the default device, or its shards on this process's devices."""
    return _placed(leaf, sharding, _read(leaf, sharding))


def _read(leaf: LazyTensor, sharding: NamedSharding | None) -> Parts:
    """The parts of a tensor that this process's devices hold, each once, in host memory."""
    if sharding is None:
        return {(): leaf.load()}
    local = sharding.addressable_devices_indices_map(leaf.shape).values()
    where = {_spans(leaf, index): index for index in local if index is not None}
    return dict(zip(where, leaf.parts(list(where.values())), strict=True))


def _placed(leaf: LazyTensor, sharding: NamedSharding | None, parts: Parts) -> jax.Array:
    if sharding is None:
        # Not device_put: on a CPU it would alias the memory map of a file that may change.
        return jnp.array(parts[()])

    def part(index: Any) -> np.ndarray:
        return parts[_spans(leaf, index)]

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _spans(leaf: LazyTensor, index: Index) -> Spans:
    return tuple(s.indices(n) for s, n in zip(index, leaf.shape, strict=True))


def put_pairs(
    matrices: Mapping[str, np.ndarray], mesh: Mesh | None, dtype: Any
) -> dict[str, jax.Array]:
    """An adapter's matrices on the mesh: experts' are sharded with their experts, others replicated."""
    found = {}
    for name, stored in matrices.items():
        x = stored if dtype is None else stored.astype(dtype)
        # The first axis is that of layers.
        axes = (None, "expert", None, None) if x.ndim == 4 else (None,) * x.ndim
        sharding = None if mesh is None else array_sharding(mesh, axes, x)
        found[name] = on_devices(LazyTensor(x.shape, x.dtype, lambda x=x: x), sharding)
    return found


def as_structs(tree: Any) -> Any:
    """A tree with a Quantized in place of each dict of values and scale."""
    if isinstance(tree, dict):
        if tree.keys() == {VALUES, SCALE}:
            return Quantized(**tree)
        return {key: as_structs(child) for key, child in tree.items()}
    return [as_structs(child) for child in tree] if isinstance(tree, list) else tree


def as_dicts(tree: Any) -> Any:
    """The inverse of `as_structs`."""
    return jax.tree.map(
        lambda x: {VALUES: x.values, SCALE: x.scale} if isinstance(x, Quantized) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Quantized),
    )
