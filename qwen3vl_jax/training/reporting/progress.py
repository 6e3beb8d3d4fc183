"""The progress line: a live bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as Bar

_SMOOTH = 0.9  # of the seconds a step takes, for the time that is left


class Progress:
    """Tells of steps on stderr's terminal, or on stdout line by line where there is none."""

    def __init__(self, steps: int, first: int = 0, console: Console | None = None):
        self._steps, self._pace, self._told = steps, None, 0
        self._console = console or Console(stderr=sys.stderr.isatty())
        columns = "step", MofNCompleteColumn(), BarColumn(20), "{task.description}"
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("compiling", total=steps, completed=first)
        self.start, self.stop = self._bar.start, self._bar.stop

    def log(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def compiling(self) -> None:
        """The first step begins: a line where there is no bar, which says so from the start."""
        if not self._console.is_terminal:
            self.log("compiling the step ..")

    def step(self, number: int, row: Mapping[str, Any], seconds: float, shown: bool) -> None:
        """A step is done; shown: whether it is worth a line where there is no bar."""
        self._told += 1
        if self._told > 1:  # the first one compiles
            pace = seconds if self._pace is None else self._pace
            self._pace = _SMOOTH * pace + (1 - _SMOOTH) * seconds
        left = None if self._pace is None else (self._steps - number) * self._pace
        text = f"{_numbers(row)}, compiled in {seconds:.0f} s"
        text = described(row, left) if self._told > 1 else text
        self._bar.update(self._task, completed=number, description=text)
        if shown and not self._console.is_terminal:
            self.log(f"step {number}/{self._steps} {text}")


def described(row: Mapping[str, Any], left: float | None) -> str:
    """A step's numbers as one line: loss, rate, norm, speed, use of the device, memory, time left."""
    parts = [_numbers(row), f"{row['tokens_per_s']:,.0f} tokens/s"]
    if "fill" in row:
        parts += [f"fill {row['fill']:.0%}"]
    if row.get("mfu"):
        parts += [f"mfu {row['mfu']:.1%} of real tokens, {row['mfu_padded']:.1%} with padding"]
    elif row.get("tflops"):
        parts += [f"{row['tflops']:.3g} TFLOP/s"]
    parts += [f"{row['memory_gib']:.1f} GiB"]
    if left is not None:
        minutes, seconds = divmod(round(left), 60)
        parts += [f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"]
    return ", ".join(parts)


def _numbers(row: Mapping[str, Any]) -> str:
    return f"loss {float(row['loss']):.4f}, lr {row['lr']:.2e}, norm {float(row['grad_norm']):.3g}"
