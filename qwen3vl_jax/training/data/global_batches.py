"""Global batches of a mesh: each group of rows has its own loader, and they form global arrays.

A group's samples depend only on its number, so the same groups give the same batches on any mesh and
any number of processes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwen3vl_jax.device_mesh import array_sharding
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.sharding import platform, shard
from qwen3vl_jax.model.structs import segment_bound
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.training.data.loader import DataLoader, LoadedBatch
from qwen3vl_jax.training.data.packing import PackedBatch, most_segments, with_segment_bounds
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
        mine = sorted(_mine(mesh, pack, groups))
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
        packed = jax.tree.map_with_path(self._together, *(d.packed for d in loaded.values()))
        packed = packed.replace(batch=packed.batch.replace(groups=self.groups))
        packed = bounded(packed, [d.packed for d in loaded.values()])
        return LoadedBatch(packed, names, self._stats([d.stats for d in loaded.values()]))

    def _together(self, path: Any, *parts: np.ndarray) -> jax.Array:
        """One array of the batches of this process's groups as a global array [1 ..]."""
        axis = batch_axis(path)
        if self.mesh is None:
            return jax.device_put(np.concatenate(parts, axis)[None])
        shape = (1, *parts[0].shape[:axis], self.groups * parts[0].shape[axis])
        shape += parts[0].shape[axis + 1 :]
        return self._global(parts, axis, batch_sharding(self.mesh, path, shape), shape)

    def _stats(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """`packing.fill_of` of all groups: means of the fills, sums of the counts."""
        rows = [np.array([list(each.values())], np.float32) for each in stats]
        if self.mesh is None:
            total = np.sum(rows, 0)[0]
        else:
            like = jax.ShapeDtypeStruct((1, self.groups, rows[0].size), np.float32)
            where = array_sharding(self.mesh, (None, "batch", None), like)
            total = _sum(self._global(rows, 0, where, like.shape))
        divisors = (self.groups if n.endswith("fill") else 1 for n in stats[0])
        return {n: x / divisor for n, x, divisor in zip(stats[0], total, divisors)}

    def _global(
        self, parts: Sequence[np.ndarray], axis: int, where: Any, shape: tuple[int, ...]
    ) -> jax.Array:
        """The global array [1 ..] of all groups, whose parts are joined along an axis."""
        held, size = dict(zip(self.loaders, parts, strict=True)), parts[0].shape[axis]

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[axis + 1].indices(shape[axis + 1])
            begun = first // size
            needed = [held[g] for g in range(begun, -(-last // size))]
            joined = needed[0] if len(needed) == 1 else np.concatenate(needed, axis)
            inner = list(index[1:])
            inner[axis] = slice(first - begun * size, last - begun * size)
            return joined[tuple(inner)][None]

        return jax.make_array_from_callback(shape, where, part)

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


def bounded(packed: PackedBatch, parts: Sequence[PackedBatch]) -> PackedBatch:
    """The batch with bounds of its segments, of which this process has `parts` on the host.

    All processes call it. Only a GPU's attention asks; elsewhere another bound would compile the step
    once more.
    """
    if platform() != "gpu":
        return packed
    most = np.max([most_segments(part) for part in parts], axis=0)
    found = distributed.largest([int(count) for count in most])
    return with_segment_bounds(packed, *map(segment_bound, found))


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


def _mine(mesh: Any, pack: Pack, groups: int) -> set[int]:
    """The groups whose rows devices of this process have."""
    if mesh is None:
        return set(range(groups))
    rows, found = pack.rows, set()
    like = jax.ShapeDtypeStruct((1, rows, pack.length), np.int32)
    held: Any = array_sharding(mesh, (None, "batch", "tokens"), like)
    for index in held.addressable_devices_indices_map(like.shape).values():
        first, last, _ = index[1].indices(rows)
        found |= set(range(first * groups // rows, -(-last * groups // rows)))
    return found


@jax.jit
def _sum(found: jax.Array) -> jax.Array:
    """Sums over all but the last axis, known to every process."""
    return shard(jax.numpy.sum(found, (0, 1)), None)
