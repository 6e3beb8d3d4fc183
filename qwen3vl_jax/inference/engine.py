"""Continuous batching: many prompts through the rows of one cache, a freed row refilled at once.

Every shape is static: prompts come in as groups padded to a bucket, and a dispatch of decode steps is
one program whatever its rows hold. Source: Orca (OSDI 2022). Dims as in layers.py; A rows of a group.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator

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
from qwen3vl_jax.inference.requests import (
    STEPS,
    Finished,
    GenerationOptions,
    Request,
    RowOptions,
    Stats,
)
from qwen3vl_jax.inference.sampling import row_seeds
from qwen3vl_jax.inference.stores import Prefix, Stores
from qwen3vl_jax.model.cache import extend, grow_cache, init_cache, prefill
from qwen3vl_jax.model.structs import Params, check_call
from qwen3vl_jax.model.transformer import compute_dtype
from qwen3vl_jax.processing.batch import bucket, group_batch, group_size
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
    the longest of the rows decides for all). stop_strings need `decode` (tokens -> text). A picture that
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


@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def _empty(params, cfg, slots, options) -> DecodeState:
    """A state whose rows have all ended."""
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
def _insert(state, cache, logits, tokens, segment_ids, rows, before, options, vocabulary):
    """Puts a filled group into its rows of the state; gives also its first tokens, and their logprobs.

    rows [A] int32: the row of each prompt, past the last for padding. before [A T] int32: the tokens of
    the prefix, past the vocabulary at padding.
    """
    tokens = jnp.where(segment_ids > 0, tokens, vocabulary)
    first = first_token(cache, logits, jnp.concatenate([before, tokens], axis=1), options)
    cache = insert_rows(state.cache, rows, first.cache)

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
        """Prefills the oldest waiting prompt with others of its bucket."""
        first, *others = [prompt for _, prompt in self.waiting]
        prefix = self.stores.best(first, others)
        start = 0 if prefix is None else prefix.length
        width = bucket(len(first.ids) - start)
        admitted = self._fitting(prefix, start, width)[: self.group]
        new = [self.waiting[i] for i in admitted]
        self._make_room(max(len(prompt.ids) for _, prompt in new) + 1)
        self.waiting = [x for i, x in enumerate(self.waiting) if i not in admitted]
        # A group that is not full has copies of its first prompt's last token in no row.
        missing = self.group - len(new)
        rests = [prompt.rest(start) for _, prompt in new]
        rests += [rests[0].rest(len(rests[0].ids) - 1)] * missing
        rows = free[: len(new)] + [self.rows] * missing
        asked = [request for request, _ in new + [new[0]] * missing]
        sampling = [request.sampling.rows(1) for request in asked]
        options = self.decoder.options.replace(
            sampling=jax.tree.map(lambda *x: np.concatenate(x), *sampling),
            seeds=np.concatenate([row_seeds(request.seed, 1) for request in asked]),
            limit=np.asarray([request.max_new_tokens for request in asked], np.int32),
        )
        # The tokens of the prefix for each prompt, past the vocabulary at padding.
        slots = 0 if prefix is None else prefix.cache.slots
        before = np.full((self.group, slots), self.cfg.text.vocab_size, np.int32)
        if prefix is not None:
            before[:, :start] = prefix.prompt.ids
        batch = group_batch(self.cfg, rests, width)
        features = self.stores.features(rests, len(rests) * width)
        if prefix is None:
            chunk = self.chunk_of(width)
            filled = prefill(self.params, self.cfg, batch, width, features=features, chunk=chunk)
        else:
            filled = _extend(self.params, self.cfg, batch, features, prefix.cache)
        self.decoder.state, tokens, logprobs = _insert(
            self.decoder.state, *filled, batch.tokens, batch.segment_ids, np.asarray(rows, np.int32),
            before, options, self.cfg.text.vocab_size,
        )  # fmt: skip
        tokens, logprobs = np.asarray(tokens)[:, None], np.asarray(logprobs)[:, None]
        self.stats.prefilled += sum(len(prompt.ids) - start for _, prompt in new)
        self.stats.reused += start * len(new)
        all_rows = jax.tree.leaves(self.decoder.options.sampling)
        for i, (request, prompt) in enumerate(new):
            self.running[rows[i]] = _Row(request, len(prompt.ids))
            self.decoder.ended[rows[i]] = False
            for old, x in zip(all_rows, jax.tree.leaves(options.sampling), strict=True):
                old[rows[i]] = x[i]
            yield from self._take(rows[i], tokens[i], logprobs[i])

    def _fitting(self, prefix: Prefix | None, start: int, width: int) -> list[int]:
        """Waiting prompts with this prefix that fit: the oldest, then the longest."""
        sizes = {
            i: len(prompt.ids)
            for i, (_, prompt) in enumerate(self.waiting)
            if i and self.stores.lookup(prompt) is prefix and len(prompt.ids) - start <= width
        }
        return [0, *sorted(sizes, key=lambda i: -sizes[i])]
