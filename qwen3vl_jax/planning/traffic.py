"""Traffic of a compiled program: bytes of main memory, and bytes between devices by collective.

Read from the program's text. What stands in the body of a loop counts as often as the loop runs; of
the branches of a conditional the one that moves least counts.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qwen3vl_jax.planning.hlo import Instruction, Module, arrays, result, size, trip_count

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BETWEEN = " between slices"
TO_HOST, FROM_HOST = "copies to the host", "copies from the host"
# libtpu leaves what crosses slices to the runtime of the hosts: a send and a recv for each exchange,
# with slices x devices, or with groups of devices whose number is their slice's times _SLICE.
_TARGET = re.compile(r'_xla_megascale_target="?(\{[-\d,:>{}x]+\})')
_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICE = 100_000
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}"
)
_FREE = """
    parameter constant tuple get-tuple-element bitcast after-all iota partition-id replica-id
    opt-barrier while conditional call add-dependency
""".split()
# What is written in place, and which operand that is.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# These hold the same values, and are looked through.
_CLEAR = ("bitcast", "convert", "copy", "reshape", "transpose")


class Collective(NamedTuple):
    """One exchange, as often as it happens in a step; also a copy to the host or back."""

    kind: str  # of KINDS, or that and BETWEEN, or TO_HOST, FROM_HOST
    times: float
    moved: float  # bytes that each device must receive, once; TO_HOST: send
    group: tuple[int, ...]  # positions in the mesh of the first group of devices; empty: the host
    beside: bool = False  # the device computes meanwhile


class Traffic(NamedTuple):
    """Of one device, for one run of the program."""

    memory: float  # bytes read and written in main memory
    collectives: list[Collective]
    unknown_loops: int  # counted once, for nothing says how often they run


def traffic(module: Module, devices: int, name: str | None = None, times: float = 1.0) -> Traffic:
    """Adds up a program (name None), or one computation that runs so many times.

    `memory` is of one run.
    """
    name = module.entry if name is None else name
    memory, unknown, found = 0.0, 0, list[Collective]()
    shapes = {x.name: x.shape for x in module.computations[name]}
    for x in module.computations[name]:
        count, inside = 1, list[str]()
        if x.op == "while":
            known = trip_count(module, x)
            unknown += known is None
            count, inside = known or 1, [x.called("body") or ""]
        elif x.op in ("conditional", "call"):
            inside = x.branches() if x.op == "conditional" else [x.called("to_apply") or ""]
        elif x.op not in _FREE and not x.op.endswith("-done"):
            given = [shapes.get(operand, "") for operand in x.operands]
            memory += _memory(module, x, given)
            found += _host_copies(x, given, times)
        if inside:
            parts = (traffic(module, devices, part, times * count) for part in inside)
            least = min(parts, key=lambda part: part.memory)
            memory, unknown = memory + count * least.memory, unknown + least.unknown_loops
            found += least.collectives
    return Traffic(memory, [*found, *_collectives(module, name, times, devices)], unknown)


def _collectives(module: Module, name: str, times: float, devices: int) -> Iterator[Collective]:
    """Those of one computation and of what is fused in it.

    One that runs beside several fusions stands in each of them, with the same channel. Outside of
    fusions a channel tells nothing: those of a `shard_map` all have the same.
    """
    seen = set()
    for x, held, scatters in _inside(module, name):
        kind = x.op.removesuffix("-start")
        if x.op == "recv" and (found := _between_slices(x, times)):
            yield found
        if kind not in KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", x.rest)
        group = _group(x.rest, devices)
        key = (kind, channel[1] if held == "fusion" and channel else x.name, group)
        if key not in seen:
            seen.add(key)
            kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
            started = x.op.endswith("-start") or held.endswith("-start")
            beside = started or (held == "fusion" and not scatters)
            parts = [part.size for part in arrays(x.shape)]
            # (what goes in, what comes out, ..)
            if x.op.endswith("-start") and kind != "all-reduce":
                parts = parts[len(x.operands) : 2 * len(x.operands)]
            # A reduce-scatter written as an all-reduce makes the whole array.
            whole = kind == "reduce-scatter" and not x.op.startswith(kind)
            moved = sum(parts) * _received("all-gather" if whole else kind, len(group))
            yield Collective(kind, times, moved, group, beside)


def _received(kind: str, count: int) -> float:
    """Of the bytes that a collective makes, how many times as much each of `count` devices receives."""
    times = {"all-reduce": 2 * (count - 1) / count, "reduce-scatter": count - 1.0}
    return times.get(kind, (count - 1) / count if kind.startswith("all-") else 1.0)


def _host_copies(x: Instruction, shapes: list[str], times: float) -> Iterator[Collective]:
    """What is written to the memory of the host or read of it, as remat "offload" does."""
    given = [part for shape in shapes for part in arrays(shape)]
    made = list(arrays(result(x)))
    # An update of a part of it, or all.
    if any(part.host for part in made):
        if sent := max((part.size for part in given if not part.host), default=0):
            yield Collective(TO_HOST, times, float(sent), ())
    elif any(part.host for part in given):
        yield Collective(FROM_HOST, times, float(sum(part.size for part in made)), ())


def _inside(module: Module, name: str) -> Iterator[tuple[Instruction, str, bool]]:
    """Instructions of a computation and of those that it fuses or starts.

    With each: what holds it ("", "fusion", or a start: "async-start", "call-start"), and whether an
    all-reduce is cut up there. call-start: a SparseCore runs it, beside the rest of its chip.
    """
    for x in module.computations[name]:
        inner = x.called("calls") if x.op in ("fusion", "async-start") else None
        inner = x.called("to_apply") if x.op == "call-start" else inner
        if inner is None:
            yield x, "", False
            continue
        for y, deep, scatters in _inside(module, inner):
            held = x.op if x.op != "fusion" else deep or x.op
            yield y, held, scatters or "all-reduce-scatter" in inner


def _between_slices(x: Instruction, times: float) -> Collective | None:
    """What one device receives from its like in other slices, from a recv of the hosts' runtime."""
    target, exchange = _TARGET.search(x.rest), _TYPE.search(x.rest)
    if not target or not exchange:
        return None
    if match := re.fullmatch(r"\{([\d,:]+)\}x\{([\d,:]+)\}", target[1]):
        slices, inside = _numbers(match[1]), len(_numbers(match[2]))
    else:
        first = re.findall(r"\d+", target[1].partition("}")[0])
        slices = sorted({int(n) // _SLICE for n in first})
        every = {int(n) for n in re.findall(r"\d+", target[1])}
        inside = sum(n // _SLICE == slices[0] for n in every)
    kind = exchange[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    moved = _received(kind, len(slices)) * next(arrays(x.shape)).size
    group = tuple((n - min(slices)) * inside for n in slices)
    return Collective(kind + BETWEEN, times, moved, group)


def _numbers(text: str) -> list[int]:
    """1,2,5:7 as 1 2 5 6 7."""
    ends = (tuple(map(int, part.split(":"))) for part in text.split(","))
    return [n for end in ends for n in range(end[0], end[-1] + 1)]


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group of a collective: lists, a cut iota, or axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pairs[1]), int(pairs[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, match[1].split(",")))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return tuple(_iota(match[2]).reshape(_ints(match[1]))[0].tolist())
    if named := _NAMED_GROUPS.search(text):
        sizes = {n: int(k) for n, k in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        ids = ids.reshape(tuple(sizes.values()))
        wanted = re.findall(r"'([^']+)'", named[3])
        return tuple(ids[tuple(slice(None) if n in wanted else 0 for n in sizes)].ravel().tolist())
    return tuple(range(devices))


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): numbers from 0 in this shape, transposed."""
    dims, order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _memory(module: Module, x: Instruction, given: list[str]) -> float:
    """Bytes of main memory that one instruction reads and writes. given: the shapes of its operands."""
    # The result of what runs beside others begins with what it is given.
    ends = list(arrays(x.shape))[:2]
    if x.op == "fusion" and (inner := x.called("calls")):
        moved = sum(_touched(module, inner, i, shape) for i, shape in enumerate(given))
        moved += _written(module, inner, x.shape)
    elif x.op == "dynamic-update-slice":
        moved = 2 * _main(given[1])
    elif x.op in ("dynamic-slice", "slice", "gather"):
        moved = 2 * _main(x.shape)
    elif x.op == "scatter":
        moved = 3 * _main(given[-1])
    elif x.op in ("send", "recv"):
        moved = ends[0].size
    # It reads as much as it writes.
    elif x.op == "slice-start" and len(ends) > 1:
        moved = ends[1].size * (1 + ends[1].main)
    elif x.op.endswith("-start") and x.shape.startswith("("):
        moved = sum(end.size for end in ends if end.main)
    else:
        moved = sum(map(_main, given)) + _main(x.shape)
    return moved


def _main(shape: str) -> int:
    return sum(part.size for part in arrays(shape) if part.main)


def _touched(module: Module, name: str, number: int, shape: str) -> int:
    """Bytes that a fusion reads of its argument: of one that it only takes slices of, the slices."""
    full, body = _main(shape), module.computations[name]
    mine = [x.name for x in body if x.op == "parameter" and x.given.strip() == str(number)]
    if not full or not mine:
        return full
    total, left = 0, mine[:1]
    while left:
        value = left.pop()
        for x in (x for x in body if value in x.operands):
            if x.op in ("dynamic-slice", "slice", "gather") and x.operands[0] == value:
                total += size(x.shape)
            elif x.op in _CLEAR and x is not module.roots[name]:
                left.append(x.name)
            elif x.op == "fusion" and (inner := x.called("calls")):
                places = [i for i, n in enumerate(x.operands) if n == value]
                total += sum(_touched(module, inner, i, shape) for i in places)
            # Those are written in place.
            elif x.op not in _UPDATES or x.operands[0] != value:
                return full
    return min(total, full)


def _written(module: Module, name: str, shape: str) -> int:
    """Bytes that a fusion writes: of what it updates in place, the update."""
    body = {x.name: x for x in module.computations[name]}
    root = module.roots[name]
    results = [body[n] for n in root.operands] if root.op == "tuple" else [root]
    parts = list(arrays(shape))
    if len(parts) != len(results):
        return _main(shape)
    total = 0
    for x, (full, main, _) in zip(results, parts, strict=True):
        source = x
        while source.op in _CLEAR and source.operands and source.operands[0] in body:
            source = body[source.operands[0]]
        update = _UPDATES.get(source.op)
        small = full if update is None else size(body[source.operands[update]].shape)
        total += small if main else 0
    return total
