"""One line of an --input file: read into a request for the engine, and answered with a result."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qwen3vl_jax.cli.batch_journal import ERROR, Line, Result
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.constraints import read_constraint
from qwen3vl_jax.inference.requests import Finished, Request
from qwen3vl_jax.inference.sampling import Sampling
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import TextStream, stop_list
from qwen3vl_jax.storage.json_text import read_json

_T = TypeVar("_T")
_U = TypeVar("_U")
SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
CONTROL = ("thinking_budget", "response_format")
KEYS = ("id", "messages", "tools", *SAMPLING, "max_new_tokens", "seed", "stop", "logprobs")
KEYS += ("max_repeats", *CONTROL)
THREADS = 4
PREPARED = 8  # lines read ahead of those that the engine holds


@dataclasses.dataclass(frozen=True)
class Settings:
    """The same for every line, or for each that does not say otherwise."""

    sampling: Mapping[str, float]
    max_new_tokens: int
    seed: int  # of line 1; line n takes seed + n - 1
    stop: tuple[str, ...]
    max_len: int  # of prompt and answer
    inputs: Mapping[str, Any]  # options of the processor
    rows: int = 16
    prefill_chunk: int | None = None
    max_repeats: int = 0
    thinking_budget: int | None = None
    response_format: Any = None
    # What else an answer depends on, as the checkpoint.
    made_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Collection[str] = KEYS  # that a line may have

    def of_answers(self) -> dict[str, Any]:
        """What answers depend on: sampling is there key by key, rows and chunks change none."""
        found = {**vars(self), **self.sampling, **self.made_with}
        beside = ("sampling", "made_with", "rows", "prefill_chunk", "keys")
        # Where these are off, the work is that of a version without them.
        off = {"max_repeats": 0, "thinking_budget": None, "response_format": None}
        beside += tuple(k for k, value in off.items() if found[k] == value)
        return {k: v for k, v in found.items() if k not in beside}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One input line ready for the engine: its request, and how to format its answer."""

    line: Line
    id: Any
    request: Request | None  # None once the engine has it, so that its pixels are not held twice
    length: int  # tokens of the prompt
    stop: tuple[str, ...]
    logprobs: bool

    def result(self, proc: Processor, answer: Finished) -> Result:
        """The result of the engine's answer."""
        if answer.finish_reason == "error":
            return _error(self.line, self.id, answer.error)
        text = TextStream(proc.tokenizer, self.stop)
        spoken = text.push(t for t in answer.tokens if t not in proc.stop_ids) + text.flush()
        result: Result = {"id": self.id, "text": spoken, "finish_reason": answer.finish_reason}
        result |= {"prompt_tokens": self.length, "completion_tokens": len(answer.tokens)}
        if self.logprobs:
            result["logprobs"] = [
                {"id": token, "token": proc.decode([token], False), "logprob": round(value, 6)}
                for token, value in zip(answer.tokens, answer.logprobs, strict=True)
            ]
        return result


def read_line(
    proc: Processor, source: Path, line: Line, settings: Settings
) -> Prepared | tuple[Line, Result]:
    """A line ready for the engine, or the line and the result that says why it cannot be used."""
    text, name = line.read(source), line.number
    try:
        found = read_json(text, "")
        if not isinstance(found, dict):
            raise InputError(f"expected an object, found {type(found).__name__}")
        name = found.get("id", name)
        given = {key: value for key, value in found.items() if value is not None}
        if unknown := [key for key in given if key not in settings.keys]:
            known = ", ".join(settings.keys)
            raise InputError(f"unknown key {unknown[0]!r}, expected some of {known}")
        if not isinstance(messages := given.get("messages"), list):
            raise InputError('expected a list of messages under "messages"')
        if type(logprobs := given.get("logprobs", False)) is not bool:
            raise InputError(f"logprobs is {logprobs!r}, expected true or false")
        limit = given.get("max_new_tokens", settings.max_new_tokens)
        sampling = {**settings.sampling, **{k: given[k] for k in SAMPLING if k in given}}
        seed = given.get("seed", (settings.seed + line.number - 1) % 2**32)
        stop = stop_list(given.get("stop", settings.stop))
        # Refused, where it is wrong, before images are read.
        repeats = given.get("max_repeats", settings.max_repeats)
        control = (given.get(key, getattr(settings, key)) for key in CONTROL)
        ends = {"constraint": read_constraint(proc, *control), "max_repeats": repeats}
        request = Request(line.number, {}, limit, Sampling(**sampling), seed, stop, **ends)
        prompts = proc.encode(messages, tools=given.get("tools"), **settings.inputs)
        if len(prompts) != 1:
            raise InputError(f"holds {len(prompts)} conversations, expected one")
        length, most = len(prompts[0].ids), settings.max_len
        if length >= most:
            allowed = f"prompt and answer may have {most} (--max-len)"
            raise InputError(f"the prompt has {length} tokens, {allowed}")
        limit = min(limit, most - length)
        request = dataclasses.replace(request, arrays=prompts[0], max_new_tokens=limit)
        return Prepared(line, name, request, length, stop, logprobs)
    # Whatever a line holds, even a library's panic, the others go on.
    except BaseException as e:
        kind = "" if isinstance(e, InputError) else f"{type(e).__name__}: "
        return line, _error(line, name, kind + str(e))


def _error(line: Line, name: Any, why: str) -> Result:
    message = f"line {line.number}: {' '.join(why.split())}"
    return {"id": name, ERROR: message, "finish_reason": "error"}


def read_ahead(make: Callable[[_T], _U], items: Iterable[_T]) -> Iterator[_U | None]:
    """make(item) of items, by daemon threads ahead of need, roughly in order; None: none is ready."""
    rest, asked, made = iter(items), queue.SimpleQueue(), queue.SimpleQueue()

    def work() -> None:
        while (item := asked.get()) is not None:
            try:
                made.put((make(item), None))
            except BaseException as e:
                made.put((None, e))

    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True).start()
    count = 0
    try:
        while True:
            while count < PREPARED and (item := next(rest, None)) is not None:
                asked.put(item)
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
