"""From logits to the next token: penalties, filters and one draw a row. Dims: model/layers.py."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.errors import InputError

# In place of a token.
NOT_FINITE = -2
# Logits that are ranked for a row of a small top-k, in place of the vocabulary.
_RANKED = 128
# One value for all rows, or one a row.
Rows = float | Sequence[float]


def _within(low: float, high: float, text: str) -> dict[str, Any]:
    return {"range": (low, high, text)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; each field is a number, or a sequence of one for each row.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0, repetition_penalty 1, presence_penalty 0 are off.
    repetition_penalty is for tokens of prompt and answer (as in transformers); presence_penalty is taken
    once off each token of the answer (as in OpenAI's API). No stop id is chosen before min_new_tokens.
    """

    temperature: Rows = dataclasses.field(default=0.0, metadata=_within(0, math.inf, ">= 0"))
    top_k: Rows = dataclasses.field(
        default=0, metadata=_within(0, 2**30, "an integer from 0 (off) to 2^30")
    )
    top_p: Rows = dataclasses.field(
        default=1.0, metadata=_within(math.ulp(0), 1, "over 0, at most 1")
    )
    min_p: Rows = dataclasses.field(default=0.0, metadata=_within(0, 1, "from 0 to 1"))
    repetition_penalty: Rows = dataclasses.field(
        default=1.0, metadata=_within(math.ulp(0), math.inf, "> 0")
    )
    presence_penalty: Rows = dataclasses.field(default=0.0, metadata=_within(-2, 2, "from -2 to 2"))
    min_new_tokens: Rows = dataclasses.field(
        default=0, metadata=_within(0, 2**30, "an integer from 0 to 2^30")
    )

    def check(self) -> dict[str, Any]:
        """Each field as an array. Raises InputError for a value out of range."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            name, (low, high, text) = field.name, field.metadata["range"]
            given, integer = getattr(self, name), "integer" in text
            try:
                # As the device has them.
                with np.errstate(over="ignore"):
                    values = np.asarray(given, np.float32).astype(np.float64)
                fits = (low <= values) & (values <= high) & np.isfinite(values)
                fits &= (values == np.rint(values)) | (not integer)
                # "5" and True are no numbers, though numpy takes them.
                numbers = np.asarray(given).dtype.kind not in "bOSU"
            except (TypeError, ValueError, OverflowError):
                fits = numbers = np.False_
            if not (numbers and fits.all()):
                raise InputError(f"{name} is {given!r}, expected {text}")
            found[name] = np.asarray(given, np.int32 if integer else np.float32)
        return found

    def rows(self, count: int) -> "Sampling":
        """The same with arrays [B], so that no value compiles a new program. Raises InputError."""
        found = self.check()
        for name, value in found.items():
            if value.ndim and value.shape != (count,):
                raise InputError(f"{name} has {value.size} values, expected 1 or {count} (rows)")
            found[name] = np.broadcast_to(value, (count,))
        return Sampling(**found)


def penalize(logits, s: Any, seen, answered, count, stop_ids) -> jax.Array:
    """Logits [B V] after the penalties; seen and answered [B V] bool, count [B] answer tokens so far."""
    factor = s.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)
    logits = logits - s.presence_penalty[:, None] * answered
    early = (count < s.min_new_tokens)[:, None]
    barred = jnp.zeros(logits.shape[1], bool).at[stop_ids].set(True, mode="drop")
    return jnp.where(early & barred, -jnp.inf, logits)


def restrict(logits: jax.Array, s: Any) -> jax.Array:
    """Temperature, top-k, top-p and min-p in transformers' order; -inf for tokens that are left out.

    All tokens that tie at the limit of top-k stay; of those at the limit of top-p the lowest ids go first.
    """
    vocab, few = logits.shape[1], min(_RANKED, logits.shape[1])
    logits = logits / jnp.where(s.temperature > 0, s.temperature, 1.0)[:, None]
    top_k = jnp.clip(jnp.where(s.top_k > 0, s.top_k, vocab), 1, vocab)[:, None]
    # The largest logits, ascending: rows of a small top-k need no others, unless many tie at its limit.
    ranked = jax.lax.top_k(logits, few)[0][:, ::-1]
    floor = jnp.take_along_axis(ranked, few - jnp.minimum(top_k, few), axis=1)
    above = (logits >= floor) & (logits > -jnp.inf)  # a mask leaves few
    small = (top_k <= few) & (jnp.sum(above, axis=1, keepdims=True) <= few)
    kept = _top_p_and_min_p(logits, ranked, floor, s)

    def with_sort(kept):
        ranked = jnp.sort(logits, axis=1, stable=False)
        floor = jnp.take_along_axis(ranked, vocab - top_k, axis=1)
        return jnp.where(small, kept, _top_p_and_min_p(logits, ranked, floor, s))

    return jax.lax.cond(jnp.all(small), lambda kept: kept, with_sort, kept)


def _top_p_and_min_p(logits, ranked, floor, s: Any) -> jax.Array:
    """`restrict` from the largest logits, ascending, and the limit [B 1] of top-k."""
    logits, ranked = (jnp.where(x < floor, -jnp.inf, x) for x in (logits, ranked))
    below = jnp.cumsum(jax.nn.softmax(ranked, axis=1), axis=1) <= 1 - s.top_p[:, None]
    # How many go; the best token always stays.
    out = jnp.minimum(jnp.sum(below, axis=1), ranked.shape[1] - 1)
    out = jnp.where(s.top_p < 1, out, 0)[:, None]
    floor = jnp.take_along_axis(ranked, out, axis=1)
    tied = logits == floor
    # How many of the tied ones go.
    spare = out - jnp.sum(ranked < floor, axis=1, keepdims=True)
    gone = (logits < floor) | (tied & (jnp.cumsum(tied, axis=1) <= spare))
    return jnp.where(gone | (logits - ranked[:, -1:] < jnp.log(s.min_p)[:, None]), -jnp.inf, logits)


def draw(logits: jax.Array, s: Any, keys: jax.Array, count: jax.Array) -> jax.Array:
    """One token a row [B] int32: argmax at temperature 0, else drawn with the row's own key.

    NOT_FINITE where the largest logit is not finite.
    """
    rows = jnp.arange(logits.shape[0])

    def checked(tokens, logits):
        return jnp.where(jnp.isfinite(logits[rows, tokens]), tokens, NOT_FINITE)

    def sampled(logits):
        row_keys = jax.vmap(jax.random.fold_in)(keys, count)
        below_best = logits - jnp.max(logits, axis=1, keepdims=True)  # finite at any temperature
        tokens = jax.vmap(jax.random.categorical)(row_keys, restrict(below_best, s))
        tokens = jnp.where(s.temperature > 0, tokens, jnp.argmax(logits, axis=1))
        return checked(tokens, below_best)  # all NaN where one logit is

    def greedy(logits):
        return checked(jnp.argmax(logits, axis=1), logits)

    return jax.lax.cond(jnp.any(s.temperature > 0), sampled, greedy, logits).astype(jnp.int32)


def row_seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    """One seed a row [B] uint32: the given ones, or seed, seed + 1, .. Raises InputError."""
    given = np.asarray(seed)
    if given.dtype.kind not in "iu" or (given < 0).any() or (given >= 2**32).any():
        raise InputError(f"seed is {seed!r}, expected integers from 0 to 2^32 - 1")
    if given.shape not in ((), (count,)):
        raise InputError(f"seed has {given.size} values, expected 1 or {count} (rows)")
    return (given if given.ndim else given + np.arange(count)).astype(np.uint32)
