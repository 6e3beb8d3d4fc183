"""Global batches of a mesh: each group of rows has its own loader, and they form global arrays.

A group's samples depend only on its number, so the same groups give the same batches on any mesh and
any number of processes.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from qwen3vl_jax.device_mesh import array_sharding
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.training.data.loader import DataLoader, LoadedBatch
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.recipe import Data, Pack
from qwen3vl_jax.training.state_sharding import batch_axis, batch_sharding


class GlobalFeed:
    """A DataLoader of `groups` groups. This process reads the groups that its devices compute.

    mesh None: one device has all groups. Batches have a leading axis of 1, the micro batch. Raises
    InputError as DataLoader does, and for rows that `groups` does not divide.
    """

    def __init__(
        self, data: Data, pack: Pack, proc: Processor, seed: int, groups: int, mesh=None, once=False
    ):
        self.groups, self.mesh = groups, mesh
        self.pack = divided(pack, groups)
        mine = _mine(mesh, (1, pack.rows, pack.length), groups)
        data = dataclasses.replace(data, workers=-(-data.workers // len(mine)))
        load = functools.partial(DataLoader, data, self.pack, proc, seed, once=once)
        self.loaders = {g: load(process_index=g, process_count=groups) for g in mine}
        self._once = once

    def __iter__(self) -> "GlobalFeed":
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch. With `once` the last ones have empty groups."""
        loaded: dict[int, Any] = {g: next(loader, None) for g, loader in self.loaders.items()}
        if self._once:
            left = any(batch is not None for batch in loaded.values())
            if not any(distributed.all_of(left)):
                raise StopIteration
            loaded = {g: batch or self.loaders[g].batch_of([]) for g, batch in loaded.items()}
        names = [row for d in loaded.values() for row in d.names]
        packed = self._together({g: d.packed for g, d in loaded.items()})
        return LoadedBatch(packed, names, self._stats({g: d.stats for g, d in loaded.items()}))

    def _together(self, parts: dict[int, PackedBatch]) -> PackedBatch:
        """Joins the batches of groups as global arrays [1 ..]."""

        def join(path: Any, *leaves: np.ndarray) -> jax.Array:
            axis = batch_axis(path)
            held = dict(zip(parts, leaves, strict=True))
            if self.mesh is None:
                return jax.device_put(np.concatenate(leaves, axis)[None])
            shape = [1, *leaves[0].shape]
            shape[axis + 1] *= self.groups
            where = batch_sharding(self.mesh, path, tuple(shape))
            part = functools.partial(_part, held, axis=axis, total=shape[axis + 1])
            return jax.make_array_from_callback(tuple(shape), where, part)

        joined = jax.tree_util.tree_map_with_path(join, *parts.values())
        return joined.replace(batch=joined.batch.replace(groups=self.groups))

    def _stats(self, stats: dict[int, dict[str, float]]) -> dict[str, Any]:
        """`packing.fill_of` of all groups: means of the fills, sums of the counts."""
        names = list(next(iter(stats.values())))
        held = {g: np.array([[each[n] for n in names]], np.float32) for g, each in stats.items()}
        if self.mesh is None:
            total = np.sum(list(held.values()), 0)[0]
        else:
            shape = (self.groups, len(names))
            like = jax.ShapeDtypeStruct(shape, np.float32)
            where = array_sharding(self.mesh, ("batch", None), like)

            def part(index: Any) -> np.ndarray:
                return _part(held, (slice(None), *(index or ())), 0, self.groups)[0]

            total = _sum(jax.make_array_from_callback(shape, where, part))
        divisors = (self.groups if n.endswith("fill") else 1 for n in names)
        return {n: x / divisor for n, x, divisor in zip(names, total, divisors)}

    def get_state(self) -> dict[str, Any]:
        """The positions of this process's groups. `global_state` joins those of all processes."""
        return {str(g): loader.get_state() for g, loader in self.loaders.items()}

    def global_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state for `set_state`, from the states of all processes. All of them call it."""
        found: dict[str, Any] = {}
        for part in distributed.all_of(state):
            found |= part
        return {"groups": [found[str(g)] for g in range(self.groups)]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a `global_state`. Raises InputError if the data has changed."""
        states = state.get("groups", [state])
        if len(states) != self.groups:
            raise InputError(
                f"data position: the run has {len(states)} groups of rows, this start {self.groups}"
            )
        for g, loader in self.loaders.items():
            loader.set_state(states[g])

    def records(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """As DataLoader.records, the same on every process."""
        return next(iter(self.loaders.values())).records(count)

    @property
    def refused(self) -> list[tuple[str, str]]:
        """As DataLoader.refused, of this process's groups."""
        return [pair for loader in self.loaders.values() for pair in loader.refused]

    def close(self) -> None:
        """Ends threads and workers. The next batch starts them again."""
        for loader in self.loaders.values():
            loader.close()


def all_refused(loader: DataLoader | GlobalFeed) -> list[tuple[str, str]]:
    """What all processes left out or cut; all of them call it. `loader.refused` is of this one."""
    return [(name, reason) for each in distributed.all_of(loader.refused) for name, reason in each]


def divided(pack: Pack, groups: int) -> Pack:
    """The rows of one group. Raises InputError if `groups` does not divide them."""
    for name in ("rows", "vision_rows"):
        if (rows := getattr(pack, name)) % groups:
            raise InputError(
                f"pack.{name} is {rows}, expected a multiple of {groups}: the groups that "
                "mesh.data x mesh.fsdp x mesh.expert (or pack.groups) cut rows into"
            )
    rows, vision_rows = pack.rows // groups, pack.vision_rows // groups
    return dataclasses.replace(pack, rows=rows, vision_rows=vision_rows, groups=groups)


def _mine(mesh: Any, shape: tuple[int, ...], groups: int) -> list[int]:
    """The groups whose rows devices of this process have."""
    if mesh is None:
        return list(range(groups))
    where = array_sharding(mesh, (None, "batch", "tokens"), jax.ShapeDtypeStruct(shape, np.int32))
    rows, found = shape[1], set()
    held: dict[Any, Any] = dict(where.addressable_devices_indices_map(shape))
    for index in held.values():
        first, last, _ = index[1].indices(rows)
        found |= set(range(first * groups // rows, -(-last * groups // rows)))
    return sorted(found)


def _part(held: dict[int, Any], index: Any, axis: int, total: int) -> np.ndarray:
    """The part at `index` of a global array [1 ..] of groups joined along an axis of length `total`."""
    size = next(iter(held.values())).shape[axis]
    first, last, _ = index[axis + 1].indices(total)
    groups = range(first // size, -(-last // size))
    joined = np.concatenate([held[g] for g in groups], axis) if len(groups) > 1 else held[groups[0]]
    inner = list(index[1:])
    inner[axis] = slice(first - groups[0] * size, last - groups[0] * size)
    return joined[tuple(inner)][None]


@jax.jit
def _sum(found: jax.Array) -> jax.Array:
    """Sums over the first axis, known to every process."""
    return shard(jax.numpy.sum(found, 0), None)
