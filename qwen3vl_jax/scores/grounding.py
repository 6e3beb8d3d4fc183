"""Boxes, points and moments in answers, read and scored by the harnesses' rules.

A reference is {"bbox_2d": [x1, y1, x2, y2]} on the 0-1000 grid, or in pixels with "bbox_type": "real" and
the image's "width" and "height"; {"start": seconds, "end": seconds}; or a text, read as an answer is.
"""

import re
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.errors import InputError, shown

Box = tuple[float, float, float, float]
GRID = 1000
_KEYS = {"bbox_2d", "bbox_type", "width", "height"}
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_BRACKET = re.compile(r"\[\s*" + r"(?:\s*,\s*|\s+)".join([f"({_NUMBER})"] * 4) + r"\s*\]")
_PAIR = re.compile(r"[\[(]\s*([-+]?\d+\.?\d*)\s*,\s*([-+]?\d+\.?\d*)\s*[\])]")
_SECONDS, _CLOCK = r"(\d+(?:\.\d+)?)", r"(\d{1,2}:\d{2}(?::\d{2})?)"
_TO = r"\s*[\u2013-]\s*"
_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"  # of the harness's prompt


def iou(answer: str, reference: Any, question: str = "") -> float | None:
    """Intersection over union of the answer's first box and the reference's.

    VLMEvalKit, vlmeval.dataset.refcoco: up to 1.5 are fractions, up to 1000 the grid, else pixels.
    """
    a, width, height = box_of(reference)
    if (b := _read_box(answer, width, height)) is None:
        return None
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    areas = ((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (b, a))
    return across * down / (sum(areas) - across * down)


def point(answer: str, reference: Any, question: str = "") -> float | None:
    """1 if the answer's first point lies in the reference's box, edges included, else 0.

    lmms-eval, tasks._task_utils.point_format and tasks.pointbench.utils: whole numbers are on the
    grid, others fractions; pixels are rounded down.
    """
    (x1, y1, x2, y2), *sides = box_of(reference)
    if (found := _PAIR.search(answer)) is None:
        return None
    unit = 1 if "." in found[1] + found[2] else GRID
    x, y = (int(float(n) / unit * side) for n, side in zip(found.groups(), sides))
    return float(x1 <= x <= x2 and y1 <= y <= y2)


def tiou(answer: str, reference: Any, question: str = "") -> float | None:
    """Intersection over union of the answer's first moment and the reference's.

    lmms-eval, tasks.charades_sta.utils.
    """
    a, b = _moment_of(reference), _read_moment(answer)
    if b is None:
        return None
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return max(shared, 0) / (max(a[1], b[1]) - min(a[0], b[0]))


def box_of(reference: Any) -> tuple[Box, float, float]:
    """A reference's box, and the width and height that it lies in, GRID where it is not in pixels."""
    given = reference if isinstance(reference, Mapping) else {}
    box, form = given.get("bbox_2d"), given.get("bbox_type", "norm1000")
    sides: list[Any] = [GRID, GRID]
    if form == "real":
        sides = [given.get("width"), given.get("height")]
    if isinstance(reference, str):
        box = _read_box(reference, GRID, GRID)
    numbers = [*box, *sides] if isinstance(box, list | tuple) and len(box) == 4 else []
    right = bool(numbers) and form in ("real", "norm1000") and given.keys() <= _KEYS
    if right and all(type(x) in (int, float) for x in numbers) and min(sides) > 0:
        # As the boxes of training records: what rounds to the edge is inside.
        x1, y1, x2, y2 = (round(x / side * GRID) for x, side in zip(numbers, sides * 2))
        if 0 <= x1 <= x2 <= GRID and 0 <= y1 <= y2 <= GRID:
            return (numbers[0], numbers[1], numbers[2], numbers[3]), sides[0], sides[1]
    expected = '{"bbox_2d": [x1, y1, x2, y2]}, corners from 0 to 1000'
    advice = 'with "bbox_type": "real", "width" and "height" they are pixels of the image'
    raise InputError(f"got {shown(reference)}, expected {expected}; {advice}")


def _read_box(text: str, width: float, height: float) -> Box | None:
    """The first four numbers in brackets, else the first four, as a box inside the image."""
    found = _BRACKET.search(text)
    numbers = [float(n) for n in (found.groups("") if found else re.findall(_NUMBER, text))]
    if len(numbers) < 4:
        return None
    most, sides = max(map(abs, numbers[:4])), (width, height) * 2
    if most <= GRID:
        unit = 1 if most <= 1.5 else GRID
        numbers = [n / unit * side for n, side in zip(numbers, sides)]
    x1, y1, x2, y2 = (min(max(n, 0.0), side) for n, side in zip(numbers, sides))
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _moment_of(reference: Any) -> tuple[float, float]:
    found = _read_moment(reference) if isinstance(reference, str) else None
    if isinstance(reference, Mapping) and set(reference) == {"start", "end"}:
        found = reference["start"], reference["end"]
    if found is None or not all(type(x) in (int, float) for x in found) or found[0] >= found[1]:
        expected = '{"start": seconds, "end": seconds}, or a text as "2.5 - 7 seconds"'
        raise InputError(f"got {shown(reference)}, expected {expected}")
    return found


def _read_moment(text: str) -> tuple[float, float] | None:
    """The first range of an answer, else its first two times, in order; "to" is a dash."""
    lines = re.split(r"[!?\n]", text.lower().replace(_EXAMPLE, "").replace("to", "-"))
    lines = [line for line in lines if re.search("start|end|happen", line)] or lines

    def matches(pattern: str) -> list[Any]:
        return [found.groups() for line in lines if (found := re.search(pattern, line))]

    clocks = [time for line in lines for time in re.findall(rf"\b{_CLOCK}\b", line)]
    firsts = [times[0] for times in matches(rf"\b{_SECONDS}\b")]
    ranges = [*matches(rf"\b{_CLOCK}{_TO}{_CLOCK}\b"), *matches(_SECONDS + _TO + _SECONDS)]
    pairs = [*ranges, clocks[:2], firsts[:2], *matches(rf"{_SECONDS}\s*s?{_TO}{_SECONDS}")]
    for pair in pairs:
        if len(pair) == 2:
            first, second = map(_seconds, pair)
            return min(first, second), max(first, second)
    return None


def _seconds(time: str) -> float:
    """Seconds of "12.5", "1:30" or "1:02:03"."""
    *before, seconds = time.split(":")
    return sum(int(n) * 60**power for power, n in enumerate(reversed(before), 1)) + float(seconds)
