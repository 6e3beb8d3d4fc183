"""Evaluation sets: mean loss over packed batches, and answers written by generate and compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.generate import generate
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.model.structs import Batch, Params
from qwen3vl_jax.model.transformer import unstack_layers
from qwen3vl_jax.processing.parse_reply import Reply, parse_reply
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.storage.json_text import read_json, write_json
from qwen3vl_jax.training.data.make_samples import processor_options, without_train_flag
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.recipe import Data, Step
from qwen3vl_jax.training.train_step import batch_sums, step_totals

ROWS = 8  # prompts answered together


class Answered(NamedTuple):
    """One record's last turn: what was asked, what the record answers, what the model wrote."""

    name: str
    question: str
    expected: str
    answer: str

    @property
    def exact(self) -> bool:
        return self.answer.strip() == self.expected.strip()


def make_measure(cfg: Config, step: Step, merge) -> Callable[..., tuple[jax.Array, ...]]:
    """The jitted measure(weights, frozen, packed) -> (loss, weight, right tokens, tokens), all sums."""

    @jax.jit
    def measure(weights, frozen, packed: PackedBatch):
        sums = batch_sums(merge(weights, frozen), cfg, packed, step).answers
        found = sums.loss, step_totals(packed).weight, sums.correct, sums.tokens
        return tuple(shard(x) for x in found)

    return measure


def mean_loss(
    measure, weights, frozen, batches: Iterable[PackedBatch], check: Callable[[], None]
) -> dict[str, float]:
    """{"loss", "accuracy"} over all target tokens of the batches; accuracy is of single tokens.

    check: called before each batch, to raise what ends it.
    """
    found = []
    for packed in batches:
        check()
        found.append(measure(weights, frozen, packed))
        jax.block_until_ready(found[-2:-1])  # the host is at most one batch ahead
    if not found:
        raise InputError("evaluate.sources: found no sample that fits, expected at least one")
    loss, weight, right, tokens = (sum(float(x) for x in part) for part in zip(*found))
    return {"loss": loss / max(weight, 1e-9), "accuracy": right / max(tokens, 1)}


def make_inference(step: Step, merge) -> Callable[..., Params]:
    """The jitted inference(weights, frozen) -> per-layer parameters in the dtype of the computation."""
    dtype = jnp.dtype(step.dtype)

    def small(x: Any) -> Any:
        return x.astype(dtype) if x.dtype == jnp.float32 else x

    @jax.jit
    def inference(weights, frozen):
        weights = {n: small(x) for n, x in weights.items()}
        return unstack_layers(merge(weights, frozen))

    return inference


def answer(
    params: Params,
    proc: Processor,
    data: Data,
    records: Sequence[tuple[str, Any]],
    max_new_tokens: int,
    check: Callable[[], None],
) -> tuple[list[Answered], list[tuple[str, str]]]:
    """Greedy answers to the last assistant turn of each record, (name, {messages, tools?}) in chat form.

    Pictures and clips are read as `data` asks. Records without such a turn, or with nothing before it,
    are passed over; those that cannot be read come second, (name, reason). check: called before each
    few answers, to raise what ends it.
    """
    asked = [_asked(name, record) for name, record in records]
    answers: list[Answered] = []
    refused: list[tuple[str, str]] = []
    for tools, group in itertools.groupby((a for a in asked if a), lambda a: a.tools):
        rows, options = list(group), {"tools": tools, **processor_options(data)}
        for start in range(0, len(rows), ROWS):
            check()
            good, batch = _read(proc, rows[start : start + ROWS], options, refused)
            if batch is not None:
                answers += _answer_some(params, proc, good, batch, max_new_tokens)
    return answers, refused


class _Asked(NamedTuple):
    """A record's last assistant turn, and what comes before it."""

    name: str
    messages: list[dict[str, Any]]
    target: dict[str, Any]
    tools: Any


def _asked(name: str, record: Any) -> _Asked | None:
    messages = without_train_flag(record["messages"])
    at = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
    if not at:
        return None
    return _Asked(name, messages[: at[-1]], messages[at[-1]], record.get("tools"))


def _read(
    proc: Processor, rows: list[_Asked], options: Any, refused: list[tuple[str, str]]
) -> tuple[list[_Asked], Batch | None]:
    """The rows that can be read, as a batch; the others are added to `refused`, with the reason."""
    try:
        return rows, proc([row.messages for row in rows], **options)
    except Exception as error:  # a damaged picture can break any decoder: which one was it?
        if len(rows) == 1:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            refused.append((rows[0].name, kind + " ".join(str(error).split())))
            return [], None
    good = [row for one in rows for row in _read(proc, [one], options, refused)[0]]
    return good, proc([row.messages for row in good], **options) if good else None


def _answer_some(
    params: Params, proc: Processor, rows: list[_Asked], batch: Batch, max_new_tokens: int
) -> list[Answered]:
    options = {"max_new_tokens": max_new_tokens, "stop_ids": proc.stop_ids}
    written = generate(params, proc.config, batch, **options)
    out = []
    for row, tokens, length in zip(rows, written.tokens, written.lengths, strict=True):
        prompt = proc.render(row.messages, row.tools)
        said = answer_text(proc.parse(proc.decode(tokens[:length]), prompt))
        out.append(Answered(row.name, _words(row.messages[-1]), expected(row.target), said))
    return out


def expected(message: Any) -> str:
    """What a record's answer says, as `answer_text` shows an answer that writes the same."""
    calls = [dict(call.get("function") or call) for call in message.get("tool_calls") or ()]
    for call in calls:
        if isinstance(text := call.get("arguments"), str):
            call["arguments"] = read_json(text, "arguments")
    written = (f"<tool_call>{write_json(call, 'tool_calls')}</tool_call>" for call in calls)
    text = _words(message) + "".join(written)
    return answer_text(parse_reply(text))


def answer_text(reply: Reply) -> str:
    """An answer without its reasoning; each call of a tool is a line, its arguments in order."""
    calls = (
        write_json({"name": call.name, "arguments": call.arguments}, "tool_calls", sort_keys=True)
        for call in reply.tool_calls
    )
    return "\n".join([*filter(None, [reply.content.strip()]), *calls])


def _words(message: Any) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts = (part if isinstance(part, str) else part.get("text", "") for part in content)
    return "".join(parts)
