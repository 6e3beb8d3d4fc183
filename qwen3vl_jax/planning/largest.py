"""The largest batch that fits, by compiling for a few sizes at a lower level of optimisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training.recipe import Recipe

LEVEL = "O1"  # a third of the time of a whole compile; the peak is within some percent of that
_LIMIT = 256  # times the smallest batch

# The peak bytes of a recipe's step, None where XLA refuses it.
Peak = Callable[[Recipe], int | None]


def of_size(recipe: Recipe, parts: int, times: int) -> Recipe:
    """The recipe with `times` rows of tokens for each of `parts`, and patches in proportion."""
    pack = recipe.pack
    rows = parts * times
    seen = -(-pack.vision_rows * rows // (pack.rows * parts)) * parts
    pack = dataclasses.replace(pack, rows=rows, vision_rows=seen)
    return dataclasses.replace(recipe, pack=pack)


def largest(
    recipe: Recipe, parts: int, known: int | None, room: int, held: int, peak: Peak, tries: int = 4
) -> tuple[int, int]:
    """(rows that fit, the fewest rows known not to) after at most `tries` compiles; 0 is none.

    known: the peak of the recipe itself, None where it does not fit. room, held: bytes of a device,
    and of what it holds before the step. Memory grows evenly with rows, which says where to look.
    """
    now = max(recipe.pack.rows // parts, 1)
    fits, fails = (now, _LIMIT * now) if known is not None else (0, now)
    points = {now: known} if known is not None else {}
    for _ in range(tries):
        if fails - fits <= _step(fits):
            break
        times = _guess(points, room, held, fits, fails)
        try:
            found = peak(of_size(recipe, parts, times))
        except InputError:
            found = None
        if found is not None and found <= room:
            fits, points[times] = times, found
        else:
            fails = times
    return fits * parts, fails * parts


def _step(fits: int) -> int:
    """How near the end is near enough: an eighth."""
    return max(fits // 8, 1)


def _guess(points: dict[int, int], room: int, held: int, fits: int, fails: int) -> int:
    """Where a line through the peaks known so far meets the memory, between both and not near them."""
    sizes = sorted(points)[-2:]
    if not sizes:
        return (fits + fails) // 2
    (x, y), (x0, y0) = (sizes[-1], points[sizes[-1]]), (0, held)
    if len(sizes) == 2:
        x0, y0 = sizes[0], points[sizes[0]]
    slope = max((y - y0) / (x - x0), 1)
    return min(max(int(x + (room - y) / slope), fits + _step(fits)), fails - 1)
