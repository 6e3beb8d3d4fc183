"""Composing scans of digits into videos: each digit appears at some second and then stays."""

from dataclasses import dataclass, replace

import numpy as np

from demo import pictures
from demo.pictures import CELL, Picture, Plan, Sheet
from demo.scans import Scans

LEAST_PAIRS, MOST_PAIRS, MOST_DIGITS = 2, 6, 4
# The demo's processor bounds frames x height x width of a video at 256 x 256: 32 cells of 32 x 32
# pixels in all pairs of frames. A frame has at most 9.
CELLS, FRAME_CELLS = 32, 9
RATE = 2.0  # frames a second, at most that of the processor, which then uses every frame
DRIFT = 0.1  # of a digit's side: the most that a digit moves either way


@dataclass(frozen=True)
class Film:
    """A video, ``frames`` uint8 [2 * pairs, H, W, 3] at ``fps`` a second.

    ``pairs`` tells the truth about the first frame of each pair: the digits seen so far.
    """

    frames: np.ndarray
    fps: float
    pairs: tuple[Picture, ...]


def compose(
    rng: np.random.Generator,
    scans: Scans,
    *,
    snap: bool = False,
    distort: bool = False,
    fps: float = RATE,
) -> Film:
    """Plan and draw one video; ``snap`` and ``distort`` as for images.

    Each digit appears with the first frame of a random pair. Paper and strokes stay, noise is drawn
    anew for each frame, and in half of the videos the digits drift a little.
    """
    pairs = int(rng.integers(LEAST_PAIRS, MOST_PAIRS + 1))
    plan = make_plan(rng, scans, pairs)
    if snap:
        plan = pictures.scaled(plan, pictures.snapped(plan.size))
    start = rng.integers(0, pairs, len(plan.scan))
    sheet = pictures.make_sheet(rng, scans, plan, distort)
    reach = DRIFT * plan.side * rng.uniform(-1, 1, (len(plan.scan), 2)) * (rng.random() < 0.5)
    shown = []
    for place in np.linspace(-1, 1, 2 * pairs):
        seen = start <= len(shown) // 2
        shift = np.rint(place * reach).astype(int)
        shown.append(pictures.expose(rng, scans, *_part(plan, sheet, seen, shift)))
    return Film(np.stack([frame.pixels for frame in shown]), fps, tuple(shown[::2]))


def make_plan(rng: np.random.Generator, scans: Scans, pairs: int) -> Plan:
    """Choose digits, the size of a frame, rows and columns, and places.

    The digit ``star`` is there once, others may be there several times.
    """
    count = int(rng.integers(1, MOST_DIGITS + 1))
    high, wide = _pick(rng, count, FRAME_CELLS, FRAME_CELLS, min(FRAME_CELLS, CELLS // pairs))
    rows, cols = _pick(rng, count, high, wide, FRAME_CELLS)
    cells = np.array([high, wide])
    # Within what rounds to this number of cells, but not below a single one.
    size = np.rint(CELL * np.maximum(1, cells + rng.uniform(-0.15, 0.4, 2))).astype(int)
    pitch = size / (rows, cols)
    side = min(pictures.LARGEST, pitch.min() * rng.uniform(0.75, 0.95))
    cell = np.sort(rng.permutation(rows * cols)[:count])
    cell = np.stack([cell // cols, cell % cols], 1)
    offset = rng.uniform(-0.5, 0.5, cell.shape) * (pitch - side)
    star = int(rng.integers(10))
    labels = (star + rng.integers(1, 10, count)) % 10
    labels[rng.integers(count)] = star
    return Plan(
        (int(size[0]), int(size[1])),
        np.array([side, side]),
        (cell + 0.5) * pitch + offset,
        np.array([scans.draw(rng, label) for label in labels]),
        cell,
        (rows, cols),
        star,
    )


def _pick(rng: np.random.Generator, least: int, rows: int, cols: int, most: int) -> tuple[int, int]:
    """Rows and columns at random, up to those given, with ``least`` to ``most`` cells in all."""
    fits = [
        (row, col)
        for row in range(1, rows + 1)
        for col in range(1, cols + 1)
        if least <= row * col <= most and max(row, col) <= MOST_DIGITS
    ]
    return fits[int(rng.integers(len(fits)))]


def _part(plan: Plan, sheet: Sheet, seen: np.ndarray, shift: np.ndarray) -> tuple[Plan, Sheet]:
    """Plan and sheet of the digits that are ``seen`` bool [n], moved by ``shift`` [n, 2] pixels."""
    strokes = [
        (alpha, top + int(down), left + int(right))
        for (alpha, top, left), (down, right), kept in zip(sheet.strokes, shift, seen, strict=True)
        if kept
    ]
    centre = plan.centre[seen] + shift[seen]
    plan = replace(plan, centre=centre, scan=plan.scan[seen], cell=plan.cell[seen])
    return plan, replace(sheet, inks=sheet.inks[seen], strokes=strokes)


def times(film: Film) -> list[str]:
    """The second at which each pair of frames is shown, as the processor spells it: "1.2"."""
    seconds = np.arange(len(film.frames)) / film.fps
    return [f"{second:.1f}" for second in (seconds[::2] + seconds[1::2]) / 2]


def digits_once(film: Film) -> list[int]:
    """The digits that are there once by the end, in rising order."""
    digits, counts = np.unique(film.pairs[-1].labels, return_counts=True)
    return [int(digit) for digit in digits[counts == 1]]


def appears(film: Film, digit: int) -> str:
    """The time of the first pair of frames that shows a digit."""
    seen = [digit in pair.labels for pair in film.pairs]
    return times(film)[seen.index(True)]
