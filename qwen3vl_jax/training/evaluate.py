"""Evaluation: mean loss over the held-out sources, and generated answers compared with theirs."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.checkpoint.stacking import unstack_layers
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.generate import generate
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.model.structs import Batch, Params
from qwen3vl_jax.processing.parse_reply import Reply, parse_reply
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.scores.metrics import Score, metric_of
from qwen3vl_jax.storage.json_text import read_json, write_json
from qwen3vl_jax.training.data.global_batches import all_refused
from qwen3vl_jax.training.data.loader import check_answers
from qwen3vl_jax.training.data.make_samples import processor_options, without_train_flag
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.param_groups import Flat, MergeParams
from qwen3vl_jax.training.recipe import Data, Recipe, Step
from qwen3vl_jax.training.train_step import TrainState, batch_sums, step_totals

# Prompts answered together.
ROWS = 8
# (data, seed, once=False) -> a DataLoader or a GlobalFeed
OpenLoader = Callable[..., Any]
# (state, frozen, step, logger, check) -> the loss
Evaluation = Callable[..., float | None]


class Answered(NamedTuple):
    """A record's last turn: its question, its answer, and the generated answer."""

    name: str
    question: str
    expected: str
    answer: str
    score: float | None = None  # by evaluate.metric, where that reads the expected answer

    @property
    def exact(self) -> bool:
        return self.answer.strip() == self.expected.strip()


class _Asked(NamedTuple):
    """A record's last assistant turn, and the messages before it."""

    name: str
    messages: list[dict[str, Any]]
    target: dict[str, Any]
    tools: Any


def make_evaluation(
    recipe: Recipe, processor: Processor, open_loader: OpenLoader, merge: MergeParams
) -> Evaluation:
    """The evaluation of a run: loss over the evaluation sources, and answers to their records.

    It logs what it finds, and gives the loss, None if not finite. check: called before each batch.
    """
    settings, dtype = recipe.evaluate, recipe.step.dtype
    measure = make_measure(processor.config, recipe.step, merge)

    @jax.jit
    def inference(weights: Flat, frozen: Any) -> Params:
        wide = {n: x.astype(dtype) for n, x in weights.items() if x.dtype == jnp.float32}
        return unstack_layers(merge({**weights, **wide}, frozen))

    def evaluate(
        state: TrainState, frozen: Any, number: int, logger: Any, check: Callable[[], None]
    ) -> float | None:
        weights, answers = state.average or state.weights, []
        loader = open_held_out(recipe, open_loader)
        try:
            loaded = itertools.islice(loader, settings.batches or None)
            batches = (jax.tree.map(lambda x: x[0], batch.packed) for batch in loaded)
            values = mean_loss(measure, weights, frozen, batches, check)
            logger.refused(all_refused(loader))
            records = loader.records(settings.generate) if settings.generate else []
        finally:
            logger.refused(loader.refused)
            loader.close()
        if records:
            params, count = inference(weights, frozen), settings.max_new_tokens
            answers, refused = answer(params, processor, recipe.data, records, count, check)
            logger.refused(refused)
            values["exact"] = sum(a.exact for a in answers) / max(len(answers), 1)
            if settings.metric:
                rule = metric_of(settings.metric, "evaluate.metric")
                answers = scored(answers, rule, logger)
                scores = [a.score for a in answers if a.score is not None]
                values |= {settings.metric: sum(scores) / len(scores)} if scores else {}
        logger.evaluation(number, values, answers)
        if np.isfinite(values["loss"]):
            return values["loss"]
        logger.log("the evaluation's loss is not a number: this step cannot be the best")
        return None

    return evaluate


def is_due(recipe: Recipe, number: int) -> bool:
    """Whether a step is evaluated: each `evaluate.every` steps, and the last one."""
    every = recipe.evaluate.every
    return bool(every and number and (number % every == 0 or number == recipe.steps))


def open_held_out(recipe: Recipe, open_loader: OpenLoader, bad_fraction: float = 1.0) -> Any:
    """A loader of one pass over the evaluation sources in order, in this process."""
    changes = {"shuffle": False, "workers": 0, "bad_fraction": bad_fraction}
    data = dataclasses.replace(recipe.data, sources=recipe.evaluate.sources, **changes)
    return open_loader(data, 0, once=True)


def check_held_out(recipe: Recipe, open_loader: OpenLoader) -> list[tuple[str, str]]:
    """(name, reason) of the records that evaluations leave out. Raises InputError for bad sources.

    Reads what an evaluation reads, so that no bad source ends the run hours later.
    """
    with contextlib.closing(open_held_out(recipe, open_loader, recipe.data.bad_fraction)) as loader:
        for _ in itertools.islice(loader, recipe.evaluate.batches or None):
            pass
        check_answers(loader, recipe.evaluate.generate)
        return loader.refused


def make_measure(cfg: Config, step: Step, merge) -> Callable[..., tuple[jax.Array, ...]]:
    """The jitted measure(weights, frozen, packed) -> sums (loss, weight, correct tokens, tokens)."""

    @jax.jit
    def measure(weights, frozen, packed: PackedBatch):
        sums = batch_sums(merge(weights, frozen), cfg, packed, step).answers
        found = sums.loss, step_totals(packed).weight, sums.correct, sums.tokens
        return tuple(map(shard, found))

    return measure


def mean_loss(
    measure, weights, frozen, batches: Iterable[PackedBatch], check: Callable[[], None]
) -> dict[str, float]:
    """{"loss", "accuracy"} over the target tokens of the batches. check: called before each."""
    found = []
    for packed in batches:
        check()
        found.append(measure(weights, frozen, packed))
        # The host is at most one batch ahead.
        jax.block_until_ready(found[-2:-1])
    if not found:
        raise InputError("evaluate.sources: found no sample that fits, expected at least one")
    loss, weight, right, tokens = (sum(float(x) for x in part) for part in zip(*found))
    return {"loss": loss / max(weight, 1e-9), "accuracy": right / max(tokens, 1)}


def answer(
    params: Params,
    proc: Processor,
    data: Data,
    records: Sequence[tuple[str, Any]],
    max_new_tokens: int,
    check: Callable[[], None],
) -> tuple[list[Answered], list[tuple[str, str]]]:
    """(greedy answers, refused records) for the last assistant turn of each (name, chat record).

    Records without an assistant turn after another turn are skipped; those that cannot be read are
    refused, as (name, reason). check: called before each batch.
    """
    asked: list[_Asked] = []
    for name, record in records:
        messages = without_train_flag(record["messages"])
        turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if turns:
            at, tools = turns[-1], record.get("tools")
            asked.append(_Asked(name, messages[:at], messages[at], tools))
    answers: list[Answered] = []
    refused: list[tuple[str, str]] = []
    limits: Any = {"max_new_tokens": max_new_tokens, "stop_ids": proc.stop_ids}
    for tools, group in itertools.groupby(asked, lambda each: each.tools):
        rows, options = list(group), {"tools": tools, **processor_options(data)}
        for start in range(0, len(rows), ROWS):
            check()
            good, batch = _read(proc, rows[start : start + ROWS], options, refused)
            if batch is None:
                continue
            written = generate(params, proc.config, batch, **limits)
            for row, ids, length in zip(good, written.tokens, written.lengths, strict=True):
                prompt, said = proc.render(row.messages, row.tools), proc.decode(ids[:length])
                texts = expected(row.target), answer_text(proc.parse(said, prompt))
                answers.append(Answered(row.name, _words(row.messages[-1]), *texts))
    return answers, refused


def scored(answers: Sequence[Answered], score: Score, logger: Any) -> list[Answered]:
    """The answers with their scores; 0 for one that the metric cannot read.

    Records whose expected answer it cannot read are logged as refused, and have no score.
    """
    found = list[Answered]()
    for a in answers:
        try:
            value = score(a.answer, [a.expected], a.question) or 0.0
        except InputError as error:
            logger.refused([(a.name, f"evaluate.metric: {error}")])
            value = None
        found.append(a._replace(score=value))
    return found


def _read(
    proc: Processor, rows: list[_Asked], options: Any, refused: list[tuple[str, str]]
) -> tuple[list[_Asked], Batch | None]:
    """The readable prompts and their batch. The others are added to `refused` with the reason."""
    try:
        return rows, proc([row.messages for row in rows], **options)
    except Exception as error:
        # A damaged image can break any decoder. Each prompt is tried alone to find it.
        if len(rows) == 1:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            refused.append((rows[0].name, kind + " ".join(str(error).split())))
            return [], None
    good = [row for one in rows for row in _read(proc, [one], options, refused)[0]]
    return good, proc([row.messages for row in good], **options) if good else None


def expected(message: Any) -> str:
    """A record's answer in the form of `answer_text`, to compare with a generated one."""
    text = _words(message)
    for call in message.get("tool_calls") or ():
        found = dict(call.get("function") or call)
        if isinstance(arguments := found.get("arguments"), str):
            found["arguments"] = read_json(arguments, "arguments")
        text += f"<tool_call>{write_json(found, 'tool_calls')}</tool_call>"
    return answer_text(parse_reply(text))


def answer_text(reply: Reply) -> str:
    """An answer without its reasoning. Each tool call is a line, its arguments sorted."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    lines = [write_json(call, "tool_calls", sort_keys=True) for call in calls]
    return "\n".join(filter(None, [reply.content.strip(), *lines]))


def _words(message: Any) -> str:
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)
