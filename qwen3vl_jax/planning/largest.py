"""The largest batch that fits, by compiling for a few sizes at a lower level of optimisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training.recipe import Recipe

LEVEL = "O1"  # a third of the time of a whole compile; the peak is within some percent of that
_LIMIT = 256  # times the smallest batch

# The bytes that a recipe's step needs, more than the room for one that does not fit; None: not known,
# and it does not fit.
Peak = Callable[[Recipe], int | None]


class _Bracket(NamedTuple):
    """Sizes with what they need: the largest that fits, and the smallest that does not."""

    fits: int
    fails: int  # _LIMIT times the first size where none was tried
    points: dict[int, int]  # size -> bytes, of all tries whose need is known


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
    says where to look.
    """
    now = max(recipe.pack.rows // parts, 1)
    limit = _LIMIT * now
    found = _tried(_Bracket(0, limit, {0: held}), now, known, room)
    wide = 0  # tries in a row that left more than half of what is between two sizes tried
    for _ in range(tries):
        if found.fails - found.fits <= _step(found.fits):
            break
        times = _guess(found, room) if wide < 2 else (found.fits + found.fails) // 2
        try:
            need = peak(of_size(recipe, parts, times))
        except InputError:
            need = None
        before = found
        found = _tried(found, times, need, room)
        halved = 2 * (found.fails - found.fits) <= before.fails - before.fits
        wide = 0 if halved or wide == 2 or found.fails == limit else wide + 1
    return found.fits * parts, found.fails * parts


def _tried(found: _Bracket, times: int, need: int | None, room: int) -> _Bracket:
    points = found.points if need is None else {**found.points, times: need}
    if need is not None and need <= room:
        return _Bracket(times, found.fails, points)
    return _Bracket(found.fits, times, points)


def _step(fits: int) -> int:
    """How near the end is near enough: an eighth."""
    return max(fits // 8, 1)


def _guess(found: _Bracket, room: int) -> int:
    """Where a line through what is known meets the memory, so far from both ends that it tells more."""
    fits, fails = found.fits, found.fails
    times = _crossing(found.points, room)
    if times is None or times >= fails:  # as where it is not known how much a failed one needs
        return (fits + fails) // 2
    last = next(n for n in range(8 * fails // 9, fails) if fails - n <= _step(n))
    return max(min(times, last), fits + _step(fits))


def _crossing(points: Mapping[int, int], room: int) -> int | None:
    """Where a line through two of the points is at `room`: one on each side of it, else the nearest two.

    Of sizes that all fit the line is no flatter than from no rows: peaks grow unevenly, and a line of two
    close sizes may point anywhere.
    """
    under = [n for n in sorted(points) if points[n] <= room]
    over = [n for n in sorted(points) if points[n] > room][:2]
    if over and under != [0]:
        pairs = [(under[-1], over[0])] if under else [tuple(over)]
    elif over:  # that of no rows lies below the line of the others
        pairs = [tuple(over) if len(over) == 2 else (0, over[0])]
    else:
        pairs = [(n, under[-1]) for n in (0, *under[-2:-1])]
    found = [_meets(points, *pair, room) for pair in pairs if len(pair) == 2]
    return min((n for n in found if n is not None), default=None)


def _meets(points: Mapping[int, int], first: int, second: int, room: int) -> int | None:
    grown = points[second] - points[first]
    return second + (room - points[second]) * (second - first) // grown if grown > 0 else None
