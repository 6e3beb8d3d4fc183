"""A JSONL file of conversations -> a JSONL file of answers: ``infer.py --input --output``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.journal import Journal, Line, Result, complete, read_lines
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import TextStream, stop_list
from qwen3vl_jax.sampling import Sampling, row_seeds

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
KEYS = ("id", "messages", "tools", *SAMPLING, "max_new_tokens", "seed", "stop", "logprobs")
PREPARED = 8  # lines made ready ahead of the engine's own
LONG = 8192  # tokens of prompt and answer: lines with more come last, in fewer rows


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
class Asked:
    """A line that can be answered: the engine's request, and how its answer is told."""

    line: Line
    id: Any
    request: Any  # None once the engine has it: its pixels are not held twice
    prompt: int  # tokens
    stop: tuple[str, ...]
    logprobs: bool


def answer_file(
    load: Callable[[], tuple[Any, Any]],
    proc: Processor,
    source: Path,
    out: Path,
    settings: Settings,
    made_with: Mapping[str, Any],
) -> None:
    """Answers every line of `source` into `out`; the same call again goes on after a kill.

    load: gives (params, cfg), called once the files are known to be usable. made_with: what else an
    answer depends on; a later call must give the same. A line is {id?, messages, tools?, and any of
    KEYS}; a result {id, text, finish_reason, prompt_tokens, completion_tokens, logprobs?}, or
    {id, error, finish_reason "error"} for a line that cannot be used.
    Raises InputError for files that cannot be used; see Journal.
    """
    lines = read_lines(source)
    if out.resolve() == source.resolve():
        raise InputError(f"--output {out}: is the input itself; name another file")
    if complete(out, lines):
        print(f"{out}: has its {len(lines)} answers; delete it to answer again", file=sys.stderr)
        return
    kept = {**dataclasses.asdict(settings), **made_with}
    for free in ("rows", "prefill_chunk"):  # change no answer
        kept.pop(free)
    with Journal(out, lines, kept) as journal:
        waiting = list(journal.missing())
        if not waiting:
            return
        params, _ = load()
        with _Told(len(lines), len(lines) - len(waiting)) as told:
            rows, longest = settings.rows, LONG
            while waiting:
                at_most = longest if rows > 1 else sys.maxsize
                later: list[Line] = []
                _run(params, proc, source, journal, told, settings, waiting, rows, at_most, later)
                waiting, rows, longest = later, max(1, rows // 4), 4 * longest
        print(told.summary(out, journal), file=sys.stderr)


def _run(params, proc, source, journal, told, settings, waiting, rows, longest, later) -> None:
    """Answers the lines that need at most `longest` tokens; the others are put in `later`."""
    from qwen3vl_jax.engine import Request, generate_many

    asked: dict[int, Asked] = {}

    def requests() -> Iterator[Request | None]:
        for found in _ahead(lambda line: _read(proc, source, line, settings), waiting):
            if found is None:
                yield None
            elif isinstance(found, tuple):
                journal.add(*found)
                told.one("error")
            elif found.prompt + found.request.max_new_tokens > longest:
                later.append(found.line)
            else:
                request = found.request
                asked[found.line.number] = dataclasses.replace(found, request=None)
                yield request

    answers = generate_many(
        params, proc.config, requests(), stop_ids=proc.stop_ids, decode=proc.decode, rows=rows,
        prefill_chunk=settings.prefill_chunk, stats=told.stats(),
    )  # fmt: skip
    for answer in answers:
        one = asked.pop(answer.key)
        journal.add(one.line, _result(proc, one, answer))
        told.one(answer.finish_reason)


def _ahead(make: Callable[[Line], Any], lines: list[Line]) -> Iterator[Any]:
    """make(line) of each line in order, made by two threads ahead of need; None while one is awaited."""
    waiting: deque[Future] = deque()
    rest = iter(lines)
    with ThreadPoolExecutor(2) as pool:
        try:
            while True:
                while len(waiting) < PREPARED and (line := next(rest, None)) is not None:
                    waiting.append(pool.submit(make, line))
                if not waiting:
                    return
                yield waiting.popleft().result() if waiting[0].done() else None
        finally:
            for future in waiting:
                future.cancel()


def _read(proc: Processor, source: Path, line: Line, settings: Settings):
    """An Asked, or (line, its error's result)."""
    found: Any = {}
    try:
        with source.open("rb") as file:
            file.seek(line.start)
            found = json.loads(file.read(line.size))
        if not isinstance(found, dict):
            raise InputError(f"expected an object, found {type(found).__name__}")
        return _asked(proc, found, line, settings)
    except (InputError, ValueError, OSError, RecursionError) as e:
        kind = "" if isinstance(e, (InputError, OSError)) else "not a JSON object: "
        name = found.get("id", line.number) if isinstance(found, dict) else line.number
        error = f"line {line.number}: {kind}{' '.join(str(e).split())}"
        return line, {"id": name, "error": error, "finish_reason": "error"}


def _asked(proc: Processor, found: dict[str, Any], line: Line, settings: Settings) -> Asked:
    from qwen3vl_jax.engine import Request

    if unknown := [key for key in found if key not in KEYS]:
        raise InputError(f"unknown key {unknown[0]!r}, expected some of {', '.join(KEYS)}")
    if not isinstance(messages := found.get("messages"), list):
        raise InputError('expected a list of messages under "messages"')
    sampling = Sampling(**{**settings.sampling, **{k: found[k] for k in SAMPLING if k in found}})
    sampling.rows(1)
    limit = found.get("max_new_tokens", settings.max_new_tokens)
    if type(limit) is not int or limit < 1:
        raise InputError(f"max_new_tokens is {limit!r}, expected a whole number from 1")
    if type(wanted := found.get("logprobs", False)) is not bool:
        raise InputError(f"logprobs is {wanted!r}, expected true or false")
    seed = int(row_seeds(found.get("seed", settings.seed + line.number - 1), 1)[0])
    stop = found.get("stop", settings.stop)
    if not isinstance(stop, (str, list, tuple)) or not all(isinstance(s, str) for s in stop):
        raise InputError(f"stop is {stop!r}, expected a string or a list of strings")
    stop = stop_list(stop)
    arrays = proc.inputs(messages, tools=found.get("tools"), **settings.inputs)
    rows, prompt = arrays["input_ids"].shape
    if rows != 1:
        raise InputError(f"holds {rows} conversations, expected one")
    if prompt >= settings.max_len:
        raise InputError(
            f"the prompt has {prompt} tokens, prompt and answer may have {settings.max_len} (--max-len)"
        )
    limit = min(limit, settings.max_len - prompt)
    request = Request(line.number, arrays, limit, sampling, seed, stop)
    return Asked(line, found.get("id", line.number), request, prompt, stop, wanted)


def _result(proc: Processor, one: Asked, answer: Any) -> Result:
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


class _Told:
    """The progress bar, with answers and tokens a second, and what is said at the end."""

    def __init__(self, total: int, there: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self.task = self.bar.add_task("preparing", total=total, completed=there)
        self.parts: list[Any] = []
        self.start, self.there, self.bad = time.perf_counter(), there, 0

    def __enter__(self) -> _Told:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def stats(self) -> Any:
        """A new engine's counters, which the bar shows from now on."""
        from qwen3vl_jax.engine import Stats

        self.parts.append(Stats())
        return self.parts[-1]

    def one(self, reason: str) -> None:
        """One more line is done."""
        self.bad += reason == "error"
        self.bar.update(self.task, advance=1, description=f"{self.rate():.0f} tokens/s")

    def rate(self) -> float:
        return sum(s.tokens for s in self.parts) / (time.perf_counter() - self.start)

    def summary(self, out: Path, journal: Journal) -> str:
        """One line for people, and one more if lines could not be used."""
        count = {n: sum(getattr(s, n) for s in self.parts) for n in (
            "tokens", "steps", "row_steps", "prefilled", "reused", "encoded", "shown")}  # fmt: skip
        slots = sum(s.steps * s.rows for s in self.parts)
        text = f"{out}: {len(journal.results)} answers"
        text += f" ({self.there} were there)" if self.there else ""
        text += f", {count['tokens']} tokens in {time.perf_counter() - self.start:.1f} s "
        text += f"({self.rate():.0f}/s), rows busy {count['row_steps'] / max(slots, 1):.0%}, "
        text += f"prompt tokens {count['prefilled']} run and {count['reused']} reused, "
        text += f"pictures {count['encoded']} encoded of {count['shown']} shown"
        if self.bad:
            text += f'\n{self.bad} lines could not be used: see their "error"'
        return text
