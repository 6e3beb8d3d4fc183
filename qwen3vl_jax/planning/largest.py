"""The largest pack.rows that fits, by few compiles, each at a lower level of optimisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training.recipe import Recipe

LEVEL = "O1"  # a third of the time of a whole compile; the peak is within some percent of that
_LIMIT = 256  # times the smallest batch

# The bytes that a recipe's step needs, more than the room for one that does not fit; None: not known,
# and it does not fit.
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

    known: what the recipe itself needs, None where that is not known and it does not fit. room, held:
    bytes of a device, and of what it holds before the step. Memory grows about evenly with rows, which
    says where to look: on the line through the sizes next to the end, and in the middle after two tries
    that did not halve what is left.
    """
    times, need, wide = max(recipe.pack.rows // parts, 1), known, 0
    limit, points = _LIMIT * times, {0: held}
    fits, fails = 0, limit
    for left in range(tries, -1, -1):
        before = fails - fits
        if need is not None:
            points[times] = need
        if need is not None and need <= room:
            fits = times
        else:
            fails = times
        halved = 2 * (fails - fits) <= before or fails == limit
        wide = 0 if halved or wide == 2 or left == tries else wide + 1
        step = max(fits // 8, 1)  # near enough: an eighth
        if not left or fails - fits <= step:
            break
        line = _crossing(points, fits, fails, room)
        times = (fits + fails) // 2
        if wide < 2 and line < fails:  # no nearer to an end than ends the search
            times = max(min(line, -(-8 * fails // 9)), fits + step)
        try:
            need = peak(of_size(recipe, parts, times))
        except InputError:
            need = None
    return fits * parts, fails * parts


def _crossing(points: dict[int, int], fits: int, fails: int, room: int) -> int:
    """Where a line through two sizes is at `room`: one on each side of it, else the nearest two.

    Of sizes that all fit the line is no flatter than from no rows: peaks grow unevenly, and a line of two
    close sizes may point anywhere. No rows lie below the line of the others.
    """
    under, over = sorted(n for n in points if n <= fits), sorted(n for n in points if n >= fails)
    mixed = [(over[0], fits or (*over[1:2], 0)[0])] if over else []
    pairs = mixed or [(fits, n) for n in (0, *under[-2:-1])]
    found = [fails]
    for a, b in pairs:
        if (points[a] - points[b]) * (a - b) > 0:
            found.append(a + (room - points[a]) * (a - b) // (points[a] - points[b]))
    return min(found)
