"""One file of lines answered by several processes, each a replica of the model with its own share.

Every process keeps what it finished in a log of its own, on a disk that the others see or not. At the
end process 0 is sent all answers, and puts them in order. Whoever is killed, the same command goes
on, with any number of processes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.cli.batch import (
    Load,
    Settings,
    answer_lines,
    report_errors,
    work_settings,
)
from qwen3vl_jax.cli.batch_journal import Journal, Line, read_lines
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.runtime.distributed import (
    agreed,
    all_of,
    check_alike,
    from_first,
    wait_for_all,
)

SENT = 4 << 20  # bytes that a process sends at a time


def answer_file_together(
    load: Load,
    proc: Processor,
    source: Path,
    out: Path,
    settings: Settings,
    made_with: Mapping[str, Any],
    index: int,
    count: int,
) -> int:
    """`batch_file.answer_file` by `count` processes that call it at once, this one the `index`th.

    Process 0 writes `out`. Raises InputError as `answer_file` does, and where the processes do not see
    the same lines.
    """
    lines, kept = agreed(
        lambda: (read_lines(source), work_settings(source, out, settings, made_with))
    )
    _check_alike(source, lines, kept)
    first = agreed(lambda: None if index else Journal(out, lines, kept))  # and what others left
    with agreed(lambda: first or Journal(out, lines, kept, index)) as journal:
        found = all_of(sorted(journal.done))
        waiting = share_of(lines, {n for done in found for n in done}, index, count)
        if waiting:
            answer_lines(load, proc, source, settings, journal, waiting, index == 0)
        wait_for_all("answered")
        _hand_over(journal, index)
        if index:
            journal.log.remove()
        all_of(None)  # the others' logs are gone before that of process 0 goes
        agreed(lambda: first and first.finish())
    if first:
        print(f"{out}: {len(lines)} lines of {count} processes", file=sys.stderr)
        report_errors(first)
    return from_first(first.errors if first else 0)


def share_of(lines: list[Line], done: set[int], index: int, count: int) -> list[Line]:
    """What one process of `count` has to do of the lines that are not done."""
    return [line for line in lines if line.number not in done][index::count]


def _check_alike(source: Path, lines: list[Line], kept: Mapping[str, Any]) -> None:
    seen = repr([line.digest for line in lines]) + repr(sorted(kept.items(), key=repr))
    check_alike(f"--input {source}: other lines or options", seen.encode())


def _hand_over(journal: Journal, index: int) -> None:
    """Process 0 takes over the others' results, and puts them on its disk."""
    pieces = journal.pieces(SENT) if index else iter(())
    while any(sent := all_of(next(pieces, ""))):
        agreed(functools.partial(journal.absorb, [] if index else sent))
    agreed(journal.sync)
