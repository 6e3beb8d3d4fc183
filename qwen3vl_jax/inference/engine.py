"""Continuous batching: many prompts through the rows of one cache, a freed row refilled at once.

Every shape is static: prompts come in packed, several in a row of a bucket's width, and a dispatch of
decode steps is one program whatever its rows hold. Source: Orca (OSDI 2022). Dims as in layers.py; A
prompts of a group.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.inference.decode_loop import (
    Decoder,
    DecodeState,
    RowAnswer,
    cache_slots,
    compile_ahead,
    first_token,
    insert_rows,
    on_mesh,
)
from qwen3vl_jax.inference.prompt_groups import pack, packed_group, padded_group, prefill_packed
from qwen3vl_jax.inference.requests import (
    STEPS,
    Finished,
    GenerationOptions,
    Request,
    RowOptions,
    Stats,
)
from qwen3vl_jax.inference.sampling import NOT_FINITE, row_seeds
from qwen3vl_jax.inference.stores import Prefix, Stores
from qwen3vl_jax.model.cache import extend, grow_cache, init_cache, prefill
from qwen3vl_jax.model.sharding import max_parts
from qwen3vl_jax.model.structs import Params, check_call
from qwen3vl_jax.model.transformer import compute_dtype
from qwen3vl_jax.processing.batch import bucket, group_size
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, from_hf_arrays

LOOK_AHEAD = 2  # prompts held ready, for each row
EXPECTED = 256  # answer tokens that the first cache has room for: it grows for longer ones


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
    the longest of the rows decides for all). stop_strings need `decode` (tokens -> text). An image that
    comes again is not encoded again, and what several waiting prompts begin with is prefilled once.
    prefill_chunk: as in `prefill`, for wider prompts. `stats` is counted up. Layers are per-layer lists.
    Raises InputError for values out of range.
    """
    check_call(params, cfg)
    options = GenerationOptions(1, stop_ids=stop_ids, prefill_chunk=prefill_chunk)
    rows_options = options.of_rows(cfg, check_int("rows", rows))
    engine = _Engine(params, cfg, rows_options, decode, options.chunk_of, stats or Stats())
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


class _Row(RowAnswer):
    """The answer of one row, its request and its log-probabilities."""

    def __init__(self, request: Request, prompt: int) -> None:
        super().__init__(request.max_new_tokens, request.stop_strings)
        self.request, self.prompt = request, prompt  # prompt: its tokens
        self.logprobs: list[float] = []


@functools.partial(jax.jit, static_argnames=("cfg", "slots"), keep_unused=True)
def _empty(params, cfg, slots, options) -> DecodeState:
    """A state whose rows have all ended, on the devices of params."""
    rows, vocab = len(options.seeds), cfg.text.vocab_size
    cache = init_cache(cfg, rows, slots, compute_dtype(params))
    none = jnp.full((rows, 1), vocab)
    state = first_token(cache, jnp.zeros((rows, vocab)), none, options)
    return on_mesh(state.replace(done=jnp.ones_like(state.done)))


@functools.partial(jax.jit, static_argnames="cfg")
def _extend(params, cfg, batch, features, prefix):
    group, width = batch.tokens.shape
    cache = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), prefix)
    return extend(params, cfg, grow_cache(cache, prefix.slots + width), batch, features=features)


@functools.partial(jax.jit, static_argnames="vocabulary", donate_argnames="state")
def _insert(state, filled, logits, tokens, rows, source, options, vocabulary):
    """Puts prompts into rows of the state; gives also their first tokens, and those' log-probabilities.

    rows [A] int32: the row of each prompt, past the last for none. source [A 2]: as in `insert_rows`.
    tokens [A T] int32: all of each prompt, past the vocabulary at padding.
    """
    first = first_token(filled, logits, tokens, options)
    cache = insert_rows(state.cache, rows, filled, source)
    pair = (state.replace(cache=None), first.replace(cache=None))
    state = jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), *pair)
    return on_mesh(state.replace(cache=cache)), first.token, first.logprob


@functools.partial(jax.jit, donate_argnames="state")
def _clear_row(state, row) -> DecodeState:
    """The state with zeros in a row's cache: NaN there would reach the next answer, as 0 times NaN."""
    k, v = ([x.at[row].set(0) for x in part] for part in (state.cache.k, state.cache.v))
    return on_mesh(state.replace(cache=state.cache.replace(k=k, v=v)))


class _Engine:
    """The host's side: which prompts wait, which row answers what, and what is kept for later prompts."""

    def __init__(self, params, cfg, options: RowOptions, decode, chunk_of, stats: Stats):
        self.params, self.cfg, self.decode, self.chunk_of = params, cfg, decode, chunk_of
        self.rows, self.stats = len(options.seeds), stats
        self.group = group_size(self.rows)
        self.stop_ids = options.stop_ids.tolist()
        self.waiting: list[tuple[Request, EncodedPrompt]] = []
        self.running: dict[int, _Row] = {}
        self.stores = Stores(params, cfg, chunk_of, stats)
        # Of its own, for the sampling of a row changes with its request.
        options = options.replace(sampling=jax.tree.map(np.array, options.sampling))
        self.decoder = Decoder(params, cfg, None, options)
        stats.rows = self.rows

    def add(self, request: Request) -> None:
        """Puts a request at the end of those that wait."""
        if request.stop_strings and self.decode is None:
            raise InputError("stop_strings need decode=, the function from tokens to text")
        given = request.arrays
        prompt = given if isinstance(given, EncodedPrompt) else from_hf_arrays(self.cfg, given)
        self.waiting.append((dataclasses.replace(request, arrays={}), prompt.with_digests()))
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
        filled = max(row.prompt + len(row.tokens) for row in self.running.values())
        self._make_room(filled + STEPS)
        free = self.rows - len(self.running)
        enough = max(self.group, free + 1) if self.waiting else self.rows
        self.compiled()
        tokens, logprobs = self.decoder.run(STEPS, enough)
        self.stats.steps += int((tokens >= 0).any(0).sum())
        self.stats.row_steps += int((tokens >= 0).sum())
        for row in list(self.running):
            yield from self._take(row, tokens[row], logprobs[row])

    def _take(self, row: int, tokens: np.ndarray, logprobs: np.ndarray) -> Iterator[Finished]:
        """Adds new tokens to a row's answer; yields it if it has ended."""
        answer = self.running[row]
        count = answer.add(tokens, self.stop_ids, self.decode)
        answer.logprobs += logprobs[:count].tolist()
        self.stats.tokens += count
        if answer.error:
            self.decoder.state = _clear_row(self.decoder.state, row)
        if answer.finish_reason:
            self.decoder.ended[row] = True
            del self.running[row]
            said = answer.tokens, answer.logprobs, answer.finish_reason, answer.error
            yield Finished(answer.request.key, *said)

    def _make_room(self, needed: int) -> None:
        """A cache with at least `needed` slots a row."""
        if self.decoder.state is None:
            likely = (len(p.ids) + min(r.max_new_tokens, EXPECTED) for r, p in self.waiting)
            slots = cache_slots(max(needed, *likely))
            self.decoder.state = _empty(self.params, self.cfg, slots, self.decoder.options)
            held = self.decoder.state, self.decoder.ended, self.decoder.options
            self.compiled = compile_ahead(self.params, self.cfg, *held, STEPS, self.rows)
        self.decoder.make_room(needed)

    def _admit(self, free: list[int]) -> Iterator[Finished]:
        """Prefills the oldest waiting prompt, with others beside it, and puts them into free rows."""
        first, *others = [prompt for _, prompt in self.waiting]
        prefix = self.stores.best(first, others)
        sizes = self._fitting(prefix, 0 if prefix is None else prefix.length)
        packs = prefix is None and self._fits(first)
        if packs:
            chosen = list(pack(sizes, self.group, max_parts("batch")))
        else:
            chosen = [0, *sorted(list(sizes)[1:], key=lambda i: -sizes[i])][: self.group]
        new = [self.waiting[i] for i in chosen]
        self._make_room(max(len(prompt.ids) for _, prompt in new) + 1)
        self.waiting = [x for i, x in enumerate(self.waiting) if i not in chosen]
        yield from self._fill(new, free, prefix, packs)

    def _fits(self, prompt: EncodedPrompt) -> bool:
        """Whether the prompt is prefilled at once, not in chunks."""
        return self.chunk_of(bucket(len(prompt.ids))) is None

    def _fitting(self, prefix: Prefix | None, start: int) -> dict[int, int]:
        """{index: tokens behind the prefix} of waiting prompts that may go with the oldest, it first."""
        first = self.waiting[0][1]
        width, packs = bucket(len(first.ids) - start), prefix is None and self._fits(first)
        sizes = {i: len(prompt.ids) - start for i, (_, prompt) in enumerate(self.waiting)}
        return {
            i: size
            for i, size in sizes.items()
            if i == 0
            or (
                self.stores.lookup(self.waiting[i][1]) is prefix
                and (self._fits(self.waiting[i][1]) if packs else size <= width)
            )
        }

    def _fill(self, new: list, free: list[int], prefix: Prefix | None, packs: bool):
        """Prefills requests and their prompts `new`, a group at most; yields as `refill`."""
        start, slots = (0, 0) if prefix is None else (prefix.length, prefix.cache.slots)
        rests = [prompt.rest(start) for _, prompt in new]
        make = packed_group if packs else padded_group
        group = make(self.cfg, rests, self.group)
        batch, width = group.batch, group.batch.tokens.shape[1]
        ahead = [prompt for _, prompt in self.waiting]
        features = self.stores.features(rests, batch.tokens.size, ahead)
        if packs:
            where = group.source, group.length
            filled = prefill_packed(self.params, self.cfg, batch, *where, features=features)
        elif prefix is None:
            options: dict[str, Any] = {"features": features, "chunk": self.chunk_of(width)}
            filled = prefill(self.params, self.cfg, batch, width, **options)
        else:
            filled = _extend(self.params, self.cfg, batch, features, prefix.cache)
        tokens, logprobs = self._insert(new, free, filled, group.source, slots + width)
        if packs and len(new) > 1 and (tokens == NOT_FINITE).any():
            # One prompt may have reached the others, as 0 times NaN: each by itself.
            for one, row in zip(new, free):
                yield from self._fill([one], [row], None, True)
            return
        self.stats.prefilled += sum(len(prompt.ids) for prompt in rests)
        self.stats.reused += start * len(new)
        for i, ((request, prompt), row) in enumerate(zip(new, free)):
            self.running[row] = _Row(request, len(prompt.ids))
            self.decoder.ended[row] = False
            yield from self._take(row, tokens[i : i + 1], logprobs[i : i + 1])

    def _insert(self, new: list, free: list[int], filled, source: np.ndarray, width: int):
        """Puts prefilled prompts into free rows; their first tokens [A], and those's log-probabilities."""
        missing = self.group - len(new)
        rows = np.asarray([*free[: len(new)], *[self.rows] * missing], np.int32)
        asked = [request for request, _ in new + [new[0]] * missing]
        sampling = [request.sampling.rows(1) for request in asked]
        options = self.decoder.options.replace(
            sampling=jax.tree.map(lambda *x: np.concatenate(x), *sampling),
            seeds=np.concatenate([row_seeds(request.seed, 1) for request in asked]),
            limit=np.asarray([request.max_new_tokens for request in asked], np.int32),
        )
        ids = np.full((self.group, width), self.cfg.text.vocab_size, np.int32)
        for row, (_, prompt) in zip(ids, new):
            row[: len(prompt.ids)] = prompt.ids
        state, none = self.decoder.state, self.cfg.text.vocab_size
        made = _insert(state, *filled, ids, rows, source, options, none)
        self.decoder.state, tokens, logprobs = made
        kept = jax.tree.leaves(self.decoder.options.sampling)
        for old, x in zip(kept, jax.tree.leaves(options.sampling), strict=True):
            old[rows[: len(new)]] = x[: len(new)]
        return np.asarray(tokens), np.asarray(logprobs)
