"""generate() and stream(): prefill, then several decode steps a dispatch until every row has ended.

The jits live here; the cache is donated from one dispatch to the next and doubles when it is full.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.cache import decode_step, extend, grow_cache, prefill
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.tokenizer import find_stop, stop_list
from qwen3vl_jax.sampling import Sampling, draw, penalize, row_seeds
from qwen3vl_jax.structs import Batch, Features, KVCache, Params
from qwen3vl_jax.vision import vision_encode

# (logits [B V] after the penalties, state) -> logits. A pure function; pass the same object each time,
# it is part of what a compiled program is found by.
LogitsFn = Callable[[jax.Array, "DecodeState"], jax.Array]
STEPS = 16  # decode steps a dispatch: the host looks at the answer in between
SMALLEST_CACHE = 256


class DecodeState(flax.struct.PyTreeNode):
    """Everything a decode step needs and changes, one entry a row."""

    cache: KVCache
    token: jax.Array  # [B] int32: chosen, not yet in the cache
    count: jax.Array  # [B] int32: answer tokens so far, `token` included
    done: jax.Array  # [B] bool
    seen: jax.Array  # [B V] bool: in prompt or answer
    answered: jax.Array  # [B V] bool: in the answer
    keys: jax.Array  # [B] random keys


@dataclasses.dataclass
class Answer:
    """tokens [B max_new_tokens] int32 (a stop id that ended a row is kept), lengths [B], reasons.

    finish_reasons are "stop" (stop id or stop string) or "length". Beyond its length a row holds a stop
    id (0 without any).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finish_reasons: list[str]


def _choose(logits, state, sampling, stop_ids, logits_fn) -> DecodeState:
    rows = jnp.arange(logits.shape[0])
    logits = penalize(logits, sampling, state.seen, state.answered, state.count, stop_ids)
    if logits_fn is not None:
        logits = logits_fn(logits, state)
    token = draw(logits, sampling, state.keys, state.count)
    live = ~state.done
    mark = (rows, jnp.where(live, token, logits.shape[1]))
    return state.replace(
        token=token,
        count=state.count + live,
        done=state.done | jnp.any(token[:, None] == stop_ids, axis=1),
        seen=state.seen.at[mark].set(True, mode="drop"),
        answered=state.answered.at[mark].set(True, mode="drop"),
    )


@functools.partial(
    jax.jit, static_argnames=("cfg", "slots", "logits_fn", "chunk"), donate_argnames="cache"
)
def _start(params, cfg, batch, features, cache, sampling, stop_ids, seeds, slots, logits_fn, chunk):
    """Prefill, or more tokens onto a kept cache, and the first token of every row."""
    if cache is None:
        cache, logits = prefill(params, cfg, batch, slots, features=features, chunk=chunk)
    else:
        cache, logits = extend(params, cfg, cache, batch, features=features)
    shape = logits.shape
    valid_token = jnp.where(batch.segment_ids > 0, batch.tokens, shape[1])
    seen = jnp.zeros(shape, bool).at[jnp.arange(shape[0])[:, None], valid_token]
    zero = jnp.zeros(shape[0], jnp.int32)
    state = DecodeState(
        cache=cache,
        token=zero,
        count=zero,
        done=zero > 0,
        seen=seen.set(True, mode="drop"),
        answered=jnp.zeros(shape, bool),
        keys=jax.vmap(jax.random.key)(seeds),
    )
    return _choose(logits, state, sampling, stop_ids, logits_fn)


@functools.partial(jax.jit, static_argnames=("cfg", "logits_fn"), donate_argnames="state")
def _steps(params, cfg, state, sampling, stop_ids, steps, logits_fn):
    """At most `steps` decode steps in one dispatch; tokens [B STEPS], -1 where a row had ended."""

    def going(carry):
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    def step(carry):
        i, state, out = carry
        cache, logits = decode_step(params, cfg, state.cache, state.token)
        before = state.done
        state = _choose(logits, state.replace(cache=cache), sampling, stop_ids, logits_fn)
        return i + 1, state, out.at[:, i].set(jnp.where(before, -1, state.token))

    out = jnp.full((state.token.shape[0], STEPS), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(going, step, (0, state, out))
    return state, out


_encode = jax.jit(vision_encode, static_argnames="cfg")
_grow = jax.jit(grow_cache, static_argnames="slots")


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
) -> Generator[np.ndarray, np.ndarray | None, KVCache]:
    """Yields new tokens [B n] int32 as they come, n <= steps; -1 where a row had already ended.

    seed: one a row, or a first one (row b takes seed + b); a row's draws depend on nothing else.
    stop_ids None takes the config's; () never stops. max_len limits prompt + answer. `send` a bool [B]
    to end rows (stop strings do). prefill_chunk: see `prefill`; rows no wider are filled whole. cache:
    a kept one that the batch goes on from, as in `extend` (given away; penalties see the batch alone);
    the generator's return value is the cache after the answer, less its last token. Raises InputError,
    before anything runs, for values out of range, a prompt too long and packed rows.
    """
    rows = batch.tokens.shape[0]
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
        np.asarray(_stop_ids(cfg, stop_ids), np.int32),
        row_seeds(seed, rows),
        logits_fn,
    )
    if prefill_chunk is not None and prefill_chunk < 1:
        raise InputError(f"prefill_chunk is {prefill_chunk}, expected tokens from 1")
    chunk = prefill_chunk if prefill_chunk and batch.tokens.shape[1] > prefill_chunk else None
    return _stream(params, cfg, batch, features, cache, choice, max_new_tokens, steps, chunk)


def _stream(params, cfg, batch, features, cache, choice, max_new_tokens, steps, chunk):
    sampling, stops, seeds, logits_fn = choice
    if features is None and batch.vision is not None:
        features = _encode(params, cfg, batch.vision)
    batch = batch.replace(vision=None, labels=None)
    width = batch.tokens.shape[1]  # not the prompt's length: what is compiled is a bucket's
    width += 0 if cache is None else int(np.max(cache.length))
    slots = cache_slots(width + min(steps, max_new_tokens))
    if cache is not None and cache.slots < slots:
        cache = _grow(cache, slots=slots)
    choice = (sampling, stops, seeds)
    state = _start(params, cfg, batch, features, cache, *choice, slots, logits_fn, chunk)
    made = 1
    ended = yield np.asarray(state.token)[:, None]
    while made < max_new_tokens:
        if ended is not None:
            state = state.replace(done=state.done | jnp.asarray(ended))
        if bool(np.all(state.done)):
            break
        count = min(steps, max_new_tokens - made)
        if width + made + count > state.cache.slots:
            state = state.replace(cache=_grow(state.cache, slots=2 * state.cache.slots))
        state, out = _steps(params, cfg, state, sampling, stops, count, logits_fn)
        made += count
        out = np.asarray(out)[:, :count]
        ended = yield out[:, (out >= 0).any(0)]
    return state.cache


def _stop_ids(cfg: Config, stop_ids: int | Sequence[int] | None) -> tuple[int, ...]:
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
) -> Answer:
    """Answers every row of the batch; arguments are those of `stream`.

    stop_strings end a row with the token that completes one; they need `decode` (tokens -> text, a
    Processor's). Raises InputError as `stream` does.
    """
    strings = stop_list(stop_strings)
    if strings and decode is None:
        raise InputError("stop_strings need decode=, the function from tokens to text")
    stops = _stop_ids(cfg, stop_ids)
    rows = batch.tokens.shape[0]
    answers: list[list[int]] = [[] for _ in range(rows)]
    stopped = np.zeros(rows, bool)
    chunks = stream(
        params, cfg, batch, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stops,
        seed=seed, max_len=max_len, features=features, logits_fn=logits_fn, steps=steps,
        prefill_chunk=prefill_chunk,
    )  # fmt: skip
    try:
        new = next(chunks)
        while True:
            for b in np.flatnonzero(~stopped):
                stopped[b] = _take(answers[b], new[b], stops, strings, decode)
            new = chunks.send(stopped)
    except StopIteration:
        pass
    tokens = np.full((rows, max_new_tokens), stops[0] if stops else 0, np.int32)
    for b, answer in enumerate(answers):
        tokens[b, : len(answer)] = answer
    lengths = np.array([len(a) for a in answers], np.int32)
    return Answer(tokens, lengths, ["stop" if s else "length" for s in stopped])


def _take(answer: list[int], new: np.ndarray, stops, stop_strings, decode) -> bool:
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
