"""A JSONL file of conversations -> a JSONL file of answers: ``infer.py --input --output``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.cli.batch_journal import (
    ERROR,
    Journal,
    Line,
    Result,
    digest_of,
    read_lines,
)
from qwen3vl_jax.cli.common import (
    demo_notice,
    load_checkpoint,
    max_length,
    open_checkpoint,
    read_sampling,
)
from qwen3vl_jax.cli.infer_arguments import check_media_of_lines, input_options, media_rules
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.inference.sampling import Sampling, row_seeds
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import TextStream, stop_list
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.console import Status, memory_advice, memory_parts, sigterm_interrupts
from qwen3vl_jax.storage.json_text import read_json
from qwen3vl_jax.storage.paths import absolute

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
KEYS = ("id", "messages", "tools", *SAMPLING, "max_new_tokens", "seed", "stop", "logprobs")
THREADS = 4
PREPARED = 8  # lines made ready ahead of the engine's own
LONG = 8192  # tokens: longer lines come last, in fewer rows, since all rows share a cache's length
ANSWER = 1024  # tokens at most that an answer is taken to need when lines are sorted by LONG
# Gives (params, cfg), and enters into the stack what they are to be used in.
Load = Callable[[contextlib.ExitStack], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a line that does not say otherwise is answered with, and the same for all."""

    sampling: Mapping[str, float]
    max_new_tokens: int
    seed: int  # of line 1; line n takes seed + n - 1
    stop: tuple[str, ...]
    max_len: int  # of prompt and answer
    inputs: Mapping[str, Any]  # options of Processor.inputs
    rows: int = 16
    prefill_chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One input line ready for the engine: its request, and how to format its answer."""

    line: Line
    id: Any
    request: Any  # None once the engine has it: its pixels are not held twice
    prompt: int  # tokens
    stop: tuple[str, ...]
    logprobs: bool


def largest(proc: Processor, settings: Settings) -> tuple[int, int]:
    """Tokens of the rows' cache and patches of a picture, the most that lines of usual length need."""
    pictures = {k: v for k in ("min_pixels", "max_pixels") if (v := settings.inputs.get(k))}
    kind = proc.image_settings.override(**pictures)
    return settings.rows * min(LONG, settings.max_len), kind.max_pixels // kind.patch_size**2


def run(args: argparse.Namespace, scope: contextlib.ExitStack, status: Status) -> None:
    """Answers a file of conversations into a file of answers; exit code 1 if lines had errors."""
    asked = distributed.asked_of(args)
    check_media_of_lines(args)
    directory, processor = open_checkpoint(args)
    processor = dataclasses.replace(processor, media_rules=media_rules(args))
    settings = Settings(
        dataclasses.asdict(read_sampling(args, processor)), args.max_new_tokens, args.seed,
        tuple(args.stop), max_length(args, processor), input_options(args), args.rows,
        args.prefill_chunk,
    )  # fmt: skip
    made_with = {"ckpt": str(absolute(directory)), "dtype": args.dtype, "weights": args.weights,
                 **({"adapter": str(absolute(args.adapter))} if args.adapter else {}),
                 "chat_template": digest_of(processor.template.text(True).encode())}  # fmt: skip
    held: dict[str, int] = {}

    def load(scope: contextlib.ExitStack) -> tuple[Any, Any]:
        params, cfg = load_checkpoint(args, directory, scope, status, demo_notice(args))
        held.update(memory_parts(params, cfg, *largest(processor, settings), "at most"))
        return params, cfg

    index, count = distributed.start(asked)
    files = (load, processor, args.input, args.output, settings, made_with)

    def answer() -> int:
        with memory_advice(held, "--rows, --max-len, --max-pixels, or --dtype bfloat16"):
            if count == 1:
                return answer_file(*files)
            from qwen3vl_jax.cli.replicas import answer_file_together

            return answer_file_together(*files, index, count)

    with sigterm_interrupts(5 if count == 1 else 5 + distributed.GRACE):
        together = distributed.end_together
        errors = answer() if count == 1 else together(answer, "the answers that are kept")
    if errors:
        sys.exit(1)


def answer_file(
    load: Load,
    proc: Processor,
    source: Path,
    out: Path,
    settings: Settings,
    made_with: Mapping[str, Any],
) -> int:
    """Answers every line of `source` into `out`; gives the number of lines with errors.

    The same call again goes on after a kill or a full disk, and tries lines with errors again. `out`
    is put in its place at the end; see batch_journal.py.

    load: called once the files are known to be usable. made_with: what else an
    answer depends on; a later call must give the same. A line is {id?, messages, tools?, and any of
    KEYS}; a result {id, text, finish_reason, prompt_tokens, completion_tokens, logprobs?}, or
    {id, error, finish_reason "error"} for a line that cannot be used.
    Raises InputError for files that cannot be used (see Journal), and for a line that changes meanwhile.
    """
    lines = read_lines(source)
    with Journal(out, lines, work_settings(source, out, settings, made_with)) as journal:
        waiting = list(journal.missing())
        if waiting:
            answer_lines(load, proc, source, settings, journal, waiting)
        journal.finish()
        report_errors(journal)
    return journal.errors


def report_errors(journal: Journal) -> None:
    """Says on stderr how many lines could not be used, if any."""
    if journal.errors:
        told = f'{journal.errors} of them could not be used, see "error" there; the same command'
        print(f"{told} tries them again, corrected or not", file=sys.stderr)


def work_settings(
    source: Path, out: Path, settings: Settings, made_with: Mapping[str, Any]
) -> dict[str, Any]:
    """What a journal says of its work. Raises InputError for an `out` that is the source."""
    if absolute(out) == absolute(source):
        raise InputError(f"--output {out}: is the input itself; name another file")
    kept = {**dataclasses.asdict(settings), **settings.sampling, **made_with}
    # The first is told one by one, the others change no answer.
    return {k: v for k, v in kept.items() if k not in ("sampling", "rows", "prefill_chunk")}


def answer_lines(
    load: Load,
    proc: Processor,
    source: Path,
    settings: Settings,
    journal: Journal,
    waiting: list[Line],
    shown: bool = True,
) -> None:
    """Answers these lines into a journal; shown: how it goes is told. Ends the process on Ctrl-C."""
    there = len(journal.done)
    total = there + len(waiting)
    rows, longest = min(settings.rows, len(waiting)), LONG
    try:
        with contextlib.ExitStack() as scope:
            params, _ = load(scope)
            progress = scope.enter_context(_Progress(total, there, shown))
            work = _Work(params, proc, source, settings, journal, progress)
            while waiting:
                waiting = work.run(waiting, rows, longest if rows > 1 else sys.maxsize)
                rows, longest = max(1, rows // 4), 4 * longest
    except KeyboardInterrupt:
        told = f"{len(journal.done)} of {total} are kept"
        print(f"interrupted: {told}; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if shown:
        print(progress.summary(journal), file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every pass over the lines needs."""

    params: Any
    proc: Processor
    source: Path
    settings: Settings
    journal: Journal
    progress: _Progress

    def run(self, lines: list[Line], rows: int, longest: int) -> list[Line]:
        """Answers the lines that need at most `longest` tokens; gives the others back."""
        from qwen3vl_jax.inference.engine import Request, generate_many

        asked: dict[int, Prepared] = {}
        later: list[Line] = []

        def requests() -> Iterator[Request | None]:
            for found in _ahead(
                lambda line: _read(self.proc, self.source, line, self.settings), lines
            ):
                if found is None:
                    yield None
                elif isinstance(found, tuple):
                    self._add(*found)
                elif found.prompt + min(found.request.max_new_tokens, ANSWER) > longest:
                    later.append(found.line)
                else:
                    request = found.request
                    asked[found.line.number] = dataclasses.replace(found, request=None)
                    yield request

        answers = generate_many(
            self.params, self.proc.config, requests(), stop_ids=self.proc.stop_ids,
            decode=self.proc.decode, rows=rows, prefill_chunk=self.settings.prefill_chunk,
            stats=self.progress.stats(),
        )  # fmt: skip
        for answer in answers:
            one = asked.pop(answer.key)
            self._add(one.line, _result(self.proc, one, answer))
        return sorted(later, key=lambda line: line.number)

    def _add(self, line: Line, result: Result) -> None:
        self.journal.add(line, result)
        self.progress.advance()


def _ahead(make: Callable[[Line], Any], lines: list[Line]) -> Iterator[Any]:
    """make(line) of every line, made by threads ahead of need, roughly in order; None: none is ready.

    They are daemons: the process ends without one that hangs.
    """
    rest, asked, made = iter(lines), queue.SimpleQueue(), queue.SimpleQueue()

    def work() -> None:
        while (line := asked.get()) is not None:
            try:
                made.put((make(line), None))
            except BaseException as e:
                made.put((None, e))

    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True).start()
    count = 0
    try:
        while True:
            while count < PREPARED and (line := next(rest, None)) is not None:
                asked.put(line)
                count += 1
            if not count:
                return
            if made.empty():
                yield None
                continue
            found, error = made.get()
            if error:
                raise error
            count -= 1
            yield found
    finally:
        for _ in range(THREADS):
            asked.put(None)


def _read(proc: Processor, source: Path, line: Line, settings: Settings):
    """A Prepared, or (line, its error's result)."""
    text, name = line.read(source), line.number
    try:
        found = read_json(text, "")
        if not isinstance(found, dict):
            raise InputError(f"expected an object, found {type(found).__name__}")
        name = found.get("id", name)
        found = {key: x for key, x in found.items() if x is not None} | {"id": name}
        return _asked(proc, found, line, settings)
    except BaseException as e:  # whatever a line holds, a library's panic too, the others go on
        kind = "" if isinstance(e, InputError) else f"{type(e).__name__}: "
        return line, _error(line, name, kind + str(e))


def _error(line: Line, name: Any, why: str) -> Result:
    said = f"line {line.number}: {' '.join(why.split())}"
    return {"id": name, ERROR: said, "finish_reason": "error"}


def _asked(proc: Processor, found: dict[str, Any], line: Line, settings: Settings) -> Prepared:
    from qwen3vl_jax.inference.engine import Request

    if unknown := [key for key in found if key not in KEYS]:
        raise InputError(f"unknown key {unknown[0]!r}, expected some of {', '.join(KEYS)}")
    if not isinstance(messages := found.get("messages"), list):
        raise InputError('expected a list of messages under "messages"')
    sampling = Sampling(**{**settings.sampling, **{k: found[k] for k in SAMPLING if k in found}})
    sampling.rows(1)
    limit = check_int("max_new_tokens", found.get("max_new_tokens", settings.max_new_tokens))
    if type(wanted := found.get("logprobs", False)) is not bool:
        raise InputError(f"logprobs is {wanted!r}, expected true or false")
    seed = int(row_seeds(found.get("seed", (settings.seed + line.number - 1) % 2**32), 1)[0])
    stop = stop_list(found.get("stop", settings.stop))
    prompts = proc.encode(messages, tools=found.get("tools"), **settings.inputs)
    if len(prompts) != 1:
        raise InputError(f"holds {len(prompts)} conversations, expected one")
    prompt = len(prompts[0].ids)
    if prompt >= settings.max_len:
        raise InputError(
            f"the prompt has {prompt} tokens, prompt and answer may have {settings.max_len} (--max-len)"
        )
    limit = min(limit, settings.max_len - prompt)
    request = Request(line.number, prompts[0], limit, sampling, seed, stop)
    return Prepared(line, found["id"], request, prompt, stop, wanted)


def _result(proc: Processor, one: Prepared, answer: Any) -> Result:
    if answer.finish_reason == "error":
        return _error(one.line, one.id, answer.error)
    text = TextStream(proc.tokenizer, one.stop)
    spoken = text.push(t for t in answer.tokens if t not in proc.stop_ids) + text.flush()
    result: Result = {
        "id": one.id,
        "text": spoken,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": one.prompt,
        "completion_tokens": len(answer.tokens),
    }
    if one.logprobs:
        result["logprobs"] = [
            {"id": token, "token": proc.decode([token], False), "logprob": round(value, 6)}
            for token, value in zip(answer.tokens, answer.logprobs, strict=True)
        ]
    return result


class _Progress:
    """The progress bar, with answers and tokens a second, and what is said at the end."""

    def __init__(self, total: int, there: int, shown: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self.bar = Progress(
            MofNCompleteColumn(), BarColumn(), "{task.description}", TimeRemainingColumn(),
            console=Console(stderr=True), disable=not shown,
        )  # fmt: skip
        self.task = self.bar.add_task("preparing", total=total, completed=there)
        self.parts: list[Any] = []
        self.start, self.there = time.perf_counter(), there

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def stats(self) -> Any:
        """A new engine's counters, which the bar shows from now on."""
        from qwen3vl_jax.inference.engine import Stats

        self.parts.append(Stats())
        return self.parts[-1]

    def advance(self) -> None:
        """One more line is done."""
        self.bar.update(self.task, advance=1, description=f"{self.rate():.0f} tokens/s")

    def rate(self) -> float:
        return sum(s.tokens for s in self.parts) / (time.perf_counter() - self.start)

    def summary(self, journal: Journal) -> str:
        """One line for people."""
        count = {n: sum(getattr(s, n) for s in self.parts) for n in (
            "tokens", "steps", "row_steps", "prefilled", "reused", "encoded", "shown")}  # fmt: skip
        slots = sum(s.steps * s.rows for s in self.parts)
        text = f"{journal.out}: {len(journal.done)} lines"
        text += f" ({self.there} were there)" if self.there else ""
        text += f", {count['tokens']} tokens in {time.perf_counter() - self.start:.1f} s "
        text += f"({self.rate():.0f}/s), rows busy {count['row_steps'] / max(slots, 1):.0%}, "
        text += f"prompt tokens {count['prefilled']} run and {count['reused']} reused, "
        text += f"pictures {count['encoded']} encoded of {count['shown']} shown"
        return text
