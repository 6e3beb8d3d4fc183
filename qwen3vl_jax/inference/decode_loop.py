"""Decode steps on the device, and what the host does between dispatches of up to 16 of them."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.constraints import RowConstraint, masks_of
from qwen3vl_jax.inference.requests import STEPS, RowOptions
from qwen3vl_jax.inference.row_answer import ENDED, NOT_FINITE_AFTER, REFUSED
from qwen3vl_jax.inference.sampling import NOT_FINITE, draw, penalize
from qwen3vl_jax.model.cache import decode_step, grow_cache, pinned
from qwen3vl_jax.model.sharding import mesh_sizes, shard
from qwen3vl_jax.model.structs import KVCache, Params

SMALLEST_CACHE = 256
_grow_layer = jax.jit(grow_cache, static_argnames="slots")


def grow(cache: KVCache, slots: int) -> KVCache:
    """`grow_cache` layer by layer: no more than one layer is held twice. The given cache is deleted."""
    k, v = [], []
    for old in zip(cache.k, cache.v):
        layer = _grow_layer(cache.replace(k=[old[0]], v=[old[1]]), slots=slots)
        k, v = [*k, *layer.k], [*v, *layer.v]
        for x in old:
            x.delete()
    return cache.replace(k=k, v=v)


class DecodeState(flax.struct.PyTreeNode):
    """What a decode step needs and changes, one entry a row."""

    cache: KVCache
    token: jax.Array  # [B] int32: chosen, not yet in the cache
    logprob: jax.Array  # [B] float32: of `token`, before penalties, temperature and filters
    count: jax.Array  # [B] int32: answer tokens so far, `token` included
    limit: jax.Array  # [B] int32: answer tokens at which a row ends
    done: jax.Array  # [B] bool
    seen: jax.Array  # [B V] bool: in prompt or answer
    answered: jax.Array  # [B V] bool: in the answer
    keys: jax.Array  # [B] random keys


def insert_rows(cache: KVCache, rows: jax.Array, new: KVCache, source: jax.Array) -> KVCache:
    """Replaces sequence rows[a] (int32) by prompt a of `new`; a row past the last is dropped.

    source [A 2] int32: the row of `new` and the slot in it where prompt a begins. It ends at
    new.length[a]; behind it come zeros. Slots past the cache's are cut off.
    """
    row, slot = source[:, :1], source[:, 1:] + jnp.arange(min(cache.slots, new.slots))
    real = (jnp.arange(slot.shape[1]) < new.length[:, None])[..., None, None]

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        prompt = jnp.where(real, x[row, jnp.minimum(slot, x.shape[1] - 1)], 0)  # [A S K H]
        return old.at[rows, : slot.shape[1]].set(prompt.astype(old.dtype), mode="drop")

    k, v = (list(map(put, *part)) for part in ((cache.k, new.k), (cache.v, new.v)))
    length = cache.length.at[rows].set(new.length, mode="drop")
    delta = cache.delta.at[rows].set(new.delta, mode="drop")
    return pinned(cache.replace(k=k, v=v, length=length, delta=delta))


def on_mesh(state: DecodeState) -> DecodeState:
    """The state with the shardings that every dispatch leaves, so that none is compiled twice."""

    def put(x: jax.Array) -> jax.Array:
        return shard(x, "batch", None) if x.ndim == 2 else shard(x, None)

    cache = None if state.cache is None else pinned(state.cache)
    return jax.tree.map(put, state.replace(cache=None)).replace(cache=cache)


@jax.named_scope("sampling")
def _choose(logits: jax.Array, state: DecodeState, options: RowOptions) -> DecodeState:
    """The state with the next token of each row that has not ended."""
    rows, likely = jnp.arange(logits.shape[0]), jax.nn.log_softmax(logits)
    # A mask of logits_fn may hold -infinity, the model's own logits may not: the log-probability of
    # the chosen token is NaN where any logit is NaN or +infinity, the lowest is -infinity where one is.
    lowest = jnp.min(logits, axis=1)
    stops = options.stop_ids
    logits = penalize(logits, options.sampling, state.seen, state.answered, state.count, stops)
    if options.logits_fn is not None:
        logits = options.logits_fn(logits, state)
    if options.masks is not None:
        bits = options.masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]] > 0
        logits = jnp.where(shard(allowed, "batch", None), logits, -jnp.inf)
    token, live = draw(logits, options.sampling, state.keys, state.count), ~state.done
    logprob = likely[rows, jnp.maximum(token, 0)]
    token = jnp.where(token == NOT_FINITE, NOT_FINITE_AFTER, token)
    token = jnp.where(jnp.isfinite(logprob) & jnp.isfinite(lowest), token, NOT_FINITE)
    wrong = token < 0
    mark = (rows, jnp.where(live & ~wrong, token, logits.shape[1]))
    count = state.count + live
    ends = wrong | jnp.any(token[:, None] == stops, axis=1) | (count >= state.limit)
    seen, answered = (x.at[mark].set(True, mode="drop") for x in (state.seen, state.answered))
    made = {"token": token, "logprob": logprob, "count": count, "seen": seen, "answered": answered}
    return state.replace(done=state.done | ends, **made)


def first_token(
    cache: KVCache, logits: jax.Array, tokens: jax.Array, options: RowOptions
) -> DecodeState:
    """The state after a prefill: tokens [B T] are the prompt's, past the vocabulary at padding."""
    zero, none = jnp.zeros(len(logits), jnp.int32), jnp.zeros(logits.shape, bool)
    seen = none.at[jnp.arange(len(logits))[:, None], tokens].set(True, mode="drop")
    state = DecodeState(
        cache=cache,
        token=zero,
        logprob=zero.astype(jnp.float32),
        count=zero,
        limit=jnp.asarray(options.limit),
        done=zero > 0,
        seen=seen,
        answered=none,
        keys=jax.vmap(jax.random.key)(options.seeds),
    )
    return on_mesh(_choose(logits, state, options))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode_steps(params, cfg, state, ended, options, steps, enough):
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
        # An ended row stays as it is.
        length = jnp.where(old.done, old.cache.length, cache.length)
        new = _choose(logits, old.replace(cache=cache.replace(length=length)), options)
        tokens = tokens.at[:, i].set(jnp.where(old.done, ENDED, new.token))
        return i + 1, new, (tokens, logprobs.at[:, i].set(new.logprob))

    shape = (state.token.shape[0], STEPS)
    out = (jnp.full(shape, ENDED, jnp.int32), jnp.zeros(shape, jnp.float32))
    state = state.replace(done=state.done | ended)
    _, state, out = jax.lax.while_loop(going, step, (0, state, out))
    return on_mesh(state), *(shard(x, None, None) for x in out)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def _next_logits(params, cfg, cache, token):
    """The logits behind `token`, and the cache with its keys and values past the length, which stays."""
    new, logits = decode_step(params, cfg, cache, token)
    return pinned(new.replace(length=cache.length)), shard(logits, "batch", None)


@functools.partial(jax.jit, donate_argnames="state")
def _masked_step(logits, state, cache, ended, options):
    """The rest of a step of `decode_steps` after `_next_logits`: as there, with the cache's lengths [B]."""
    done = state.done | ended
    length = cache.length + ~done
    new = _choose(logits, state.replace(cache=cache.replace(length=length), done=done), options)
    out = jnp.where(done, ENDED, new.token)[:, None], new.logprob[:, None]
    return (
        on_mesh(new.replace(cache=None)),
        shard(length, None),
        *(shard(x, None, None) for x in out),
    )


def compile_ahead(*args: Any) -> Callable[[], None]:
    """Compiles decode_steps for these arguments, or their shapes, in a thread; waits where it is called.

    A prompt's own programs are compiled meanwhile. The interpreter waits for the thread at its end, which
    XLA would not survive. On a mesh, where processes compile in step, it does nothing.
    """
    if mesh_sizes():
        return lambda: None
    lowered = decode_steps.lower(*args)

    def run() -> None:
        with contextlib.suppress(Exception):  # the call itself tells
            lowered.compile()

    def wait() -> None:
        if thread.is_alive():
            start = time.perf_counter()
            thread.join()
            waited = time.perf_counter() - start
            jax.monitoring.record_event_duration_secs("/jax/core/compile/ahead", waited)

    thread = threading.Thread(target=run)
    thread.start()
    return wait


class Decoder:
    """The rows of one cache. Set `ended` [B] bool to end rows with the next dispatch."""

    def __init__(self, params: Params, cfg: Config, state: Any, options: RowOptions) -> None:
        self.params, self.cfg, self.options = params, cfg, options
        self.state = state  # a DecodeState; None until there is one
        self.ended = np.zeros(len(options.seeds), bool)
        self.constraints: list[RowConstraint | None] = [None] * len(self.ended)
        # The cache that holds the keys of each row's last token, and the logits behind it.
        self.ready: tuple[Any, Any] = None, None

    def make_room(self, needed: int) -> None:
        """Grows the cache to at least `needed` slots a row."""
        if needed > self.state.cache.slots:
            cache = grow(self.state.cache, cache_slots(needed))
            self.state = self.state.replace(cache=cache)

    def run(self, steps: int, enough: int) -> tuple[np.ndarray, np.ndarray]:
        """One dispatch: tokens and their log-probabilities [B n], as `decode_steps` returns them.

        n is `steps`, which the cache has room for, or fewer that need no mask; of masked ones it is 1.
        """
        free = [x for row in self.constraints if row and (x := row.free()) is not None]
        if count := min([steps, *free]):
            given = self.params, self.cfg, self.state, self.ended, self.options
            self.state, *out = decode_steps(*given, count, enough)
            tokens, logprobs = (np.array(x)[:, :count] for x in out)
        else:
            tokens, logprobs = self._run_masked(steps > 1)
        self.ended = np.zeros_like(self.ended)
        self.take(tokens)
        return tokens, logprobs

    def _run_masked(self, goes_on: bool) -> tuple[np.ndarray, np.ndarray]:
        """One step with masks, which the host makes while the device makes the logits.

        goes_on: begins the next step's logits before it waits for the tokens.
        """

        def begin() -> tuple[Any, Any]:
            given = self.state.cache, self.state.token
            cache, logits = _next_logits({**self.params, "vision": None}, self.cfg, *given)
            self.state = self.state.replace(cache=cache)
            return cache, logits

        cache, logits = self.ready if self.ready[0] is self.state.cache else begin()
        options = self.options.replace(masks=masks_of(self.constraints, logits.shape[1]))
        given = logits, self.state.replace(cache=None), cache, self.ended, options
        self.state, length, tokens, logprobs = _masked_step(*given)
        self.state = self.state.replace(cache=cache.replace(length=length))
        self.ready = begin() if goes_on else (None, None)
        return np.array(tokens), np.asarray(logprobs)

    def take(self, tokens: np.ndarray, rows: Iterable[int] | None = None) -> None:
        """Gives new tokens [A n] to their rows' constraints; puts REFUSED in place of one they refuse."""
        for row, new in zip(rows or range(len(tokens)), tokens):
            if constraint := self.constraints[row]:
                real = np.flatnonzero(new >= 0).tolist()
                wrong = next((i for i in real if not constraint.take(int(new[i]))), None)
                if wrong is not None:
                    new[wrong], new[wrong + 1 :], self.ended[row] = REFUSED, ENDED, True

    def chunks(self, filled: int, limit: int, steps: int) -> Iterator[np.ndarray]:
        """Tokens [B n] of `decode_steps`, the first one and then `steps` at a time, until all rows end.

        filled: slots of the cache before the first token. limit: most tokens of an answer.
        """
        first, made = np.array(self.state.token)[:, None], 1
        self.take(first)
        yield first
        while made < limit:
            over = np.asarray(self.state.done) | self.ended
            if np.all(over):
                return
            self.constraints = [None if end else row for end, row in zip(over, self.constraints)]
            count = min(steps, limit - made)
            self.make_room(filled + made + count)
            new = self.run(count, len(over))[0]
            made += new.shape[1]
            yield new


def cache_slots(needed: int) -> int:
    """The cache size for `needed` tokens: a power of two, so that few programs are compiled."""
    return max(SMALLEST_CACHE, 1 << (needed - 1).bit_length())
