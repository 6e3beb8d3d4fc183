"""Evaluation sets: mean loss over packed batches, and answers written by generate and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
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
    """Greedy answers to the last turn of each record, (name, {messages, tools?}) in chat form."""
    out: list[Answered] = []
    for start in range(0, len(records), ROWS):
        out += _answer_some(params, proc, records[start : start + ROWS], max_new_tokens)
    return out


def _answer_some(params, proc: Processor, records, max_new_tokens: int) -> list[Answered]:
    asked = [record["messages"][:-1] for _, record in records]
    batch = proc(asked, tools=None)
    options = {"max_new_tokens": max_new_tokens, "stop_ids": proc.stop_ids}
    written = generate(params, proc.config, batch, **options)
    texts = []
    for row, length in zip(written.tokens, written.lengths, strict=True):
        texts.append(proc.decode(row[:length]))
    return [
        Answered(name, _words(record["messages"][-2]), _words(record["messages"][-1]), text)
        for (name, record), text in zip(records, texts, strict=True)
    ]


def _words(message: Any) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts = (part if isinstance(part, str) else part.get("text", "") for part in content)
    return "".join(parts)
