"""Decode steps on the device: the state of every row, the choice of its next token, 16 steps a dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.errors import not_finite
from qwen3vl_jax.inference.sampling import NOT_FINITE, draw, penalize
from qwen3vl_jax.model.cache import decode_step, pinned
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.model.structs import KVCache

# (logits [B V] after the penalties, state) -> logits. A pure function; pass the same object each time,
# it is part of what a compiled program is found by.
LogitsFn = Callable[[jax.Array, "DecodeState"], jax.Array]
STEPS = 16  # decode steps a dispatch: the host looks at the answer in between
# In place of a token: the row had ended; its logits were not finite (NOT_FINITE), or were so only after
# penalties and logits_fn.
ENDED, NOT_FINITE_AFTER = -1, -3


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
    # A mask of logits_fn may hold -infinity, the model's own logits may not: the log-probability of
    # the chosen token is NaN where any logit is NaN or +infinity, the lowest is -infinity where one is.
    lowest = jnp.min(logits, axis=1)
    logits = penalize(logits, sampling, state.seen, state.answered, state.count, stop_ids)
    if logits_fn is not None:
        logits = logits_fn(logits, state)
    token, live = draw(logits, sampling, state.keys, state.count), ~state.done
    logprob = likely[rows, jnp.maximum(token, 0)]
    token = jnp.where(token == NOT_FINITE, NOT_FINITE_AFTER, token)
    token = jnp.where(jnp.isfinite(logprob) & jnp.isfinite(lowest), token, NOT_FINITE)
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
