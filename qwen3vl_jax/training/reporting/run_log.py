"""Watching a run: metrics.csv, TensorBoard, wandb, the progress line, answers, refused samples."""

import csv
import dataclasses
import io
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen3vl_jax.storage.json_text import write_json
from qwen3vl_jax.storage.paths import absolute, make_folder
from qwen3vl_jax.storage.remote_files import Mirrored, write_atomic
from qwen3vl_jax.training.evaluate import Answered
from qwen3vl_jax.training.recipe import Recipe
from qwen3vl_jax.training.reporting.metrics_table import Table, draw_curves
from qwen3vl_jax.training.reporting.progress import Progress
from qwen3vl_jax.training.run_dir import EVALUATION

METRICS, REFUSED, CURVES = "metrics.csv", "refused.csv", "curves.png"
_SHOWN = 400  # characters of a question or an answer in the log


class RunLogger:
    """The log of a run. Use it as a context manager; `first` is the step it goes on from."""

    def __init__(self, out: Path, recipe: Recipe, first: int = 0):
        self.out, self.recipe, self.first = out, recipe, first
        self.metrics = Table(out / METRICS, first)
        self.evaluations = Table(out / EVALUATION, first)
        # The steps that evaluation.csv has a row of.
        self.evaluated = self.evaluations.steps
        self.progress = Progress(recipe.steps, first)
        self.log, self.compiling = self.progress.log, self.progress.compiling
        self._others = Mirrored(out)
        self._board = _board(self._others.folder, recipe, first)
        self._wandb = _wandb(out, self._others.folder, recipe)
        self._refused = _read_refused(out / REFUSED)
        self._since = time.perf_counter()

    def __enter__(self) -> "RunLogger":
        self.progress.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.progress.stop()
        self.metrics.close()
        self.evaluations.close()
        if self._board:
            self._board.close()
        self._others.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))

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
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        row = dict(values)
        real, padded, peak = (row.pop(n, None) for n in ("flops", "padded_flops", "peak_flops"))
        row |= {"seconds": seconds, "tokens_per_s": row["tokens"] / seconds}
        row["tflops"] = real / seconds / 1e12 if real else None
        row["mfu"] = real / seconds / peak if real and peak else None
        row["mfu_padded"] = padded / seconds / peak if padded and peak else None
        self.metrics.write(number, row)
        shown = number % self.recipe.report.every == 0 or number == self.recipe.steps
        self.progress.step(number, row, seconds, shown or number == self.first + 1)
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
        plain = {n: float(x) for n, x in values.items() if x is not None and not np.ndim(x)}
        if self._board:
            lists = {n: np.ravel(x) for n, x in values.items() if np.ndim(x)}
            scalars = {f"{kind}/{n}": x for n, x in plain.items()}
            scalars |= {f"{kind}_{n}/{i}": float(x) for n in lists for i, x in enumerate(lists[n])}
            for name, value in scalars.items():
                self._board.add_scalar(name, value, number)
        if self._wandb:
            self._wandb.log({f"{kind}/{n}": x for n, x in plain.items()}, step=number)


class NullLogger:
    """The logger of every process but the first: it writes nothing."""

    evaluated: frozenset[int] = frozenset()

    def __enter__(self) -> "NullLogger":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def _skip(self, *values: Any) -> None:
        pass

    step = evaluation = refused = draw = log = compiling = restart_clock = sync = _skip


def _board(folder: Path, recipe: Recipe, first: int) -> Any:
    if not recipe.report.tensorboard:
        return None
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
    if not recipe.report.wandb:
        return None
    import wandb  # pyright: ignore[reportMissingImports]

    path = absolute(out)
    unique = f"{path.name}-{zlib.crc32(str(path).encode()):08x}"  # the same when the run resumes
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
        self._all: dict[str, float] = defaultdict(float)
        self._last: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts what is done inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._all[name] += seconds
            self._last[name] += seconds

    def since_last(self) -> dict[str, float]:
        """{data_seconds: waited for the step's samples, ..} since the last call."""
        found = {f"{name}_seconds": self._last[name] for name in self.OTHERS}
        self._last.clear()
        return found

    def summary(self) -> str:
        """One line with the share of each, and of the steps, which is what is left."""
        whole = max(time.perf_counter() - self._begun, 1e-9)
        shares = [f"{name} {self._all[name] / whole:.1%}" for name in self.OTHERS]
        left = 1 - sum(self._all[name] for name in self.OTHERS) / whole
        return f"time: steps {left:.1%}, {', '.join(shares)}, of {whole:,.0f} s"


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
