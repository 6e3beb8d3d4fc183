"""How long a program takes at best on a machine: arithmetic, main memory, links, network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qwen3vl_jax.planning.chips import GPUS_A_HOST, Machine
from qwen3vl_jax.planning.traffic import Collective, Traffic


class Times(NamedTuple):
    """Seconds of one run, each as if nothing else took any.

    Every rate is the maker's peak, so all of them are lower bounds: real matrix products reach some
    60 to 90 % of theirs.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def least(self) -> float:
        """Everything at the same time: the longest of the four."""
        return max(self)

    @property
    def most(self) -> float:
        """No exchange hidden: arithmetic or memory, then links, then network."""
        return max(self.compute, self.memory) + self.links + self.network


def times_of(machine: Machine, devices: Sequence[Any], flops: float, moved: Traffic) -> Times:
    """devices: in the order of the mesh. flops: of each device, with what is computed again."""
    chip = machine.chip
    links = network = 0.0
    for each in moved.collectives:
        a, b = _seconds(machine, devices, each)
        links += a * each.times
        network += b * each.times
    return Times(flops / chip.flops, moved.memory / chip.hbm_rate, links, network)


def _seconds(machine: Machine, devices: Sequence[Any], each: Collective) -> tuple[float, float]:
    """(over links, over the network) of one exchange.

    A ring along each axis of the torus that the group spans, both ways. A group over several slices
    or hosts sends over the network what its devices there share between them.
    """
    chip, members = machine.chip, [devices[i] for i in each.group if i < len(devices)]
    if len(members) < 2:
        return 0.0, 0.0
    places = {_island(machine, d, i) for d, i in zip(members, each.group)}
    axes = _spanned(members) if chip.platform == "tpu" else 0.5  # NVLink's rate is a direction's
    rate = 2 * max(axes, 0.5) * chip.link
    if len(places) == 1:
        return each.moved / rate, 0.0
    inside = len(members) // len(places)
    return (each.moved / rate if inside > 1 else 0.0), each.moved / inside / chip.network


def _island(machine: Machine, device: Any, number: int) -> int:
    """The slice, or host of GPUs, that a device is in."""
    if machine.chip.platform == "tpu":
        return getattr(device, "slice_index", None) or 0
    return number // GPUS_A_HOST


def _spanned(members: Sequence[Any]) -> int:
    """Along how many axes of the torus devices differ; two devices of a chip differ along none."""
    coords = [tuple(d.coords) if hasattr(d, "coords") else (d.id,) for d in members]
    return sum(len(set(axis)) > 1 for axis in zip(*coords, strict=True))
