"""infer.py --input --output: a JSONL file of conversations into a JSONL file of answers.

Several processes are replicas of the model, each with a part of the lines and a log of its own, on a disk
that the others see or not. At the end process 0 receives all answers and writes them in order. After a
kill the same command goes on, with any number of processes.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from qwen3vl_jax.cli import common
from qwen3vl_jax.cli.batch_journal import Journal, Line, Result, digest_of, read_lines
from qwen3vl_jax.cli.batch_lines import KEYS, Prepared, Settings, read_ahead, read_line
from qwen3vl_jax.cli.infer_arguments import check_media_of_lines, input_options, media_rules
from qwen3vl_jax.inference import engine
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.console import Status, memory_advice, memory_parts, sigterm_interrupts
from qwen3vl_jax.storage.paths import absolute

# Tokens: longer lines come last, in fewer rows, since all rows share a cache's length.
LONG = 8192
EXPECTED_ANSWER = 1024  # most tokens that an answer counts with when lines are sorted by LONG
SENT = 4 << 20  # bytes of answers that a process sends at a time
# Gives (params, cfg), and enters into the stack what they are used in.
Load = Callable[[contextlib.ExitStack], tuple[Any, Any]]


def run(args: argparse.Namespace, _: contextlib.ExitStack, status: Status) -> None:
    """Answers the file; exit code 1 if lines had errors. Raises InputError."""
    if answer_input(args, status):
        sys.exit(1)


def answer_input(args: argparse.Namespace, status: Status, keys: Collection[str] = KEYS) -> int:
    """Answers the file, whose lines may have these keys; the number of errors. Raises InputError."""
    processes = distributed.asked_of(args)
    rules = media_rules(args)
    check_media_of_lines(args)
    directory, processor = common.open_checkpoint(args)
    processor = dataclasses.replace(processor, media_rules=rules)
    made_with = {"ckpt": str(absolute(directory)), "dtype": args.dtype, "weights": args.weights}
    if args.adapter:
        made_with["adapter"] = str(absolute(args.adapter))
    made_with["chat_template"] = digest_of(processor.template.text(True).encode())
    settings = Settings(
        sampling=dataclasses.asdict(common.read_sampling(args, processor)),
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        stop=tuple(args.stop),
        max_repeats=args.max_repeats,
        thinking_budget=args.thinking_budget,
        response_format=common.response_format(args),
        max_len=common.max_length(args, processor),
        inputs=input_options(args),
        rows=args.rows,
        prefill_chunk=args.prefill_chunk,
        made_with=made_with,
        keys=keys,
    )
    held: dict[str, int] = {}

    def load(scope: contextlib.ExitStack) -> tuple[Any, Any]:
        params, cfg = common.load_checkpoint(args, directory, scope, status)
        # Of all rows' caches and an image, the most that lines of usual length need.
        slots = settings.rows * min(LONG, settings.max_len)
        limits = {k: v for k in ("min_pixels", "max_pixels") if (v := settings.inputs.get(k))}
        image = processor.image_settings.override(**limits)
        patches = image.max_pixels // image.patch_size**2
        held.update(memory_parts(params, cfg, slots, patches, "at most"))
        return params, cfg

    index, count = distributed.start(processes)

    def answer() -> int:
        with memory_advice(held, "--rows, --max-len, --max-pixels, or --dtype bfloat16"):
            return answer_file(load, processor, args.input, args.output, settings, index, count)

    with sigterm_interrupts(5 if count == 1 else 5 + distributed.GRACE):
        return distributed.end_together(answer, "the answers that are kept")


def answer_file(
    load: Load,
    proc: Processor,
    source: Path,
    out: Path,
    settings: Settings,
    index: int = 0,
    count: int = 1,
) -> int:
    """Answers every line of `source` into `out`, as process `index` of `count`; the number of errors.

    load: called once the files are known to be usable. A later call with the same settings goes on. A
    line is {id?, messages, tools?, and any of KEYS}; a result {id, text, finish_reason, prompt_tokens,
    completion_tokens, logprobs?}, or {id, error, finish_reason "error"}. Raises InputError for files that
    cannot be used (see Journal), or that change meanwhile.
    """
    lines, work = distributed.agreed(lambda: read_lines(source)), settings.of_answers()
    seen = repr([line.digest for line in lines]) + repr(sorted(work.items(), key=repr))
    distributed.check_alike(f"--input {source}: other lines or options", seen.encode())
    # Process 0 first: it takes the answers that other processes of an earlier run left.
    first = distributed.agreed(lambda: None if index else Journal(out, lines, work))
    with distributed.agreed(lambda: first or Journal(out, lines, work, index)) as journal:
        done = {n for numbers in distributed.all_of(sorted(journal.done)) for n in numbers}
        if missing := part_of(lines, done, index, count):
            _Work(proc, source, settings, journal, missing, index == 0).run(load)
        distributed.wait_for_all("answered")
        # The others' results go to process 0, which keeps them.
        pieces = journal.pieces(SENT) if index else iter(())
        while any(sent := distributed.all_of(next(pieces, ""))):
            distributed.agreed(functools.partial(journal.absorb, [] if index else sent))
        distributed.agreed(journal.sync)
        if index:
            journal.log.remove()
        # The log of process 0 goes last.
        distributed.all_of(None)
        distributed.agreed(lambda: first and first.finish())
    if first and count > 1:
        print(f"{out}: {len(lines)} lines of {count} processes", file=sys.stderr)
    if first and first.errors:
        unused = f'{first.errors} of them could not be used, see "error" there'
        print(f"{unused}; the same command tries them again, corrected or not", file=sys.stderr)
    return distributed.from_first(first.errors if first else 0)


def part_of(lines: list[Line], done: set[int], index: int, count: int) -> list[Line]:
    """The lines that process `index` of `count` answers, of those that are not done."""
    return [line for line in lines if line.number not in done][index::count]


class _Work:
    """Lines answered into a journal, with a progress bar if `shown`."""

    def __init__(self, proc, source, settings, journal: Journal, missing: list[Line], shown: bool):
        self.proc, self.source, self.settings, self.journal = proc, source, settings, journal
        self.missing, self.shown, self.there = missing, shown, len(journal.done)
        self.total, self.start = self.there + len(missing), 0.0
        self.stats, self.row_steps = engine.Stats(), 0  # of all passes
        columns = MofNCompleteColumn(), BarColumn(), "{task.description}", TimeRemainingColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self.task = self.bar.add_task("preparing", total=self.total, completed=self.there)

    def run(self, load: Load) -> None:
        """Answers them all, and tells of it. Exits with 130 on Ctrl-C."""
        missing, longest = self.missing, LONG
        rows = min(self.settings.rows, len(missing))
        try:
            with contextlib.ExitStack() as scope:
                params, _ = load(scope)
                scope.enter_context(self.bar)
                self.start = time.perf_counter()
                while missing:
                    most = longest if rows > 1 else sys.maxsize
                    missing = self._answer(params, missing, rows, most)
                    rows, longest = max(1, rows // 4), 4 * longest
        except KeyboardInterrupt:
            kept = f"{len(self.journal.done)} of {self.total} are kept"
            print(f"interrupted: {kept}; the same command goes on", file=sys.stderr)
            sys.exit(130)
        if not self.shown:
            return
        there = f" ({self.there} were there)" if self.there else ""
        seconds, s = time.perf_counter() - self.start, self.stats
        print(
            f"{self.journal.out}: {len(self.journal.done)} lines{there}, {s.tokens} tokens in "
            f"{seconds:.1f} s ({s.tokens / seconds:.0f}/s), rows busy "
            f"{s.row_steps / max(self.row_steps, 1):.0%}, prompt tokens {s.prefilled} run and "
            f"{s.reused} reused, images {s.encoded} encoded of {s.shown} shown",
            file=sys.stderr,
        )

    def _answer(self, params: Any, lines: list[Line], rows: int, longest: int) -> list[Line]:
        """Answers the lines that need at most `longest` tokens; gives the others back."""
        running: dict[int, Prepared] = {}
        later: list[Line] = []

        def requests() -> Iterator[engine.Request | None]:
            read = functools.partial(read_line, self.proc, self.source, settings=self.settings)
            for found in read_ahead(read, lines):
                if isinstance(found, tuple):
                    self._add(*found)
                elif found is None or (request := found.request) is None:
                    yield None
                elif found.length + min(request.max_new_tokens, EXPECTED_ANSWER) > longest:
                    later.append(found.line)
                else:
                    running[found.line.number] = dataclasses.replace(found, request=None)
                    yield request

        before = self.stats.steps
        sizes = {"rows": rows, "prefill_chunk": self.settings.prefill_chunk, "stats": self.stats}
        ends = {"stop_ids": self.proc.stop_ids, "decode": self.proc.decode}
        for answer in engine.generate_many(params, self.proc.config, requests(), **sizes, **ends):
            prepared = running.pop(answer.key)
            self._add(prepared.line, prepared.result(self.proc, answer))
        self.row_steps += rows * (self.stats.steps - before)
        return sorted(later, key=lambda line: line.number)

    def _add(self, line: Line, result: Result) -> None:
        self.journal.add(line, result)
        rate = self.stats.tokens / (time.perf_counter() - self.start)
        self.bar.update(self.task, advance=1, description=f"{rate:.0f} tokens/s")
