"""generate() and stream(): prefill, then several decode steps a dispatch until every row has ended.

The jits live here; the cache is donated from one dispatch to the next and doubles when it is full.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.cache import decode_step, extend, grow_cache, pinned, prefill
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError, not_finite
from qwen3vl_jax.processing.tokenizer import find_stop, stop_list
from qwen3vl_jax.sampling import NOT_FINITE, Sampling, draw, penalize, row_seeds
from qwen3vl_jax.sharding import shard
from qwen3vl_jax.structs import Batch, Features, KVCache, Params, check_call
from qwen3vl_jax.vision import vision_encode

# (logits [B V] after the penalties, state) -> logits. A pure function; pass the same object each time,
# it is part of what a compiled program is found by.
log = logging.getLogger("qwen3vl_jax")
LogitsFn = Callable[[jax.Array, "DecodeState"], jax.Array]
STEPS = 16  # decode steps a dispatch: the host looks at the answer in between
# In place of a token: the row had ended; its logits were not finite (NOT_FINITE), or were so only after
# penalties and logits_fn.
ENDED, NOT_FINITE_AFTER = -1, -3
SMALLEST_CACHE = 256


class DecodeState(flax.struct.PyTreeNode):
    """Everything a decode step needs and changes, one entry a row."""

    cache: KVCache
    token: jax.Array  # [B] int32: chosen, not yet in the cache
    logprob: jax.Array  # [B] float32: of `token`, before penalties, temperature and filters
    count: jax.Array  # [B] int32: answer tokens so far, `token` included
    limit: jax.Array  # [B] int32: answer tokens at which a row ends
    done: jax.Array  # [B] bool
    seen: jax.Array  # [B V] bool: in prompt or answer
    answered: jax.Array  # [B V] bool: in the answer
    keys: jax.Array  # [B] random keys


def on_mesh(state: DecodeState) -> DecodeState:
    """The state as every dispatch leaves it on the ambient mesh, so that none is compiled twice."""
    wide = {name: shard(getattr(state, name), "rows", None) for name in ("seen", "answered")}
    rest = {name: shard(getattr(state, name), None) for name in _BY_ROW}
    return state.replace(cache=pinned(state.cache), **wide, **rest)


_BY_ROW = ("token", "logprob", "count", "limit", "done", "keys")


@dataclasses.dataclass
class Answer:
    """tokens [B max_new_tokens] int32 (a stop id that ended a row is kept), lengths [B], reasons.

    finish_reasons are "stop" (stop id or stop string), "length", or "error" where logits were not finite:
    errors [B] then says so, and is "" otherwise. Beyond its length a row holds a stop id (0 without any).
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


def fault_of(tokens: np.ndarray, count: int) -> str:
    """What is wrong with a row's new tokens [n], "" if nothing is; count: tokens answered before."""
    wrong = np.flatnonzero(tokens < ENDED)
    if not len(wrong):
        return ""
    place = f"logits of answer token {count + int(wrong[0]) + 1}"
    if tokens[wrong[0]] == NOT_FINITE_AFTER:
        return f"{place}: got no finite number after penalties and logits_fn, expected one; use milder ones"
    return not_finite(place)


def _choose(logits, state, sampling, stop_ids, logits_fn) -> DecodeState:
    rows, likely = jnp.arange(logits.shape[0]), jax.nn.log_softmax(logits)
    logits = penalize(logits, sampling, state.seen, state.answered, state.count, stop_ids)
    if logits_fn is not None:
        logits = logits_fn(logits, state)
    token, live = draw(logits, sampling, state.keys, state.count), ~state.done
    logprob = likely[rows, jnp.maximum(token, 0)]  # no number if a single logit is NaN or infinity
    token = jnp.where(token == NOT_FINITE, NOT_FINITE_AFTER, token)
    token = jnp.where(jnp.isfinite(logprob), token, NOT_FINITE)
    wrong = token < 0
    mark = (rows, jnp.where(live & ~wrong, token, logits.shape[1]))
    count = state.count + live
    return state.replace(
        token=token,
        logprob=logprob,
        count=count,
        done=state.done
        | wrong
        | jnp.any(token[:, None] == stop_ids, axis=1)
        | (count >= state.limit),
        seen=state.seen.at[mark].set(True, mode="drop"),
        answered=state.answered.at[mark].set(True, mode="drop"),
    )


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "slots", "copies", "logits_fn", "chunk"),
    donate_argnames="cache",
)
def _start(
    params, cfg, batch, features, cache, before, sampling, stop_ids, seeds, limit, slots, copies,
    logits_fn, chunk,
):  # fmt: skip
    """Prefill, or more tokens onto a kept cache, and the first token of every copy of every row."""
    if cache is None:
        cache, logits = prefill(params, cfg, batch, slots, features=features, chunk=chunk)
    else:
        cache, logits = extend(params, cfg, cache, batch, features=features, chunk=chunk)
    tokens = jnp.where(batch.segment_ids > 0, batch.tokens, cfg.text.vocab_size)
    tokens = tokens if before is None else jnp.concatenate([before, tokens], axis=1)
    cache, logits, tokens = (
        jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), part)
        for part in (cache, logits, tokens)
    )
    return first_token(cache, logits, tokens, sampling, stop_ids, seeds, limit, logits_fn)


def first_token(cache, logits, tokens, sampling, stop_ids, seeds, limit, logits_fn) -> DecodeState:
    """The state after a prefill: tokens [B T] are the prompt's, past the vocabulary at padding."""
    (rows, _), zero = logits.shape, jnp.zeros(logits.shape[0], jnp.int32)
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], tokens]
    state = DecodeState(
        cache=cache,
        token=zero,
        logprob=jnp.zeros(rows, jnp.float32),
        count=zero,
        limit=jnp.broadcast_to(jnp.asarray(limit, jnp.int32), rows),
        done=zero > 0,
        seen=seen.set(True, mode="drop"),
        answered=jnp.zeros(logits.shape, bool),
        keys=jax.vmap(jax.random.key)(seeds),
    )
    return on_mesh(_choose(logits, state, sampling, stop_ids, logits_fn))


@functools.partial(jax.jit, static_argnames=("cfg", "logits_fn"), donate_argnames="state")
def decode_steps(params, cfg, state, ended, sampling, stop_ids, steps, enough, logits_fn):
    """At most `steps` decode steps in one dispatch, fewer once `enough` rows have ended.

    ended [B] bool: rows that the host ends now. Returns the state, tokens [B STEPS] (ENDED where a row had
    ended or no step was taken, NOT_FINITE where its logits ended it) and their log-probabilities [B STEPS].
    """

    def going(carry):
        i, state, _ = carry
        return (i < steps) & (jnp.sum(state.done) < enough)

    def step(carry):
        i, old, (tokens, logprobs) = carry
        cache, logits = decode_step(params, cfg, old.cache, old.token)
        kept = jnp.where(old.done, old.cache.length, cache.length)  # an ended row stays as it is
        new = old.replace(cache=cache.replace(length=kept))
        new = _choose(logits, new, sampling, stop_ids, logits_fn)
        tokens = tokens.at[:, i].set(jnp.where(old.done, ENDED, new.token))
        return i + 1, new, (tokens, logprobs.at[:, i].set(new.logprob))

    shape = (state.token.shape[0], STEPS)
    out = (jnp.full(shape, ENDED, jnp.int32), jnp.zeros(shape, jnp.float32))
    state = state.replace(done=state.done | ended)
    _, state, out = jax.lax.while_loop(going, step, (0, state, out))
    return on_mesh(state), *(shard(x, None, None) for x in out)


encode = jax.jit(vision_encode, static_argnames="cfg")
grow = jax.jit(grow_cache, static_argnames="slots")


def cache_slots(needed: int) -> int:
    """The cache size for `needed` tokens: a power of two, so that few programs are compiled."""
    return max(SMALLEST_CACHE, 1 << (needed - 1).bit_length())


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
) -> Generator[np.ndarray, np.ndarray | None, KVCache]:
    """Yields new tokens [B n] int32 as they come, n <= steps; -1 where a row had already ended.

    copies: so many answers to each prompt, which is prefilled once; rows are then prompt 0's answers,
    prompt 1's, ..: wherever B stands here, copies are counted in.
    seed: one a row, or a first one (row b takes seed + b); a row's draws depend on nothing else.
    stop_ids None takes the config's; () never stops. max_len limits prompt + answer. `send` a bool [B]
    to end rows (stop strings do). prefill_chunk: see `prefill`; rows no wider are filled whole. cache:
    a kept one that the batch goes on from, as in `extend` (given away); the generator's return value is
    the cache after the answer, less its last token. before [B n] int32: the tokens in that cache, which
    the repetition penalty sees too (those past the vocabulary are none). Raises InputError, before
    anything runs, for values out of range, a prompt too long and packed rows; and a NotFiniteError once all
    rows have ended, if the logits of some were not finite (they end there, the others go on).
    """
    check_call(params, cfg, batch=batch)
    if copies < 1:
        raise InputError(f"copies is {copies}, expected answers to a prompt from 1")
    rows = copies * batch.tokens.shape[0]
    segments = np.asarray(batch.segment_ids)
    if segments.max(initial=0) > 1:
        raise InputError(
            "generate: packed rows (segment_ids over 1) cannot be answered, one prompt a row"
        )
    kept = 0 if cache is None else int(np.max(cache.length))
    prompt = kept + int(np.max(np.sum(segments > 0, axis=1)))
    _check_lengths(max_new_tokens, prompt, max_len, steps)
    choice = (
        (sampling or Sampling()).rows(rows),
        np.asarray(checked_stop_ids(cfg, stop_ids), np.int32),
        row_seeds(seed, rows),
        logits_fn,
    )
    if prefill_chunk is not None and prefill_chunk < 1:
        raise InputError(f"prefill_chunk is {prefill_chunk}, expected tokens from 1")
    chunk = prefill_chunk if prefill_chunk and batch.tokens.shape[1] > prefill_chunk else None
    if before is not None and before.shape != (len(segments), kept):
        raise InputError(f"before: shape {before.shape}, the cache holds {(len(segments), kept)}")
    return _stream(
        params, cfg, batch, features, cache, before, choice, max_new_tokens, steps, copies, chunk
    )


def _stream(
    params, cfg, batch, features, cache, before, choice, max_new_tokens, steps, copies, chunk
):
    sampling, stops, seeds, logits_fn = choice
    if features is None and batch.vision is not None:
        features = encode(params, cfg, batch.vision)
    batch = batch.replace(vision=None, labels=None)
    width = batch.tokens.shape[1]  # not the prompt's length: what is compiled is a bucket's
    width += 0 if cache is None else int(np.max(cache.length))
    slots = cache_slots(width + min(steps, max_new_tokens))
    if cache is not None and cache.slots < slots:
        cache = grow(cache, slots=slots)
    if before is not None and cache is not None:  # as wide as it: no program for each length
        fill = ((0, 0), (0, cache.slots - before.shape[1]))
        before = np.pad(before, fill, constant_values=cfg.text.vocab_size).astype(np.int32)
    choice, limit = (sampling, stops, seeds), np.int32(max_new_tokens)
    state = _start(
        params, cfg, batch, features, cache, before, *choice, limit, slots, copies, logits_fn, chunk
    )
    made, rows, none = 1, len(seeds), np.zeros(len(seeds), bool)
    faults: dict[int, str] = {}

    def checked(
        new: np.ndarray, before: int
    ) -> Generator[np.ndarray, np.ndarray | None, np.ndarray]:
        """Yields columns that hold tokens, ENDED elsewhere; returns the rows that the host ends."""
        for row in np.flatnonzero((new < ENDED).any(axis=1)).tolist():
            faults[row] = fault_of(new[row], before)
        ended = yield np.maximum(new[:, (new >= 0).any(axis=0)], ENDED)
        ended = none if ended is None else np.asarray(ended, bool)
        for row in np.flatnonzero(ended).tolist():
            faults.pop(row, None)  # its answer ended before
        return ended

    ended = yield from checked(np.asarray(state.token)[:, None], 0)
    while made < max_new_tokens:
        if np.all(np.asarray(state.done) | ended):
            break
        count = min(steps, max_new_tokens - made)
        if width + made + count > state.cache.slots:
            state = state.replace(cache=grow(state.cache, slots=2 * state.cache.slots))
        state, out, _ = decode_steps(
            params, cfg, state, ended, sampling, stops, count, rows, logits_fn
        )
        out = np.asarray(out)[:, :count]
        ended = yield from checked(out, made)
        made += count
    if faults:
        raise NotFiniteError(faults)
    return state.cache


def checked_stop_ids(cfg: Config, stop_ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ids that end an answer, the config's for None; raises InputError outside the vocabulary."""
    given = cfg.eos_token_ids if stop_ids is None else stop_ids
    ids = tuple(int(i) for i in np.ravel(np.asarray(given, np.int64)))
    wrong = [i for i in ids if not 0 <= i < cfg.text.vocab_size]
    if wrong:
        raise InputError(f"stop_ids: {wrong[0]} is outside the vocabulary of {cfg.text.vocab_size}")
    return ids


def _check_lengths(max_new_tokens: int, prompt: int, max_len: int | None, steps: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, expected >= 1")
    if not 1 <= steps <= STEPS:
        raise InputError(f"steps is {steps}, expected 1 to {STEPS}")
    if max_len is not None and prompt + max_new_tokens > max_len:
        raise InputError(
            f"the prompt has {prompt} tokens and the answer may have {max_new_tokens}, but the cache "
            f"holds {max_len}: shorten the prompt, use fewer pixels, or allow a longer cache"
        )


def generate(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    seed: int | Sequence[int] = 0,
    max_len: int | None = None,
    features: Features | None = None,
    logits_fn: LogitsFn | None = None,
    steps: int = STEPS,
    prefill_chunk: int | None = None,
    copies: int = 1,
) -> Answer:
    """Answers every row of the batch; arguments are those of `stream`.

    stop_strings end a row with the token that completes one; they need `decode` (tokens -> text, a
    Processor's). A row whose logits are not finite ends there, with a warning and the finish_reason
    "error". Raises InputError as `stream` does for values out of range.
    """
    check_call(params, cfg, batch=batch)
    strings = stop_list(stop_strings)
    if strings and decode is None:
        raise InputError("stop_strings need decode=, the function from tokens to text")
    stops = checked_stop_ids(cfg, stop_ids)
    rows = copies * batch.tokens.shape[0]
    answers: list[list[int]] = [[] for _ in range(rows)]
    stopped = np.zeros(rows, bool)
    chunks = stream(
        params, cfg, batch, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stops,
        seed=seed, max_len=max_len, features=features, logits_fn=logits_fn, steps=steps,
        prefill_chunk=prefill_chunk, copies=copies,
    )  # fmt: skip
    try:
        new = next(chunks)
        while True:
            for b in np.flatnonzero(~stopped):
                stopped[b] = take(answers[b], new[b], stops, strings, decode)
            new = chunks.send(stopped)
    except StopIteration:
        faults = {}
    except NotFiniteError as error:
        faults = error.rows
        log.warning("generate: %s", error)
    tokens = np.full((rows, max_new_tokens), stops[0] if stops else 0, np.int32)
    for b, answer in enumerate(answers):
        tokens[b, : len(answer)] = answer
    lengths = np.array([len(a) for a in answers], np.int32)
    reasons = ["error" if b in faults else "stop" if s else "length" for b, s in enumerate(stopped)]
    return Answer(tokens, lengths, reasons, [faults.get(b, "") for b in range(rows)])


def take(answer: list[int], new: np.ndarray, stops, stop_strings, decode) -> bool:
    """Appends a row's new tokens; True when one of them ended it."""
    for token in new.tolist():
        if token < 0:
            continue
        answer.append(token)
        if token in stops:
            return True
        if stop_strings and decode is not None:
            span = 4 * max(map(len, stop_strings)) + 4  # a character is at most four tokens
            if find_stop(decode(answer[-span:]), stop_strings)[1] is not None:
                return True
    return False
