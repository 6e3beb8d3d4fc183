"""Composing scans of digits into images: where each digit goes, its colours, and the drawing.

An image is planned in continuous coordinates and drawn afterwards, so that a training image can
be drawn at once at the size the processor would resize it to.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from demo.scans import BORDER, Scans

MAX_ROWS, MAX_COLS, MAX_STAR = 4, 5, 5
AREA = 57_600  # largest planned image; rounding its sides to 32 stays within 256 x 256
SMALLEST, LARGEST = 24.0, 80.0  # side of a drawn scan in pixels
CELL = 32  # an image's sides are rounded to this, patch size x merge size
BOX_INK = 0.4  # the box of a digit surrounds its pixels with more ink than this


@dataclass(frozen=True)
class Plan:
    """What to draw: ``n`` scans at ``centre`` [n, 2] (y, x) with ``side`` [2] pixels (y, x).

    ``scan`` [n] indexes the scans; ``cell`` [n, 2] is each digit's row and column, from 0;
    ``grid`` counts rows and columns; ``star`` is the digit planned to appear several times.
    """

    size: tuple[float, float]
    side: np.ndarray
    centre: np.ndarray
    scan: np.ndarray
    cell: np.ndarray
    grid: tuple[int, int]
    star: int


@dataclass(frozen=True)
class Picture:
    """A drawn image, ``pixels`` uint8 [H, W, 3], and the truth about it.

    ``labels`` [n], ``cell`` [n, 2] and ``boxes`` [n, 4] (x0 y0 x1 y1 in pixels) describe its
    digits in reading order; ``full`` says that every cell of the ``grid`` holds a digit.
    """

    pixels: np.ndarray
    labels: np.ndarray
    cell: np.ndarray
    boxes: np.ndarray
    grid: tuple[int, int]
    full: bool
    star: int


@dataclass(frozen=True)
class Sheet:
    """What a plan is drawn with: ``paper`` float32 [3, H, W] and ``inks`` [n, 3], levels to 255.

    ``strokes`` holds each digit's share of ink [h, w], 0 to 1, with its top and left in pixels.
    """

    paper: np.ndarray
    inks: np.ndarray
    strokes: list[tuple[np.ndarray, int, int]]


def compose(
    rng: np.random.Generator,
    scans: Scans,
    *,
    loose: bool,
    snap: bool = False,
    distort: bool = False,
    grid: tuple[int, int] | None = None,
) -> Picture:
    """Plan and draw one image.

    ``loose`` leaves cells empty and moves digits about; ``snap`` draws at sides that are multiples
    of 32, squeezing the plan as the processor would; ``distort`` bends every scan a little (for
    training); ``grid`` fixes rows and columns.
    """
    plan = make_plan(rng, scans, loose, grid)
    if snap:
        plan = scaled(plan, snapped(plan.size))
    return draw(rng, scans, plan, distort)


def snapped(size: tuple[float, float]) -> tuple[int, int]:
    """Round a planned size to the multiples of 32 that the processor resizes to."""
    height, width = (max(CELL, CELL * round(side / CELL)) for side in size)
    return height, width


def centre_cells(image: Picture) -> np.ndarray:
    """The 32 x 32 cell (x, y) that holds the middle of each digit once resized: int [n, 2]."""
    size = image.pixels.shape[:2]
    high, wide = (side // CELL for side in snapped(size))
    middle = (image.boxes[:, :2] + image.boxes[:, 2:]) / 2 * (wide / size[1], high / size[0])
    return np.minimum(middle, (wide - 1, high - 1)).astype(int)


def make_plan(
    rng: np.random.Generator, scans: Scans, loose: bool, grid: tuple[int, int] | None = None
) -> Plan:
    """Choose grid, sizes, places and scans."""
    rows, cols = grid or (
        int(rng.integers(1, MAX_ROWS + 1)),
        int(rng.integers(1, MAX_COLS + 1)),
    )
    gap = rng.uniform(0.1, 0.8 if loose else 0.5, 2)
    margin = rng.uniform(0.1, 0.8, (2, 2))  # axis, before and after
    cells = np.array([rows, cols])
    span = cells * (1 + gap) + margin.sum(1)  # in units of a digit's side
    largest = min(LARGEST, np.sqrt(AREA / span.prod()))
    side = np.exp(rng.uniform(np.log(SMALLEST), np.log(max(largest, SMALLEST))))
    height, width = np.ceil(span * side).astype(int)

    cell = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), -1).reshape(-1, 2)
    if loose:
        keep = rng.random(len(cell)) < rng.uniform(0.5, 1.0)
        keep[rng.integers(len(cell))] = True
        cell = cell[keep]
    reach = gap / 2 if loose else np.minimum(gap / 2, 0.1)
    offset = rng.uniform(-1, 1, cell.shape) * reach
    centre = side * (margin[:, 0] + (cell + 0.5) * (1 + gap) + offset)
    labels, star = _labels(rng, len(cell))
    scan = np.array([scans.draw(rng, label) for label in labels])
    return Plan(
        (int(height), int(width)),
        np.array([side, side]),
        centre,
        scan,
        cell,
        (rows, cols),
        star,
    )


def _labels(rng: np.random.Generator, count: int) -> tuple[np.ndarray, int]:
    """Labels for an image, half the time with one digit planned to appear 0 to 5 times."""
    labels = rng.integers(0, 10, count)
    star = int(rng.integers(10))
    if rng.random() < 0.5:
        return labels, star
    labels = (star + rng.integers(1, 10, count)) % 10
    times = int(rng.integers(0, min(count, MAX_STAR) + 1))
    labels[rng.permutation(count)[:times]] = star
    return labels, star


def scaled(plan: Plan, size: tuple[int, int]) -> Plan:
    factor = np.array(size) / np.array(plan.size)
    return replace(plan, size=size, side=plan.side * factor, centre=plan.centre * factor)


def draw(rng: np.random.Generator, scans: Scans, plan: Plan, distort: bool = False) -> Picture:
    """Draw a plan: paper, ink, then a little noise."""
    return expose(rng, scans, plan, make_sheet(rng, scans, plan, distort))


def make_sheet(rng: np.random.Generator, scans: Scans, plan: Plan, distort: bool = False) -> Sheet:
    """Choose a plan's paper and inks, and draw the stroke of each of its digits."""
    height, width = int(plan.size[0]), int(plan.size[1])
    colour, inks = _colours(rng, len(plan.scan))
    paper = colour[:, None, None] + _shade(rng, height, width)
    threshold, softness = rng.uniform(0.15, 0.35), rng.uniform(0.4, 0.65)
    strokes = []
    for scan, centre in zip(plan.scan, plan.centre, strict=True):
        value, top, left = _sample(rng, scans.ink[scan], plan.side, centre, distort)
        strokes.append((np.clip((value - threshold) / softness, 0, 1), top, left))
    return Sheet(paper, inks, strokes)


def expose(rng: np.random.Generator, scans: Scans, plan: Plan, sheet: Sheet) -> Picture:
    """Lay the strokes of a plan's digits on the paper and add a little noise."""
    canvas = sheet.paper.copy()
    height, width = canvas.shape[1:]
    boxes = np.empty((len(plan.scan), 4), np.float32)
    for i, stroke in enumerate(sheet.strokes):
        alpha, top, left = _crop(*stroke, height, width)
        boxes[i] = _box(alpha, top, left)
        part = canvas[:, top : top + alpha.shape[0], left : left + alpha.shape[1]]
        part += alpha * (sheet.inks[i][:, None, None] - part)
    canvas += _noise(rng, height, width)
    return Picture(
        np.clip(canvas, 0, 255, out=canvas).astype(np.uint8).transpose(1, 2, 0),
        scans.labels[plan.scan],
        plan.cell,
        boxes,
        plan.grid,
        len(plan.scan) == plan.grid[0] * plan.grid[1],
        plan.star,
    )


def _colours(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A paper colour [3] and an ink colour a digit [n, 3] that differ clearly in brightness."""
    dark, light = rng.uniform(0, 90, 3), rng.uniform(165, 255, 3)
    if rng.random() < 0.4:
        dark[:] = dark[0]
    if rng.random() < 0.4:
        light[:] = light[0]
    paper, ink = (light, dark) if rng.random() < 0.65 else (dark, light)
    inks = np.tile(ink, (count, 1))
    if rng.random() < 0.25:  # every digit in a pen of its own
        inks = np.clip(inks + rng.uniform(-60, 60, inks.shape), 0, 255)
    return paper.astype(np.float32), inks.astype(np.float32)


def _shade(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Light that falls in from one side: float32 [H, W], at most 18 levels either way."""
    slope = rng.uniform(-9, 9, 2).astype(np.float32)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    return slope[0] * down + slope[1] * np.linspace(-1, 1, width, dtype=np.float32)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Grain of at most 6 levels, float32 [H, W]: a random part of one sheet, made once."""
    sheet = _grain(max(512, height, width))
    top, left = (int(rng.integers(len(sheet) - side + 1)) for side in (height, width))
    return sheet[top : top + height, left : left + width] * np.float32(rng.uniform(0, 6))


@cache
def _grain(side: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((side, side), np.float32)


def _sample(
    rng: np.random.Generator,
    ink: np.ndarray,
    side: np.ndarray,
    centre: np.ndarray,
    distort: bool,
) -> tuple[np.ndarray, int, int]:
    """Read an enlarged scan bilinearly around ``centre``: values [h, w], top and left."""
    reach = 0.5 * side * (1.2 if distort else 1.0)
    top, left = np.floor(centre - reach).astype(int)
    bottom, right = np.ceil(centre + reach).astype(int) + 1
    v = ((np.arange(top, bottom) + 0.5 - centre[0]) * (2 / side[0])).astype(np.float32)[:, None]
    u = ((np.arange(left, right) + 0.5 - centre[1]) * (2 / side[1])).astype(np.float32)[None]
    if distort:
        v, u = _bend(rng, v, u)
    half = ink.shape[0] / 2 - BORDER  # pixels of the enlarged scan from its middle to its edge
    limit = 2 * (half + BORDER) - 1.001
    y = np.clip((v + 1) * half + (BORDER - 0.5), 0, limit)
    x = np.clip((u + 1) * half + (BORDER - 0.5), 0, limit)
    y0, x0 = y.astype(np.intp), x.astype(np.intp)
    fy, fx = (y - y0).astype(np.float32), (x - x0).astype(np.float32)
    flat, at = ink.reshape(-1), y0 * ink.shape[1] + x0
    upper, lower = (_between(flat[i], flat[i + 1], fx) for i in (at, at + ink.shape[1]))
    return _between(upper, lower, fy), int(top), int(left)


def _between(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a + share * (b - a)


def _bend(rng: np.random.Generator, v: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn, stretch, slant, curve and wave coordinates a little; v [h, 1] and u [1, w] to [h, w]."""
    angle, slant = rng.normal(0, 0.12, 2)
    stretch, shift = np.exp(rng.normal(0, 0.1, 2)), rng.normal(0, 0.04, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [slant - sin, cos]] * stretch[:, None], np.float32)
    curve = rng.normal(0, 0.06, (2, 3)).astype(np.float32)
    height, pace, phase = rng.uniform(
        [[-0.06], [1.5], [0]], [[0.06], [4], [2 * np.pi]], (3, 2)
    ).astype(np.float32)
    down, right = v * v - 0.5, u * u - 0.5
    both, out = u * v, []
    for i, along in enumerate((u, v)):  # all but one term is of v or of u alone, which is cheap
        wave = height[i] * np.sin(pace[i] * along + phase[i]) + np.float32(shift[i])
        rows, cols = turn[i, 0] * v + curve[i, 0] * down, turn[i, 1] * u + curve[i, 2] * right
        rows, cols = (rows, cols + wave) if i == 0 else (rows + wave, cols)
        out.append(curve[i, 1] * both + rows + cols)
    return out[0], out[1]


def _crop(
    alpha: np.ndarray, top: int, left: int, height: int, width: int
) -> tuple[np.ndarray, int, int]:
    alpha = alpha[max(0, -top) : height - top, max(0, -left) : width - left]
    return alpha, max(0, top), max(0, left)


def _box(alpha: np.ndarray, top: int, left: int) -> tuple[float, float, float, float]:
    """Box (x0 y0 x1 y1) around the inked pixels, in the image's pixels."""
    rows = np.flatnonzero((alpha > BOX_INK).any(1))
    cols = np.flatnonzero((alpha > BOX_INK).any(0))
    return left + cols[0], top + rows[0], left + cols[-1] + 1, top + rows[-1] + 1
