"""The report of a plan: lower bounds of the time of a step, and the table that is printed."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Column, Table

from qwen3vl_jax.planning.compiling import Compiled
from qwen3vl_jax.planning.hlo import parse
from qwen3vl_jax.planning.machines import GPUS_A_HOST, Machine
from qwen3vl_jax.planning.program import Program
from qwen3vl_jax.planning.search import Candidate
from qwen3vl_jax.planning.traffic import FROM_HOST, TO_HOST, Collective, Traffic, traffic
from qwen3vl_jax.runtime.chips import GPU_SHARE
from qwen3vl_jax.training.reporting.dry_run import number_table


class Times(NamedTuple):
    """Seconds of each kind of work: lower bounds, at peak rates of which products reach 60 to 90 %."""

    compute: float
    memory: float
    links: float
    network: float
    host: float = 0.0  # copies to its memory and back; 0 also where the link's rate is not known

    @property
    def least(self) -> float:
        """The time of a run that overlaps all five: the longest of them."""
        return max(self)

    @property
    def most(self) -> float:
        """The time of a run that hides no exchange: arithmetic or memory, links, network, host."""
        return max(self.compute, self.memory) + self.links + self.network + self.host


def times_of(machine: Machine, devices: Sequence[Any], flops: float, moved: Traffic) -> Times:
    """The times of one run. devices: in mesh order. flops: of each device, recomputation included."""
    chip, host = machine.chip, 0.0
    links_and_network = np.zeros(2)
    for each in moved.collectives:
        if each.kind not in (TO_HOST, FROM_HOST):
            links_and_network += np.multiply(_exchange_seconds(machine, devices, each), each.times)
        elif chip.host:
            host += each.times * each.moved / chip.host
    links, network = links_and_network.tolist()
    return Times(flops / chip.flops, moved.memory / chip.hbm_rate, links, network, host)


def _exchange_seconds(
    machine: Machine, devices: Sequence[Any], each: Collective
) -> tuple[float, float]:
    """Seconds of one collective: (over links, over the network).

    It is a ring along each axis of the torus that the group spans, in both directions if it spans a closed
    axis whole; else its last devices receive from one side. Two devices of one chip differ along no axis.
    A group of several slices or hosts sends over the network too, a share from each of its devices.
    """
    chip, members = machine.chip, [devices[i] for i in each.group if i < len(devices)]
    if len(members) < 2:
        return 0.0, 0.0
    if chip.platform == "tpu":
        islands = {getattr(device, "slice_index", None) or 0 for device in members}
        coords = [tuple(d.coords) if hasattr(d, "coords") else (d.id,) for d in members]
        spans = [len(set(axis)) for axis in zip(*coords, strict=True)]
        # Coordinates of 2-D slices end in 0.
        sizes = zip(spans, machine.shape, machine.rings, strict=False)
        lanes = sum(1 + (ring and span == n) for span, n, ring in sizes if span > 1)
        rate = chip.link * max(lanes, 1)
    else:
        # NVLink's rate is a direction's of all its links.
        islands, rate = {i // GPUS_A_HOST for i in each.group[: len(members)]}, chip.link
    inside = len(members) // len(islands)
    over_network = each.moved / inside / chip.network if len(islands) > 1 else 0.0
    return (each.moved / rate if inside > 1 else 0.0), over_network


# A lower level fuses less. On v5e:2x2 the step of demo.toml moves 3.6 GiB in place of 0.2.
_UNTIMED = "Main memory's time is left out: less optimised, a program moves more there than a run."


class Plan(NamedTuple):
    """One program on one machine. Times and traffic are None where it does not fit."""

    machine: Machine
    program: Program
    done: Compiled
    moved: Traffic | None = None
    times: Times | None = None

    @property
    def fits(self) -> bool:
        """XLA's verdict; a GPU's compiler gives none, so its peak is compared with the memory."""
        return self.done.executable is not None and self.done.peak <= self.machine.chip.hbm

    @property
    def cause(self) -> str:
        """Why it does not fit."""
        if self.done.cause or self.fits:
            return self.done.cause
        return f"the peak {_gib(self.done.peak)} of {_gib(self.machine.chip.hbm)} of memory"

    @property
    def times_of_search(self) -> Times:
        """The times but for main memory's, see _UNTIMED; infinite where it does not fit."""
        found = self.times if self.fits else None
        return Times(math.inf, 0.0, 0.0, 0.0) if found is None else found._replace(memory=0.0)

    @property
    def copies_untimed(self) -> bool:
        """Whether there are copies to the host or back over a link whose rate is not known."""
        kinds = {c.kind for c in self.moved.collectives} if self.moved else set()
        return not self.machine.chip.host and not kinds.isdisjoint((TO_HOST, FROM_HOST))


def plan_of(machine: Machine, program: Program, done: Compiled) -> Plan:
    """The plan of a compiled program, with traffic and times if it fits."""
    if done.executable is None:
        return Plan(machine, program, done)
    devices = list(program.mesh.devices.flat)
    moved = traffic(parse(done.executable.as_text()), len(devices))
    flops = program.work.again / len(devices)
    return Plan(machine, program, done, moved, times_of(machine, devices, flops, moved))


def table(plan: Plan, title: str, largest: str = "") -> Table:
    """The table of a plan. largest: the text about the largest batch, "" for none."""
    columns = "what", Column("value", justify="right"), Column("how it is known", style="dim")
    out = Table(*columns, title=title, title_justify="left", show_header=False)
    mesh = " x ".join(f"{n} {k}" for n, k in plan.program.mesh.shape.items() if k > 1) or "1 device"
    count, used = plan.machine.devices, plan.program.mesh.size
    of_them = f", {used:,} in use" * (used != count)
    out.add_row("machine", str(plan.machine), f"{count:,} device{'s' * (count > 1)}{of_them}")
    out.add_row("mesh", mesh, "")
    verdict = "[bold green]fits[/]" if plan.fits else "[bold red]does not fit[/]"
    judge = f"an estimate: a GPU chooses kernels, and lets jax have {GPU_SHARE:.0%}"
    judge = "XLA's own verdict" if plan.machine.chip.platform == "tpu" else judge
    out.add_row("verdict", verdict, plan.cause or judge)
    if largest:
        out.add_row("largest batch", largest, "compiled at a lower level of optimisation")
    if why := plan.done.kernels[:80]:
        out.add_row("attention", "XLA blocks", f"a GPU with cuDNN uses that: {why}")
    out.add_section()
    for name, size in plan.program.held.items():
        out.add_row(name, _gib(size), "exact, of a device")
    if plan.done.executable is not None:
        peak, room = plan.done.peak, plan.machine.chip.hbm
        arguments = plan.done.executable.memory_analysis().argument_size_in_bytes
        note = "peak less arguments"
        if plan.program.gradients:
            note += f"; gradients are {_gib(plan.program.gradients)}"
        out.add_row(plan.program.inside, _gib(peak - arguments), note)
        out.add_row("peak of a device", _gib(peak), f"{peak / room:.0%} of {_gib(room)}")
    if plan.fits:
        _add_traffic(out, plan)
        _add_times(out, plan)
    out.add_section()
    cpu = f"{plan.done.cpu_seconds:.0f} s of a core, {_gib(plan.done.rss)} of memory"
    out.add_row("compiling", f"{plan.done.seconds:.0f} s", cpu)
    for name, count in plan.done.resharded.most_common(8):
        out.add_row("[yellow]resharded whole[/]", f"{count} x", name)
    return out


def best(plans: Sequence[tuple[Candidate, Plan]], title: str) -> Table:
    """What a search compiled, one line each, with times that leave out main memory's."""
    names = ("verdict", "peak", "arithmetic, exchanges", "compile")
    out = number_table(title, "mesh and remat", *names)
    out.caption, out.caption_justify = _UNTIMED, "left"
    for each, plan in plans:
        peak = _gib(plan.done.peak) if plan.done.executable is not None else ""
        verdict, time = "does not fit", ""
        if plan.fits:
            verdict, times = "fits", plan.times_of_search
            more = " and host copies" * plan.copies_untimed
            time = f"{_seconds(times.least)} to {_seconds(times.most)}{more}"
        out.add_row(str(each), verdict, peak, time, f"{plan.done.seconds:.0f} s")
    return out


def likeliest(found: Sequence[Candidate], title: str, room: int) -> Table:
    """What a search would compile, with what the estimate says of it; room: bytes of a device."""
    out = number_table(title, "mesh and remat", "memory, about", "of", "step time, about")
    for each in found:
        more = "[red]more than [/]" * (each.memory > room)
        out.add_row(str(each), _gib(each.memory), more + _gib(room), _seconds(each.seconds))
    return out


def _add_traffic(out: Table, plan: Plan) -> None:
    out.add_section()
    moved, work, count = plan.moved, plan.program.work, plan.program.mesh.size
    assert moved is not None
    again = work.again / work.model - 1
    more = f"; {again:.0%} more with what is computed again" if again else ""
    out.add_row("FLOPs", f"{work.model / count:.3g}", f"of a device; counted from shapes{more}")
    lost = max(moved.unknown_loops - work.loops, 0)
    loops = f"; {lost} loops of unknown length count once" if lost else ""
    out.add_row("memory traffic", _gib(moved.memory), f"of a device, from the compiled text{loops}")
    # Times, bytes, and the bytes that move while the device computes, by kind.
    kinds: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for each in moved.collectives:
        size = each.times * each.moved
        kinds[each.kind] += each.times, size, size * each.beside
    for kind, (times, size, beside) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        who = "of a device"
        if kind not in (TO_HOST, FROM_HOST):
            overlap = f", {beside / size:.0%} while it computes" if size else ""
            who = f"received by a device{overlap}"
        out.add_row(kind, _gib(size), f"{times:,.0f} a step, {who}, loops multiplied")


def _add_times(out: Table, plan: Plan) -> None:
    out.add_section()
    times, work, machine = plan.times, plan.program.work, plan.machine
    assert times is not None
    names = ("compute", "memory", "links", "network", "host copies")
    for name, seconds in zip(names, times, strict=True):
        if seconds:
            out.add_row(f"{name} time", _seconds(seconds), "at the maker's peak rate")
    if plan.copies_untimed:
        note = f"the rate of {machine.name}'s link to its host is not known: the step takes longer"
        out.add_row("host copies time", "[yellow]not counted[/]", note)
    least, most = times.least, times.most
    span = f"{_seconds(least)} to {_seconds(most)}"
    out.add_row(work.name, span, "all at once; no exchange hidden")
    peak = plan.program.mesh.size * machine.chip.flops
    if work.steps:
        best, worst = (work.model / (peak * t) for t in (least, most))
        note = "an upper bound: products never run at the peak"
        out.add_row("MFU", f"{best:.0%} to {worst:.0%}", note)
    span = f"{work.tokens / least:,.0f} to {work.tokens / most:,.0f}"
    out.add_row("tokens a second", span, work.note)
    if work.steps:
        hours = [machine.chips * work.steps * t / 3600 for t in (least, most)]
        note = f"{work.steps:,} steps, without evaluation and checkpoints"
        out.add_row("chip-hours", f"{_digits(hours[0])} to {_digits(hours[1])}", note)


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:,.2f} MiB"


def _seconds(t: float) -> str:
    return f"{t:,.3g} s" if t >= 0.1 else f"{t * 1e3:,.3g} ms"
