"""generate() and stream(): prefill, then several decode steps a dispatch until every row has ended.

The cache is donated from one dispatch to the next, and doubles when it is full. Raises InputError.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference import decode_loop
from qwen3vl_jax.inference.constraints import Constraints, masks_of
from qwen3vl_jax.inference.decode_loop import Decoder, cache_slots
from qwen3vl_jax.inference.requests import STEPS, GenerationOptions, LogitsFn, check_stop_ids
from qwen3vl_jax.inference.row_answer import ENDED, Decode, RowAnswer, check_repeats, fault_of
from qwen3vl_jax.inference.sampling import Sampling
from qwen3vl_jax.model.cache import extend, prefill
from qwen3vl_jax.model.sharding import mesh_sizes
from qwen3vl_jax.model.structs import Batch, Features, KVCache, Params, check_call
from qwen3vl_jax.model.transformer import compute_dtype
from qwen3vl_jax.model.vision import vision_encode
from qwen3vl_jax.processing.tokenizer import stop_list

log = logging.getLogger("qwen3vl_jax")


@dataclasses.dataclass
class Answer:
    """tokens [B max_new_tokens] int32 (a stop id that ended a row is kept), lengths [B], reasons.

    finish_reasons are "stop" (stop id or string), "length", "repetition", or "error": errors [B] then says
    why, and is "" otherwise. Beyond its length a row holds a stop id (0 without any).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finish_reasons: list[str]
    errors: list[str] = dataclasses.field(default_factory=list)


class NotFiniteError(InputError):
    """Logits were not finite: `rows` maps a row of the batch to what is wrong with its answer."""

    def __init__(self, rows: dict[int, str]):
        super().__init__("; ".join(f"row {row}: {text}" for row, text in rows.items()))
        self.rows = rows


def stream(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    max_len: int | None = None,
    features: Features | None = None,
    logits_fn: LogitsFn | None = None,
    steps: int = STEPS,
    prefill_chunk: int | None = None,
    cache: KVCache | None = None,
    before: np.ndarray | None = None,
    copies: int = 1,
    constraint: Constraints = None,
) -> Generator[np.ndarray, np.ndarray | None, KVCache]:
    """Yields new tokens [B n] int32 as they come, n <= steps; -1 where a row had already ended.

    copies: answers to each prompt, which is prefilled once. B counts them: prompt 0's, prompt 1's, ..
    seed: one a row, or a first one (row b takes seed + b); a row's draws depend on nothing else.
    constraint: one for all rows, or one or None a row. While the next token of a row has a mask, all rows
    take a step at a time.
    stop_ids: None takes the config's; () never stops. max_len: most tokens of prompt and answer.
    `send` a bool [B] to end rows. prefill_chunk: as in `prefill`, for wider rows.
    cache: one to continue, as in `extend` (donated). before [B n] int32: the tokens in it, which the
    repetition penalty sees too (those past the vocabulary are none). The generator returns the cache
    after the answer, less its last token.

    Raises InputError before anything runs; a NotFiniteError once all rows have ended, if the logits of
    some were not finite, or a constraint left no token (these end there, the others go on).
    """
    check_call(params, cfg, batch=batch)
    given = max_new_tokens, sampling, seed, stop_ids, max_len, logits_fn, steps
    options = GenerationOptions(*given, prefill_chunk, copies, constraint)
    filled = 0 if cache is None else int(np.max(cache.length))
    rows = options.of_batch(cfg, batch, filled)
    if before is not None and before.shape != (want := (len(batch.segment_ids), filled)):
        raise InputError(f"before: shape {before.shape}, the cache holds {want}")
    constraints = options.constraints(batch, before, rows.stop_ids)
    return _stream(params, cfg, batch, options, rows, features, cache, before, constraints)


def generate(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    decode: Decode | None = None,
    seed: int | Sequence[int] = 0,
    max_len: int | None = None,
    features: Features | None = None,
    logits_fn: LogitsFn | None = None,
    steps: int = STEPS,
    prefill_chunk: int | None = None,
    copies: int = 1,
    constraint: Constraints = None,
    max_repeats: int = 0,
) -> Answer:
    """Answers every row of the batch; arguments are those of `stream`.

    stop_strings end a row with the token that completes one; they need `decode` (tokens -> text).
    max_repeats ends a row, as "repetition", whose last 256 tokens or more are so many times the same block
    of at most 64 tokens; 0 never does. A row whose logits are not finite, or whose constraint leaves no
    token, ends there, with a warning and the finish_reason "error".
    """
    if (strings := stop_list(stop_strings)) and decode is None:
        raise InputError("stop_strings need decode=, the function from tokens to text")
    options: dict[str, Any] = {"sampling": sampling, "stop_ids": stop_ids, "seed": seed}
    options |= {"max_len": max_len, "features": features, "logits_fn": logits_fn, "steps": steps}
    options |= {"max_new_tokens": max_new_tokens, "prefill_chunk": prefill_chunk, "copies": copies}
    chunks = stream(params, cfg, batch, constraint=constraint, **options)
    stops = check_stop_ids(cfg, stop_ids)
    count, ends = len(batch.segment_ids) * copies, (strings, check_repeats(max_repeats))
    answers = [RowAnswer(max_new_tokens, *ends) for _ in range(count)]
    try:
        with contextlib.suppress(StopIteration):
            new = next(chunks)
            while True:
                for answer, row in zip(answers, new, strict=True):
                    if not answer.finish_reason:
                        answer.add(row, stops, decode)
                new = chunks.send(np.array([bool(answer.finish_reason) for answer in answers]))
    except NotFiniteError as e:
        log.warning("generate: %s", e)
        for b, fault in e.rows.items():
            answers[b].finish_reason, answers[b].error = "error", fault
    tokens = np.full((len(answers), max_new_tokens), stops[0] if stops else 0, np.int32)
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer.tokens)] = answer.tokens
    lengths = np.array([len(answer.tokens) for answer in answers], np.int32)
    reasons = [answer.finish_reason for answer in answers]
    return Answer(tokens, lengths, reasons, [answer.error for answer in answers])


def _stream(params, cfg, batch, options, rows, features, cache, before, constraints):
    """`stream` after its checks: prefills, and yields the columns that hold tokens, ENDED elsewhere."""
    vision, batch = batch.vision, batch.replace(vision=None, labels=None)
    width = batch.tokens.shape[1]  # not the prompt's length: what is compiled is a bucket's
    filled = width + (0 if cache is None else int(np.max(cache.length)))
    slots = cache_slots(filled + 1 + min(options.steps, options.max_new_tokens - 1))
    if cache is not None and cache.slots < slots:
        cache = decode_loop.grow(cache, slots)
    if before is not None and cache is not None:  # as wide as it: no program for each length
        fill = ((0, 0), (0, cache.slots - before.shape[1]))
        before = np.pad(before, fill, constant_values=cfg.text.vocab_size).astype(np.int32)

    def start(params, vision, batch, features, cache, before):
        if vision is not None:
            features = vision_encode(params, cfg, vision)
        how = {"features": features, "chunk": options.chunk_of(width)}
        if cache is None:
            made = prefill(params, cfg, batch, slots, **how)
        else:
            made = _extend(params, cfg, cache, batch, **how)
        if options.copies > 1:
            made = _repeat(made, options.copies)
        tokens = before, batch.tokens, batch.segment_ids
        return _first(*made, tokens, first, cfg.text.vocab_size, options.copies)

    first = rows.replace(masks=masks_of(constraints, cfg.text.vocab_size))
    given = params, vision if features is None else None, batch, features, cache, before
    wait = _compile_steps(cfg, options, rows, slots, start, given)
    decoder = Decoder(params, cfg, start(*given), rows)
    decoder.constraints = constraints
    wait()
    faults, count = {}, 0
    for new in decoder.chunks(filled, options.max_new_tokens, options.steps):
        for row in np.flatnonzero((new < ENDED).any(axis=1)).tolist():
            faults[row] = fault_of(new[row], count)
        count += new.shape[1]
        ended = yield np.maximum(new[:, (new >= 0).any(axis=0)], ENDED)
        if ended is not None:
            decoder.ended |= np.asarray(ended, bool)
            for row in np.flatnonzero(ended).tolist():
                faults.pop(row, None)  # the caller ended its answer before the fault
    if faults:
        raise NotFiniteError(faults)
    return decoder.state.cache


# Hashes of the programs of decode_steps that this process has begun to compile.
_BEGUN: set[int] = set()


def _compile_steps(cfg, options, rows, slots, start, given) -> Callable[[], None]:
    """Begins to compile the first decode_steps after `start(*given)`; waits for it where it is called."""
    params, count = given[0], len(rows.seeds)
    program = hash((cfg, count, slots, len(rows.stop_ids), rows.logits_fn, compute_dtype(params)))
    norm = params["norm"]
    on_many = isinstance(norm, jax.Array) and len(norm.sharding.device_set) > 1
    if mesh_sizes() or on_many or options.max_new_tokens < 2 or program in _BEGUN:
        return lambda: None
    # Shapes as arrays have them that come of one device's parameters.
    where = norm.sharding if getattr(norm, "committed", False) else None
    state = jax.tree.map(lambda x: x.update(sharding=where), jax.eval_shape(start, *given))
    steps = min(options.steps, options.max_new_tokens - 1)
    none = np.zeros(count, bool)
    wait = decode_loop.compile_ahead(params, cfg, state, none, rows, steps, count)
    _BEGUN.add(program)
    return wait


_extend = jax.jit(extend, static_argnames=("cfg", "chunk"), donate_argnames="cache")


@functools.partial(jax.jit, static_argnames="copies")
def _repeat(rows, copies):
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), rows)


@functools.partial(jax.jit, static_argnames=("vocabulary", "copies"), donate_argnames="cache")
def _first(cache, logits, tokens, rows, vocabulary, copies):
    before, new, segment_ids = tokens
    tokens = jnp.where(segment_ids > 0, new, vocabulary)
    tokens = tokens if before is None else jnp.concatenate([before, tokens], axis=1)
    return decode_loop.first_token(cache, logits, jnp.repeat(tokens, copies, axis=0), rows)
