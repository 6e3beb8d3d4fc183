"""How long a program takes at best on a machine: arithmetic, main memory, links, network, host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qwen3vl_jax.planning.machines import GPUS_A_HOST, Machine
from qwen3vl_jax.planning.traffic import FROM_HOST, TO_HOST, Collective, Traffic


class Times(NamedTuple):
    """Seconds of one run, each as if nothing else took any.

    Every rate is the maker's peak, so all of them are lower bounds: real matrix products reach some
    60 to 90 % of theirs.
    """

    compute: float
    memory: float
    links: float
    network: float
    host: float = 0.0  # copies to its memory and back; 0 also where the link's rate is not known

    @property
    def least(self) -> float:
        """Everything at the same time: the longest of the five."""
        return max(self)

    @property
    def most(self) -> float:
        """No exchange hidden: arithmetic or memory, then links, then network, then the host."""
        return max(self.compute, self.memory) + self.links + self.network + self.host


def times_of(machine: Machine, devices: Sequence[Any], flops: float, moved: Traffic) -> Times:
    """devices: in the order of the mesh. flops: of each device, with what is computed again."""
    chip = machine.chip
    links = network = host = 0.0
    for each in moved.collectives:
        if each.kind in (TO_HOST, FROM_HOST):
            host += each.times * each.moved / chip.host if chip.host else 0.0
            continue
        a, b = _seconds(machine, devices, each)
        links += a * each.times
        network += b * each.times
    return Times(flops / chip.flops, moved.memory / chip.hbm_rate, links, network, host)


def _seconds(machine: Machine, devices: Sequence[Any], each: Collective) -> tuple[float, float]:
    """(over links, over the network) of one exchange.

    A ring along each axis of the torus that the group spans, both ways where it is closed. A group over
    several slices or hosts sends over the network what its devices there share between them.
    """
    chip, members = machine.chip, [devices[i] for i in each.group if i < len(devices)]
    if len(members) < 2:
        return 0.0, 0.0
    places = {_island(machine, d, i) for d, i in zip(members, each.group)}
    # NVLink's rate is a direction's of all its links.
    rate = chip.link * (_lanes(machine, members) if chip.platform == "tpu" else 1)
    if len(places) == 1:
        return each.moved / rate, 0.0
    inside = len(members) // len(places)
    return (each.moved / rate if inside > 1 else 0.0), each.moved / inside / chip.network


def _island(machine: Machine, device: Any, number: int) -> int:
    """The slice, or host of GPUs, that a device is in."""
    if machine.chip.platform == "tpu":
        return getattr(device, "slice_index", None) or 0
    return number // GPUS_A_HOST


def _lanes(machine: Machine, members: Sequence[Any]) -> int:
    """How many directions of links bring a device its data.

    Two of each axis that the group has all of, if that is a ring; one of another axis it spans, whose
    last devices get everything from one side. Two devices of one chip differ along no axis.
    """
    coords = [tuple(d.coords) if hasattr(d, "coords") else (d.id,) for d in members]
    spans = [len(set(axis)) for axis in zip(*coords, strict=True)]
    sizes = zip(spans, machine.shape, machine.rings, strict=False)  # coords of 2-D slices end in 0
    return max(sum(1 + (ring and span == n) for span, n, ring in sizes if span > 1), 1)
