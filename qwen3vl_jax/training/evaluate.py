"""Evaluation sets: mean loss over packed batches, and answers written by generate and compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.generation import generate
from qwen3vl_jax.model import unstack_layers
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.structs import Params
from qwen3vl_jax.training.packing import PackedBatch
from qwen3vl_jax.training.recipe import Step
from qwen3vl_jax.training.step import batch_sums, step_totals

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


def make_measure(cfg: Config, step: Step, join) -> Callable[..., tuple[jax.Array, ...]]:
    """The jitted measure(weights, frozen, packed) -> (loss, weight, right tokens, tokens), all sums."""

    @jax.jit
    def measure(weights, frozen, packed: PackedBatch):
        sums = batch_sums(join(weights, frozen), cfg, packed, step).answers
        return sums.loss, step_totals(packed).weight, sums.correct, sums.tokens

    return measure


def mean_loss(measure, weights, frozen, batches: Iterable[PackedBatch]) -> dict[str, float]:
    """{"loss", "accuracy"} over all target tokens of the batches; accuracy is of single tokens."""
    found = [measure(weights, frozen, packed) for packed in batches]
    if not found:
        raise InputError("evaluate.sources: found no sample that fits, expected at least one")
    loss, weight, right, tokens = (sum(float(x) for x in part) for part in zip(*found))
    return {"loss": loss / max(weight, 1e-9), "accuracy": right / max(tokens, 1)}


def make_inference(step: Step, join) -> Callable[..., Params]:
    """The jitted inference(weights, frozen) -> per-layer parameters in the dtype of the computation."""
    dtype = jnp.dtype(step.dtype)

    def small(x: Any) -> Any:
        return x.astype(dtype) if x.dtype == jnp.float32 else x

    @jax.jit
    def inference(weights, frozen):
        weights = {n: small(x) for n, x in weights.items()}
        return unstack_layers(join(weights, frozen))

    return inference


def answer(
    params: Params, proc: Processor, records: Sequence[tuple[str, Any]], max_new_tokens: int
) -> list[Answered]:
    """Greedy answers to the last assistant turn of each record, (name, {messages, tools?}) in chat form.

    Records without such a turn, or with nothing before it, are passed over.
    """
    asked = [(name, record, _last_turn(record["messages"])) for name, record in records]
    out: list[Answered] = []
    for tools, group in itertools.groupby((a for a in asked if a[2]), lambda a: a[1].get("tools")):
        rows = list(group)
        for start in range(0, len(rows), ROWS):
            out += _answer_some(params, proc, rows[start : start + ROWS], tools, max_new_tokens)
    return out


def _last_turn(messages: Sequence[Any]) -> int:
    """The index of the last message that an assistant wrote, 0 for none."""
    roles = [message["role"] for message in messages]
    return max((i for i, role in enumerate(roles) if role == "assistant"), default=0)


def _answer_some(params, proc: Processor, rows, tools: Any, max_new_tokens: int) -> list[Answered]:
    batch = proc([record["messages"][:turn] for _, record, turn in rows], tools=tools)
    options = {"max_new_tokens": max_new_tokens, "stop_ids": proc.stop_ids}
    written = generate(params, proc.config, batch, **options)
    out = []
    for (name, record, turn), tokens, length in zip(
        rows, written.tokens, written.lengths, strict=True
    ):
        question, expected = record["messages"][turn - 1], record["messages"][turn]
        said = proc.parse(proc.decode(tokens[:length])).content
        out.append(Answered(name, _words(question), _words(expected), said))
    return out


def _words(message: Any) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts = (part if isinstance(part, str) else part.get("text", "") for part in content)
    return "".join(parts)
