"""generate() and stream(): prefill, then several decode steps a dispatch until every row has ended.

The jits live here; the cache is donated from one dispatch to the next and doubles when it is full.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError, check_int, shown
from qwen3vl_jax.inference.decode_loop import (
    ENDED,
    STEPS,
    LogitsFn,
    decode_steps,
    fault_of,
    first_token,
)
from qwen3vl_jax.inference.sampling import Sampling, row_seeds
from qwen3vl_jax.model.cache import extend, grow_cache, prefill
from qwen3vl_jax.model.structs import (
    Batch,
    Features,
    KVCache,
    Params,
    check_call,
)
from qwen3vl_jax.model.vision import vision_encode
from qwen3vl_jax.processing.tokenizer import find_stop, stop_list

log = logging.getLogger("qwen3vl_jax")
SMALLEST_CACHE = 256


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
    rows = check_int("copies", copies) * batch.tokens.shape[0]
    segments = np.asarray(batch.segment_ids)
    if segments.max(initial=0) > 1:
        raise InputError(
            "generate: packed rows (segment_ids over 1) cannot be answered, one prompt a row"
        )
    kept = 0 if cache is None else int(np.max(cache.length))
    prompt = kept + int(np.max(np.sum(segments > 0, axis=1)))
    _check_lengths(max_new_tokens, prompt, max_len, steps)
    sampling = Sampling() if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling: got {shown(sampling)}, expected a Sampling")
    choice = (
        sampling.rows(rows),
        np.asarray(checked_stop_ids(cfg, stop_ids), np.int32),
        row_seeds(seed, rows),
        logits_fn,
    )
    check_int("prefill_chunk", 1 if prefill_chunk is None else prefill_chunk)
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
    given = np.ravel(cfg.eos_token_ids if stop_ids is None else stop_ids)
    size = cfg.text.vocab_size
    if given.size and (given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= size):
        raise InputError(
            f"stop_ids: got {shown(stop_ids)}, expected ids in the vocabulary of {size}"
        )
    return tuple(given.tolist())


def _check_lengths(max_new_tokens: int, prompt: int, max_len: int | None, steps: int) -> None:
    check_int("max_new_tokens", max_new_tokens)
    check_int("steps", steps, STEPS)
    if max_len is not None and prompt + max_new_tokens > check_int("max_len", max_len):
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
    check_int("copies", copies)
    check_int("max_new_tokens", max_new_tokens)
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
