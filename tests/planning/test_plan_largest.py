"""--plan: the largest batch that fits, by few compiles."""

from collections import Counter

import numpy as np
import pytest

from qwen3vl_jax.planning import command, compiling, search
from qwen3vl_jax.training import recipe


@pytest.mark.parametrize(
    ("base", "slope", "want"), [(1, 2, 8), (10, 2, 4), (10, 3, 2), (30, 1, 0), (0, 25, 0)]
)
def test_the_largest_batch_is_where_memory_ends(base, slope, want):
    """Peaks that grow evenly with rows, in a room of 20 for rows in steps of two."""
    compiled = []

    def peak(tried):
        compiled.append(tried.pack.rows)
        return base + slope * tried.pack.rows

    settings = recipe.Recipe("x", 1, pack=recipe.Pack(rows=2, vision_rows=4))
    first = peak(settings)
    known = first if first <= 20 else None
    fits, fails = search.largest(settings, 2, known, 20, base, peak, tries=6)
    assert (fits, fails) == (want, want + 2)
    assert len(compiled) == len(set(compiled)) <= 7
    assert search.of_size(settings, 2, 3).pack.vision_rows == 12


def test_a_large_batch_is_not_sought_to_the_last_row():
    """Two compiles beside the recipe's own find 1,000 rows to an eighth."""
    compiled = []

    def peak(tried):
        compiled.append(tried.pack.rows)
        return 10 + tried.pack.rows

    settings = recipe.Recipe("x", 1, pack=recipe.Pack(rows=8, vision_rows=8))
    fits, fails = search.largest(settings, 1, 18, 1010, 10, peak)
    assert fits <= 1000 < fails and fails - fits <= fits // 8 + 1
    assert len(compiled) <= 2


@pytest.mark.parametrize(
    ("rows", "base", "slope", "told"),
    [
        (40, 300, 12, 0.9),  # XLA's number of a program without room is of a part of it
        (40, 300, 12, 1.0),
        (16, 9000, 680, 1.0),
        (1000, 9000, 680, 1.0),
        (100, 9000, 680, None),  # or it has none
    ],
)
def test_what_does_not_fit_tells_where_to_look(rows, base, slope, told):
    """Four tries leave an eighth, also where memory bends: a larger batch needs more for each row."""
    room, compiled = 71190, []

    def peak(tried):
        compiled.append(rows := tried.pack.rows)
        need = base + slope * rows + slope * max(rows - 64, 0) // 2
        if need <= room:
            return need
        return None if told is None else max(int(told * need), room + 1)

    settings = recipe.Recipe("x", 1, pack=recipe.Pack(rows=rows, vision_rows=2 * rows))
    known = peak(settings)
    fits, fails = search.largest(settings, 1, known, room, base, peak)
    assert peak(search.of_size(settings, 1, fits)) <= room
    assert fails in compiled and fails - fits <= fits // 8 + 1


def test_the_largest_batch_is_told_with_what_does_not_fit():
    """Both ends, since rows between them were not tried; XLA's number of a refused program is read."""
    assert command.largest_text(8, 12) == "pack.rows=8 fits, 12 does not"
    assert command.largest_text(0, 2) == "none, 2 rows do not fit"
    refused = compiling.Compiled(None, "HLO temporaries 9G of 15.75G HBM", Counter(), 2.0, 1.0, 0.0)
    assert refused.needed(16 << 30) == (16 << 30) + 1
    for cause, size in (
        ("HLO temporaries 34.5G of 15.75G HBM", round(34.5 * 2**30)),
        ("the program 512.00M of 15.75G HBM", 512 << 20),
        ("RESOURCE_EXHAUSTED: no room", None),
    ):
        assert refused._replace(cause=cause).needed(0) == size


def test_peaks_that_grow_unevenly_do_not_mislead():
    """Those of the 2B on an H100, in 0.01 GiB: between 22 and 29 rows they hardly grow."""
    rows, sizes = (8, 22, 29, 36, 40, 49), (3885, 5855, 6111, 6983, 7455, 9135)

    def peak(tried):
        return int(np.interp(tried.pack.rows, rows, sizes))

    settings = recipe.Recipe("x", 1, pack=recipe.Pack(rows=8, vision_rows=8))
    assert search.largest(settings, 1, peak(settings), 7119, 2103, peak) == (36, 40)
