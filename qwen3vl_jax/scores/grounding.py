"""Boxes, points and moments in answers: IoU, point in box, temporal IoU, by the harnesses' rules.

A box reference is {"bbox_2d": [x1, y1, x2, y2]} on the 0-1000 grid, or with "bbox_type" "norm1" (0 to 1) or
"real" (pixels of an image of "width" x "height"), or a text with such a box as an answer has it. A moment is
{"start": seconds, "end": seconds}, or a text. Answers without a box, point or moment give None.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.errors import InputError, shown

Box = tuple[float, float, float, float]
GRID = 1000  # side of the image of boxes that are not in pixels
_SCALES = {"norm1000": GRID, "norm1": 1}
_KEYS = ("bbox_2d", "bbox_type", "width", "height")
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_BRACKET = re.compile(r"\[\s*" + r"(?:\s*,\s*|\s+)".join([f"({_NUMBER})"] * 4) + r"\s*\]")
_PAIR = re.compile(r"[\[(]\s*([-+]?\d+\.?\d*)\s*,\s*([-+]?\d+\.?\d*)\s*[\])]")
_SECONDS, _CLOCK = r"(\d+(?:\.\d+)?)", r"(\d{1,2}:\d{2}(?::\d{2})?)"
_TO = r"\s*[\u2013-]\s*"
_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"  # of the harness's prompt


def iou(answer: str, reference: Any, question: str = "") -> float | None:
    """Intersection over union of the answer's first box and the reference's, 0 to 1.

    As VLMEvalKit's vlmeval/dataset/refcoco.py: numbers up to 1.5 are fractions, up to 1000 the grid, others
    pixels; its Precision@1 is iou@0.5.
    """
    a, width, height = _box_of(reference)
    if (b := _read_box(answer, width, height)) is None:
        return None
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = across * down if across > 0 and down > 0 else 0.0
    union = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (b, a)) - shared
    return shared / union if shared else 0.0


def point(answer: str, reference: Any, question: str = "") -> float | None:
    """1 if the answer's first point lies in the reference's box, edges included, else 0.

    As lmms-eval's tasks/_task_utils/point_format.py and the binary score of tasks/pointbench: whole numbers
    are on the grid, others fractions; the pixel is the number rounded down.
    """
    (x1, y1, x2, y2), width, height = _box_of(reference)
    if (found := _PAIR.search(answer)) is None:
        return None
    grid = 1 if "." in found[1] + found[2] else GRID
    x, y = (int(float(n) / grid * side) for n, side in zip(found.groups(), (width, height)))
    return float(x1 <= x <= x2 and y1 <= y <= y2)


def tiou(answer: str, reference: Any, question: str = "") -> float | None:
    """Intersection over union of the answer's first moment and the reference's, 0 to 1.

    As lmms-eval's tasks/charades_sta/utils.py; its R@1 (IOU@5) is tiou@0.5.
    """
    a, b = _moment_of(reference), _read_moment(answer)
    if b is None:
        return None
    both = max(a[1], b[1]) - min(a[0], b[0])
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0) / both if both > 0 else 0.0


def grid_box(reference: Any) -> Box:
    """The box of a reference on the 0-1000 grid. Raises InputError."""
    (x1, y1, x2, y2), width, height = _box_of(reference)
    return x1 / width * GRID, y1 / height * GRID, x2 / width * GRID, y2 / height * GRID


def with_size(reference: Any, width: int, height: int) -> Any:
    """A reference in pixels with the size of its image, where it does not state one."""
    if not isinstance(reference, Mapping) or reference.get("bbox_type") != "real":
        return reference
    return {"width": width, "height": height, **reference}


def _box_of(reference: Any) -> tuple[Box, float, float]:
    """A reference's box in pixels, and the width and height of its image (GRID if not in pixels)."""
    if isinstance(reference, str):
        if (box := _read_box(reference, GRID, GRID)) is None:
            raise InputError(f"got {shown(reference)}, expected a text with [x1, y1, x2, y2]")
        return box, GRID, GRID
    found = reference if isinstance(reference, Mapping) else {}
    box, kind = found.get("bbox_2d"), found.get("bbox_type", "norm1000")
    sides = [found.get(key) if kind == "real" else GRID for key in ("width", "height")]
    right = kind in (*_SCALES, "real") and isinstance(box, list) and len(box) == 4
    numbers = [*box, *sides] if right and set(found) <= set(_KEYS) else []
    if not numbers or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        expected = '{"bbox_2d": [x1, y1, x2, y2]}, with "bbox_type" norm1000, norm1 or real, or a text'
        raise InputError(f"got {shown(reference)}, expected {expected}")
    x1, y1, x2, y2 = (
        x / _SCALES[kind] * GRID if kind in _SCALES else float(x) for x in numbers[:4]
    )
    # As the boxes of training records: what rounds to the edge is inside.
    ends = [round(x / side * GRID) for x, side in zip((x1, y1, x2, y2), sides * 2)]
    if not (0 <= ends[0] <= ends[2] <= GRID and 0 <= ends[1] <= ends[3] <= GRID):
        inside = f"{sides[0]:g} x {sides[1]:g} pixels" if kind == "real" else f"0 to {_SCALES[kind]}"
        advice = '"bbox_type" says what it counts'
        raise InputError(f"got {box}, expected two corners inside {inside}; {advice}")
    return (x1, y1, x2, y2), *sides


def _read_box(text: str, width: float, height: float) -> Box | None:
    """The first four numbers in brackets, else the first four, in pixels inside the image."""
    found = _BRACKET.search(text)
    numbers = [float(n) for n in (found.groups() if found else re.findall(_NUMBER, text)[:4])]
    if len(numbers) < 4:
        return None
    most = max(map(abs, numbers))
    unit = 1 if most <= 1.5 else GRID if most <= GRID else 0
    sides = (width, height) * 2
    scaled = [n / unit * side if unit else n for n, side in zip(numbers, sides)]
    x1, y1, x2, y2 = (min(max(n, 0.0), side) for n, side in zip(scaled, sides))
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _moment_of(reference: Any) -> tuple[float, float]:
    if isinstance(reference, str):
        found = _read_moment(reference)
    else:
        given = reference if isinstance(reference, Mapping) else {}
        numbers = [given.get("start"), given.get("end")]
        right = len(given) == 2 and all(type(x) in (int, float) for x in numbers)
        found = tuple(map(float, numbers)) if right else None
    if found is None or not 0 <= found[0] < found[1] < math.inf:
        expected = '{"start": seconds, "end": seconds}, or a text as "2.5 - 7 seconds"'
        raise InputError(f"got {shown(reference)}, expected {expected}")
    return found


def _read_moment(text: str) -> tuple[float, float] | None:
    """The first range of an answer, else its first two times, in order; "to" is a dash."""
    lines = re.split(r"[!?\n]", text.lower().replace(_EXAMPLE, "").replace("to", "-"))
    lines = [line for line in lines if re.search("start|end|happen", line)] or lines

    def matches(pattern: str) -> list[tuple[str, ...]]:
        return [found.groups() for line in lines if (found := re.search(pattern, line))]

    clocks = [time for line in lines for time in re.findall(rf"\b{_CLOCK}\b", line)]
    firsts = [times[0] for times in matches(rf"\b{_SECONDS}\b")]
    ranges = [*matches(rf"\b{_CLOCK}{_TO}{_CLOCK}\b"), *matches(_SECONDS + _TO + _SECONDS)]
    last = matches(rf"{_SECONDS}\s*s?{_TO}{_SECONDS}")
    pairs = [*ranges, tuple(clocks[:2]), tuple(firsts[:2]), *last]
    pair = next((pair for pair in pairs if len(pair) == 2), None)
    if pair is None:
        return None
    first, second = map(_seconds, pair)
    return min(first, second), max(first, second)


def _seconds(time: str) -> float:
    """Seconds of "12.5", "1:30" or "1:02:03"."""
    total = 0.0
    for part in time.split(":"):
        total = 60 * total + float(part)
    return total
