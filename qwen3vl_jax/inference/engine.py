"""Continuous batching: many prompts through the rows of one cache, a freed row refilled at once.

Every shape is static: prompts come in as groups padded to a bucket, and a dispatch of decode steps is
one program whatever its rows hold. Source: Orca (OSDI 2022). Dims as in layers.py; A rows of a group.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.inference.decode_loop import (
    STEPS,
    DecodeState,
    decode_steps,
    fault_of,
    first_token,
    on_mesh,
)
from qwen3vl_jax.inference.generate import (
    cache_slots,
    checked_stop_ids,
    grow,
    take,
)
from qwen3vl_jax.inference.prefix_cache import Prefix, PrefixStore
from qwen3vl_jax.inference.sampling import Sampling, SamplingRows, row_seeds
from qwen3vl_jax.inference.vision_cache import FeatureStore
from qwen3vl_jax.model.cache import (
    extend,
    grow_cache,
    init_cache,
    insert_rows,
    prefill,
)
from qwen3vl_jax.model.structs import Params, check_call
from qwen3vl_jax.model.transformer import compute_dtype
from qwen3vl_jax.processing.batch import bucket, group_batch, group_size
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, from_hf_arrays

LOOK_AHEAD = 2  # prompts held ready, for each row
EXPECTED = 256  # answer tokens that the first cache has room for: it grows for longer ones


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

    prompt: what `Processor.encode` gives for one conversation, or the arrays of `Processor.inputs`.
    key: anything, it comes back with the answer. The other fields are those of `generate`, one value
    each.
    """

    key: Any
    prompt: EncodedPrompt | Mapping[str, Any]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens)
        self.sampling.rows(1)
        row_seeds(self.seed, 1)


@dataclasses.dataclass(frozen=True)
class Finished:
    """An answer: its tokens, with the stop id that ended it, and their log-probabilities (fp32).

    finish_reason is "stop", "length", or "error" where logits were not finite: `error` then says so, and
    tokens are those before. Log-probabilities are the model's own, before penalties, temperature and
    filters.
    """

    key: Any
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    error: str = ""


@dataclasses.dataclass
class Stats:
    """What was done so far, counted."""

    rows: int = 0
    steps: int = 0  # decode steps, each of all rows
    row_steps: int = 0  # of steps * rows, those that gave a token
    tokens: int = 0  # answer tokens
    prefilled: int = 0  # prompt tokens that were run, those of kept prefixes too
    reused: int = 0  # prompt tokens that a kept prefix spared
    prefixes: int = 0  # kept prefixes made
    encoded: int = 0  # images and videos that the vision tower ran on
    shown: int = 0  # images and videos of the prompts

    @property
    def busy(self) -> float:
        """The share of all rows of all decode steps that gave a token."""
        return self.row_steps / max(self.steps * self.rows, 1)


def generate_many(
    params: Params,
    cfg: Config,
    requests: Iterable[Request | None],
    *,
    stop_ids: tuple[int, ...],
    decode: Callable[[list[int]], str] | None = None,
    rows: int = 16,
    prefill_chunk: int | None = None,
    stats: Stats | None = None,
) -> Iterator[Finished]:
    """Answers any number of requests, `rows` at a time, and yields a `Finished` when one ends.

        prompts = proc.encode(conversations)
        asked = (Request(i, prompt, 64) for i, prompt in enumerate(prompts))
        for one in generate_many(params, cfg, asked, stop_ids=proc.stop_ids): ...

    Requests are drawn as they are needed; a None says that none is ready yet. An answer is the one
    `generate` gives to its prompt alone (in 16 bits up to rounding, which the shapes of a group and of
    the rows change; for the rope types dynamic and longrope only while no row is beyond the limit, since
    the longest of the rows decides for all). stop_strings need `decode` (tokens -> text). A picture that
    comes again is not encoded again, and what several waiting prompts begin with is prefilled once.
    prefill_chunk: as in `prefill`, for wider prompts. `stats` is counted up. Layers are per-layer lists.
    Raises InputError for values out of range.
    """
    check_call(params, cfg)
    check_int("rows", rows)
    check_int("prefill_chunk", 1 if prefill_chunk is None else prefill_chunk)
    stop_ids = checked_stop_ids(cfg, stop_ids)
    engine = _Engine(params, cfg, stop_ids, decode, rows, prefill_chunk, stats or Stats())
    source, more = iter(requests), True
    while True:
        while more and len(engine.waiting) < LOOK_AHEAD * rows:
            request = next(source, source)
            if request is source:
                more = False
            elif isinstance(request, Request):
                engine.add(request)
            else:
                break
        yield from engine.refill(more)
        if engine.running:
            yield from engine.step()
        elif not engine.waiting and not more:
            return
        elif not engine.waiting:
            time.sleep(0.002)  # until a prompt is ready


@dataclasses.dataclass
class _Running:
    """What a row answers, and its answer so far; `filled` slots of the cache at most."""

    request: Request
    prompt: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    @property
    def filled(self) -> int:
        return self.prompt + len(self.tokens)


class _New(flax.struct.PyTreeNode):
    """What a group brings beside its batch, one entry a prompt."""

    rows: jax.Array  # [A] int32: the row each goes to, past the last where there is none
    before: jax.Array  # [A T] int32: its tokens before the batch, past the vocabulary at padding
    seeds: jax.Array  # [A] uint32
    limit: jax.Array  # [A] int32
    sampling: SamplingRows


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "slots"))
def _empty(params, cfg, rows, slots) -> DecodeState:
    """A state whose rows have all ended."""
    vocab, zero = cfg.text.vocab_size, jnp.zeros(rows, jnp.int32)
    none = jnp.zeros((rows, vocab), bool)
    return on_mesh(DecodeState(
        cache=init_cache(cfg, rows, slots, compute_dtype(params)),
        token=zero,
        logprob=jnp.zeros(rows, jnp.float32),
        count=zero,
        limit=zero,
        done=zero == 0,
        seen=none,
        answered=none,
        keys=jax.vmap(jax.random.key)(zero),
    ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"), donate_argnames="state")
def _admit(params, cfg, state, batch, features, prefix, new, stop_ids, chunk):
    """Prefills a group, behind a copy of the prefix if there is one, and puts it into its rows.

    Returns the state, and the group's first tokens [A] with their log-probabilities [A].
    """
    group, width = batch.tokens.shape
    if prefix is None:
        cache, logits = prefill(params, cfg, batch, width, features=features, chunk=chunk)
    else:
        cache = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), prefix)
        cache = grow_cache(cache, prefix.slots + width)
        cache, logits = extend(params, cfg, cache, batch, features=features)
    tokens = jnp.where(batch.segment_ids > 0, batch.tokens, cfg.text.vocab_size)
    tokens = jnp.concatenate([new.before, tokens], axis=1)
    first = first_token(cache, logits, tokens, new.sampling, stop_ids, new.seeds, new.limit, None)
    cache = insert_rows(state.cache, new.rows, first.cache)

    pair = (state.replace(cache=None), first.replace(cache=None))
    state = jax.tree.map(lambda old, x: old.at[new.rows].set(x, mode="drop"), *pair)
    return on_mesh(state.replace(cache=cache)), first.token, first.logprob


@functools.partial(jax.jit, donate_argnames="state")
def _emptied(state, row) -> DecodeState:
    """The state with zeros in a row's cache: NaN there would reach the next answer, as 0 times NaN."""
    k, v = ([x.at[row].set(0) for x in part] for part in (state.cache.k, state.cache.v))
    return on_mesh(state.replace(cache=state.cache.replace(k=k, v=v)))


class _Engine:
    """The host's side: who waits, which row answers what, and what is kept for later prompts."""

    def __init__(self, params, cfg, stop_ids, decode, rows, chunk, stats):
        self.params, self.cfg, self.decode, self.chunk = params, cfg, decode, chunk
        self.stop_ids, self.stops = tuple(stop_ids), np.asarray(stop_ids, np.int32)
        self.rows, self.stats, self.group = rows, stats, group_size(rows)
        self.waiting: list[tuple[Request, EncodedPrompt]] = []
        self.running: dict[int, _Running] = {}
        self.features = FeatureStore(params, cfg)
        self.prefixes = PrefixStore(params, cfg, self.features, chunk)
        self.sampling = jax.tree.map(np.array, Sampling().rows(rows))
        self.ended = np.zeros(rows, bool)
        self.state: Any = None  # a DecodeState once the first prompts are there
        stats.rows = rows

    def add(self, request: Request) -> None:
        """Puts a request behind those that wait."""
        if request.stop_strings and self.decode is None:
            raise InputError("stop_strings need decode=, the function from tokens to text")
        given = request.prompt
        prompt = given if isinstance(given, EncodedPrompt) else from_hf_arrays(self.cfg, given)
        self.waiting.append((dataclasses.replace(request, prompt={}), prompt.with_digests()))
        self.stats.shown += len(prompt.images)

    def refill(self, more: bool) -> Iterator[Finished]:
        """Fills free rows, a whole group at a time; yields answers that end with their first token."""
        while self.waiting:
            free = [row for row in range(self.rows) if row not in self.running]
            group = self.group if more else min(self.group, len(self.waiting))
            if len(free) < group or (len(self.waiting) < group and self.running):
                return
            yield from self._admit(free)

    def step(self) -> Iterator[Finished]:
        """One dispatch of decode steps; yields the answers that ended."""
        self._room(max(run.filled for run in self.running.values()) + STEPS)
        free = self.rows - len(self.running)
        enough = max(self.group, free + 1) if self.waiting else self.rows
        self.state, tokens, logprobs = decode_steps(
            self.params, self.cfg, self.state, self.ended, self.sampling, self.stops, STEPS, enough, None
        )  # fmt: skip
        self.ended = np.zeros(self.rows, bool)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        self.stats.steps += int((tokens >= 0).any(0).sum())
        self.stats.row_steps += int((tokens >= 0).sum())
        for row in list(self.running):
            yield from self._take(row, tokens[row], logprobs[row])

    def _take(self, row: int, tokens: np.ndarray, logprobs: np.ndarray) -> Iterator[Finished]:
        """Adds new tokens to a row's answer; yields it if it has ended."""
        run = self.running[row]
        request, old = run.request, len(run.tokens)
        stop = take(run.tokens, tokens, self.stop_ids, request.stop_strings, self.decode)
        count = len(run.tokens) - old
        run.logprobs += logprobs[:count].tolist()
        self.stats.tokens += count
        fault = "" if stop else fault_of(tokens, old)
        if fault:
            self.state = _emptied(self.state, row)
        if stop or fault or len(run.tokens) >= request.max_new_tokens:
            self.ended[row] = True
            del self.running[row]
            reason = "error" if fault else "stop" if stop else "length"
            yield Finished(request.key, run.tokens, run.logprobs, reason, fault)

    def _room(self, needed: int) -> None:
        """A cache with `needed` slots a row, doubled as often as it takes."""
        if self.state is None:
            likely = (len(p.ids) + min(r.max_new_tokens, EXPECTED) for r, p in self.waiting)
            slots = cache_slots(max(needed, *likely))
            self.state = _empty(self.params, self.cfg, self.rows, slots)
        if needed > self.state.cache.slots:
            cache = grow(self.state.cache, slots=cache_slots(needed))
            self.state = self.state.replace(cache=cache)

    def _admit(self, free: list[int]) -> Iterator[Finished]:
        """Prefills the oldest waiting prompt with others of its bucket."""
        first, *others = [prompt for _, prompt in self.waiting]
        prefix = self.prefixes.best(first, others)
        start = 0 if prefix is None else prefix.length
        width = bucket(len(first.ids) - start)
        chosen = self._fitting(prefix, start, width)[: self.group]
        new = [self.waiting[i] for i in chosen]
        self._room(max(len(prompt.ids) for _, prompt in new) + 1)
        self.waiting = [x for i, x in enumerate(self.waiting) if i not in chosen]
        rests = [prompt.rest(start) for _, prompt in new]
        padded = new + [new[0]] * (self.group - len(new))
        rests += [rests[0].rest(len(rests[0].ids) - 1)] * (self.group - len(new))
        rows = free[: len(new)] + [self.rows] * (self.group - len(new))
        brought = self._new(padded, rows, prefix)
        self.state, tokens, logprobs = _admit(
            self.params, self.cfg, self.state, group_batch(self.cfg, rests, width),
            self.features.of(rests, len(rests) * width), None if prefix is None else prefix.cache,
            brought, self.stops, self.chunk if self.chunk and width > self.chunk else None,
        )  # fmt: skip
        tokens, logprobs = np.asarray(tokens)[:, None], np.asarray(logprobs)[:, None]
        self._count(sum(len(prompt.ids) - start for _, prompt in new), start * len(new))
        for i, (request, prompt) in enumerate(new):
            self.running[rows[i]] = _Running(request, len(prompt.ids))
            self.ended[rows[i]] = False
            held = jax.tree.leaves(self.sampling)
            for old, x in zip(held, jax.tree.leaves(brought.sampling), strict=True):
                old[rows[i]] = x[i]
            yield from self._take(rows[i], tokens[i], logprobs[i])

    def _count(self, run: int, reused: int) -> None:
        """Counts prompt tokens, and what the stores did since the last time."""
        stats, prefixes = self.stats, self.prefixes
        stats.prefilled += run + prefixes.tokens
        stats.reused += reused
        stats.prefixes += prefixes.made
        stats.encoded += self.features.encoded
        prefixes.tokens = prefixes.made = self.features.encoded = 0

    def _fitting(self, prefix: Prefix | None, start: int, width: int) -> list[int]:
        """Waiting prompts with this prefix that fit: the oldest, then the longest."""
        fitting = [
            i for i, (_, prompt) in enumerate(self.waiting)
            if self.prefixes.kept(prompt) is prefix and len(prompt.ids) - start <= width
        ]  # fmt: skip
        others = sorted((i for i in fitting if i), key=lambda i: -len(self.waiting[i][1].ids))
        return [0, *others]

    def _new(self, requests, rows: list[int], prefix: Prefix | None) -> _New:
        before = np.zeros((len(rows), 0 if prefix is None else prefix.cache.slots), np.int32)
        if prefix is not None:
            before[:] = self.cfg.text.vocab_size
            before[:, : prefix.length] = prefix.prompt.ids
        sampling = [request.sampling.rows(1) for request, _ in requests]
        host: dict[str, Any] = {
            "rows": np.asarray(rows, np.int32),
            "before": before,
            "seeds": np.asarray([request.seed for request, _ in requests], np.uint32),
            "limit": np.asarray([request.max_new_tokens for request, _ in requests], np.int32),
            "sampling": jax.tree.map(lambda *x: np.concatenate(x), *sampling),
        }
        return _New(**host)
