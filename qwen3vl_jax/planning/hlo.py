"""A parser of compiled XLA programs (HLO text): computations, instructions, trip counts of loops."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_HOST = "S(5)"  # the memory space of the host
_FAST = re.compile(r"S\([1-9]\d*\)")  # a memory space other than the device's main memory


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # as written; a tuple is in parentheses
    op: str
    operands: tuple[str, ...]  # names
    given: str  # what stands between the parentheses
    rest: str  # attributes

    def called(self, key: str) -> str | None:
        """The computation of an attribute: calls, body, condition, to_apply."""
        return next((name for k, name in _CALLED.findall(self.rest) if k == key), None)

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = _BRANCHES.findall(self.rest)
        return [n for many, one in found for n in ([one] if one else _NAME.findall(many))]


class Module(NamedTuple):
    """A program: its computations by name, the entry, and the root of each (not always the last)."""

    computations: dict[str, list[Instruction]]
    entry: str
    roots: dict[str, Instruction]


def parse(text: str) -> Module:
    """Reads HLO text as `compiled.as_text()` gives it."""
    computations: dict[str, list[Instruction]] = {}
    roots, entry, current = {}, "", ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            current = _NAME.search(line)[1]  # type: ignore[index]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif line.startswith("  ") and " = " in line and current:
            name, _, right = line.strip().partition(" = ")
            end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
            shape, right = right[:end], right[end:].lstrip()
            start = right.index("(")
            end = _closing(right, start)
            given, rest = right[start + 1 : end], right[end + 1 :]
            head = name.removeprefix("ROOT ").lstrip("%"), shape, right[:start]
            found = Instruction(*head, tuple(_NAME.findall(given)), given, rest)
            computations[current].append(found)
            if name.startswith("ROOT "):
                roots[current] = found
    return Module(computations, entry, roots)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text) - 1


class Part(NamedTuple):
    """One array of a shape: its bytes, and whether it is in main memory or in the host's."""

    size: int
    main: bool
    host: bool


def arrays(shape: str) -> Iterator[Part]:
    """Each array of a shape."""
    for kind, dims, layout in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or "0")[0])
        count = math.prod(map(int, dims.split(","))) if dims else 1
        yield Part(-(-count * bits // 8), not _FAST.search(layout), _HOST in layout)


def result(x: Instruction) -> str:
    """The shape that an instruction makes: of one that runs beside others without what it was given."""
    if not x.op.endswith("-start") or not x.shape.startswith("("):
        return x.shape
    # (what goes in, what comes out, ..), the first perhaps a tuple; a copy has these the other way round.
    nested = x.shape.startswith("((")
    parts = [found[0] for found in _ARRAY.finditer(x.shape, _closing(x.shape, 1) if nested else 0)]
    parts = parts if nested or x.op == "copy-start" else parts[1:]
    return parts[0] if parts else ""


def size(shape: str) -> int:
    """Bytes of all arrays of a shape."""
    return sum(part.size for part in arrays(shape))


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while loop runs: its compiler says so, or it counts up to a constant; else None."""
    if match := re.search(r'known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)', loop.rest):
        return int(match[1])
    condition = loop.called("condition") or ""
    root = module.roots.get(condition)
    if root is None:
        return None
    compared = root
    values = [x for x in module.computations[condition] if x.name in root.operands]
    # A fused comparison of what it is given.
    if inner := root.called("calls"):
        compared = module.roots[inner]
        values += module.computations[inner]
    limits = [int(x.given) for x in values if x.op == "constant" and x.given.isdecimal()]
    less = compared.op == "compare" and "direction=LT" in compared.rest
    return limits[0] if less and len(limits) == 1 else None
