"""Watching a run: metrics.csv, TensorBoard, wandb, the progress line, answers, refused samples."""

import csv
import dataclasses
import io
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from qwen3vl_jax.storage.json_text import write_json
from qwen3vl_jax.storage.paths import absolute, make_folder
from qwen3vl_jax.storage.remote_files import Mirrored, write_atomic
from qwen3vl_jax.training.evaluate import Answered
from qwen3vl_jax.training.recipe import Recipe
from qwen3vl_jax.training.reporting.metrics_table import Table, draw_curves
from qwen3vl_jax.training.run_dir import EVALUATION

METRICS, REFUSED, CURVES = "metrics.csv", "refused.csv", "curves.png"
# Characters of a question or an answer in the log.
_SHOWN = 400
# The share of the older steps in the seconds a step takes, for the time that is left.
_SMOOTH = 0.9


class RunLogger:
    """The log of a run. Use it as a context manager; `first` is the step it goes on from.

    Progress is a live bar on stderr's terminal, or lines on stdout where there is none.
    """

    def __init__(self, out: Path, recipe: Recipe, first: int = 0):
        self.out, self.recipe, self.first = out, recipe, first
        self.metrics = Table(out / METRICS, first)
        self.evaluations = Table(out / EVALUATION, first)
        # The steps that evaluation.csv has a row of.
        self.evaluated = self.evaluations.steps
        self._console = Console(stderr=sys.stderr.isatty())
        self._live, self._pace = self._console.is_terminal, None
        columns = "step", MofNCompleteColumn(), BarColumn(20), "{task.description}"
        self._bar = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._bar.add_task("compiling", total=recipe.steps, completed=first)
        self._others = Mirrored(out)
        folder, told = self._others.folder, recipe.report
        self._board = _board(folder, first) if told.tensorboard else None
        self._wandb = _wandb(out, folder, recipe) if told.wandb else None
        self._refused = _read_refused(out / REFUSED)
        self.restart_clock()

    def __enter__(self) -> "RunLogger":
        self._bar.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.stop()
        for part in (self.metrics, self.evaluations, self._board, self._others):
            if part:
                part.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))

    def log(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def compiling(self) -> None:
        """A program of the step is compiled: a line where there is no bar, which says so from the start."""
        if not self._live:
            self.log("compiling the step ..")

    def sync(self) -> None:
        """Has what was told where it belongs: before a step is saved that a resumed run goes on from."""
        self.metrics.sync()
        self.evaluations.sync()
        if self._board:
            self._board.flush()
        self._others.sync()

    def restart_clock(self) -> None:
        """The next step's time starts now: what came before (evaluating, saving) is not its own."""
        self._since = time.perf_counter()

    def step(self, number: int, values: Mapping[str, Any]) -> None:
        """Writes a step down; values are numbers or arrays, "tokens" and "flops" among them.

        flops: {"flops": of real tokens, "padded_flops": computed, "peak_flops": a second's, or None}
        become mfu and mfu_padded; they are not written themselves.
        """
        now, row = time.perf_counter(), dict(values)
        seconds, self._since = now - self._since, now
        real, padded, peak = (row.pop(n, None) for n in ("flops", "padded_flops", "peak_flops"))
        row |= {"seconds": seconds, "tokens_per_s": row["tokens"] / seconds}
        row["tflops"] = real / seconds / 1e12 if real else None
        row["mfu"] = real / seconds / peak if real and peak else None
        row["mfu_padded"] = padded / seconds / peak if padded and peak else None
        self.metrics.write(number, row)
        steps, begins = self.recipe.steps, number == self.first + 1
        if begins:
            text = f"{_numbers(row)}, compiled in {seconds:.0f} s"
        else:
            self._pace = _SMOOTH * (self._pace or seconds) + (1 - _SMOOTH) * seconds
            text = described(row, (steps - number) * self._pace)
        self._bar.update(self._task, completed=number, description=text)
        shown = number % self.recipe.report.every == 0 or number == steps
        if (shown or begins) and not self._live:
            self.log(f"step {number}/{steps} {text}")
        if shown:
            self._write_scalars("train", number, row)

    def evaluation(self, number: int, values: Mapping[str, float], answers: Sequence[Answered]):
        """Writes an evaluation down, all answers to a file, some of them to the log."""
        self.evaluations.write(number, values)
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.log(f"step {number} evaluation {text}")
        self._write_scalars("evaluation", number, values)
        if not answers:
            return
        path = self.out / "answers" / f"step_{number}.jsonl"
        make_folder(path.parent)
        rows = (a._asdict() | {"exact": a.exact} for a in answers)
        lines = [write_json(row, "answers", ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        for a in answers[: self.recipe.report.samples]:
            mark = "right" if a.exact else f"expected {_short(a.expected)}"
            mark += "" if a.score is None else f", {self.recipe.evaluate.metric} {a.score:.3g}"
            self.log(f"  {_short(a.question)} -> {_short(a.answer)} ({mark})")
        if self._board:
            told = "\n\n".join(f"{a.question}\n\n-> {a.answer}" for a in answers[:8])
            self._board.add_text("answers", told, number)

    def refused(self, found: Sequence[tuple[str, str]]) -> None:
        """Keeps refused.csv: each sample that was left out or cut, once, with the reason."""
        new = {name: reason for name, reason in found if name not in self._refused}
        if not new:
            return
        self._refused |= new
        text = io.StringIO()
        csv.writer(text).writerows([("sample", "reason"), *self._refused.items()])
        write_atomic(self.out / REFUSED, text.getvalue().encode())
        (name, reason), more = next(iter(new.items())), len(new) - 1
        rest = f" (and {more} more, see {REFUSED})" if more else ""
        self.log(f"left out or cut: {name}: {reason}{rest}")

    def draw(self) -> None:
        """Writes curves.png."""
        draw_curves(self.out / METRICS, self.out / EVALUATION, self.out / CURVES)

    def _write_scalars(self, kind: str, number: int, values: Mapping[str, Any]) -> None:
        given = {n: x for n, x in values.items() if x is not None}
        plain = {f"{kind}/{n}": float(x) for n, x in given.items() if not np.ndim(x)}
        if self._board:
            lists = {f"{kind}_{n}": np.ravel(x) for n, x in given.items() if np.ndim(x)}
            parts = {f"{n}/{i}": float(x) for n, xs in lists.items() for i, x in enumerate(xs)}
            for name, value in (plain | parts).items():
                self._board.add_scalar(name, value, number)
        if self._wandb:
            self._wandb.log(plain, step=number)


class NullLogger(AbstractContextManager):
    """The logger of every process but the first: it writes nothing."""

    evaluated: frozenset[int] = frozenset()

    def _skip(self, *values: Any) -> None:
        pass

    step = evaluation = refused = draw = log = compiling = restart_clock = sync = __exit__ = _skip


def described(row: Mapping[str, Any], left: float) -> str:
    """A step's numbers as one line: loss, rate, norm, speed, use of the device, memory, time left (s)."""
    parts = [_numbers(row), f"{row['tokens_per_s']:,.0f} tokens/s"]
    if "fill" in row:
        parts += [f"fill {row['fill']:.0%}"]
    if row.get("mfu"):
        parts += [f"mfu {row['mfu']:.1%} of real tokens, {row['mfu_padded']:.1%} with padding"]
    elif row.get("tflops"):
        parts += [f"{row['tflops']:.3g} TFLOP/s"]
    minutes, seconds = divmod(round(left), 60)
    time_left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    return ", ".join([*parts, f"{row['memory_gib']:.1f} GiB", time_left])


def _numbers(row: Mapping[str, Any]) -> str:
    return f"loss {float(row['loss']):.4f}, lr {row['lr']:.2e}, norm {float(row['grad_norm']):.3g}"


def _board(folder: Path, first: int) -> Any:
    from tensorboardX import SummaryWriter

    # purge_step hides what a killed run wrote after the checkpoint
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
    # Its thread would die of a full disk unheard, and who hands it an event wait for ever.
    writer: Any = board.file_writer
    events = writer.event_writer
    events._worker.stop()
    events.add_event = events._ev_writer.write_event
    return board


def _wandb(out: Path, folder: Path, recipe: Recipe) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    path = absolute(out)
    # The same when the run resumes.
    unique = f"{path.name}-{zlib.crc32(str(path).encode()):08x}"
    place = {"project": recipe.report.wandb, "dir": str(folder), "name": path.name}
    return wandb.init(**place, id=unique, resume="allow", config=dataclasses.asdict(recipe))


def _read_refused(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    text = io.StringIO(path.read_bytes().decode(), newline="")
    return {row[0]: row[1] for row in list(csv.reader(text))[1:] if len(row) == 2}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


class Times:
    """Seconds of the host by what it did: of a step's row of metrics.csv, and of the whole run."""

    OTHERS = ("data", "compiling", "evaluating", "saving")

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._all, self._told = defaultdict[str, float](float), dict[str, float]()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts what is done inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._all[name] += time.perf_counter() - start

    def since_last(self) -> dict[str, float]:
        """{data_seconds: waited for the step's samples, ..} since the last call."""
        before, self._told = self._told, dict(self._all)
        return {f"{n}_seconds": self._all[n] - before.get(n, 0.0) for n in self.OTHERS}

    def summary(self) -> str:
        """One line with the share of each, and of the steps, which is what is left."""
        whole = max(time.perf_counter() - self._begun, 1e-9)
        shares = {name: self._all[name] / whole for name in self.OTHERS}
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        return f"time: steps {1 - sum(shares.values()):.1%}, {told}, of {whole:,.0f} s"


class Profiler:
    """A profiler trace of chosen steps in RUN_DIR/profile, which TensorBoard and XProf read."""

    def __init__(self, steps: tuple[int, ...], out: Path):
        self._steps, self._on = set(steps), False
        self._traces = Mirrored(out / "profile") if steps else None

    def before(self, number: int) -> None:
        """Starts a trace with the first of several chosen steps in a row."""
        if self._traces and number in self._steps and not self._on:
            jax.profiler.start_trace(str(self._traces.folder))
            self._on = True

    def after(self, number: int, metrics: Any) -> None:
        """Ends it with the last, when the device has done it."""
        if self._on and number + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self.end()

    def end(self) -> None:
        """Ends a trace that is still on: the run ends before its last chosen step."""
        if self._traces and self._on:
            jax.profiler.stop_trace()
            self._on = False
            self._traces.sync()
