"""Continuous batching: many prompts through the rows of one cache, a freed row refilled at once.

Every shape is static: prompts come in packed, several in a row of a bucket's width, and a dispatch of
decode steps is one program whatever its rows hold. Packed, prompts of mixed lengths waste little, and
the programs depend on the width alone, which is PACKED_TOKENS wherever enough prompts wait. Source: Orca
(OSDI 2022). Dims as in layers.py; A prompts of a group.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.inference import decode_loop
from qwen3vl_jax.inference.constraints import masks_of, start_rows
from qwen3vl_jax.inference.decode_loop import STEPS, DecodeState, first_token, on_mesh
from qwen3vl_jax.inference.requests import Finished, GenerationOptions, Request, RowOptions, Stats
from qwen3vl_jax.inference.row_answer import Decode, RowAnswer
from qwen3vl_jax.inference.sampling import NOT_FINITE, row_seeds
from qwen3vl_jax.inference.stores import Prefix, Stores
from qwen3vl_jax.model.cache import end_prompt, extend, fill_layers, grow_cache, init_cache, prefill
from qwen3vl_jax.model.sharding import max_parts
from qwen3vl_jax.model.structs import Batch, KVCache, Params, check_call
from qwen3vl_jax.model.transformer import compute_dtype
from qwen3vl_jax.processing.batch import bucket, group_batch, group_size
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, from_hf_arrays

LOOK_AHEAD = 2  # prompts held ready, for each row
# Tokens of a packed row, a bucket; a longer prompt has a row of its own width.
PACKED_TOKENS = 4224
# Answer tokens that the first cache has room for: it grows for longer ones.
EXPECTED = 256
# The row of a prompt, and its first token's index in it.
Place = tuple[int, int]


class Running(NamedTuple):
    """What a row answers: the request, the tokens of its prompt, and its answer so far."""

    request: Request
    prompt_tokens: int
    answer: RowAnswer


def generate_many(
    params: Params,
    cfg: Config,
    requests: Iterable[Request | None],
    *,
    stop_ids: tuple[int, ...],
    decode: Decode | None = None,
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


def group_prompts(
    cfg: Config, prompts: Sequence[EncodedPrompt], places: Sequence[Place], rows: int, count: int
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Prompts at their places in rows of a bucket's width, a segment each: (batch, source, length).

    source [A 2] int32: each prompt's place; length [A] int32: its tokens. A is `count`; those past the
    last prompt are the first token of row 0.
    """
    sizes = [len(prompt.ids) for prompt in prompts]
    given: Any = group_batch(cfg, prompts, max(sizes))
    width = bucket(max(start + size for (_, start), size in zip(places, sizes)))
    tokens, segments = np.zeros((2, rows, width), np.int32)
    positions, delta = np.zeros((3, rows, width), np.int32), np.zeros(count, np.int32)
    features = None if given.vision_rows is None else np.full((rows, width), -1, np.int32)
    source, length = np.zeros((count, 2), np.int32), np.ones(count, np.int32)
    for i, ((row, start), n) in enumerate(zip(places, sizes)):
        at = row, slice(start, start + n)
        tokens[at], segments[at] = given.tokens[i, :n], segments[row].max() + 1
        positions[:, *at], delta[i] = given.positions[:, i, :n], given.delta[i]
        if features is not None:
            features[at] = cast(Any, given.vision_rows)[i, :n]
        source[i], length[i] = (row, start), n
    arrays: Any = tokens, positions, segments, features, delta
    return Batch(*arrays), source, length


def prefill_packed(
    params: Params, cfg: Config, batch: Batch, source: Any, length: Any, features=None
) -> tuple[KVCache, jax.Array]:
    """`prefill` of a batch of `group_prompts` [R T], whose delta is [A]. Not traced.

    source [A 2], length [A] int32: each prompt's row, index of its first token, and tokens. Keys and values
    are those of the rows [R T K H]; the rest of the cache, and the logits, are [A ..].
    """
    rest, slots = {**params, "layers": None, "vision": None}, batch.tokens.shape[1]
    given = params["layers"], rest, cfg, batch, features, slots, len(source)
    x, _, delta, k, v = fill_layers(*given)
    return KVCache(k, v, length, delta), end_prompt(rest, cfg, x, length, source)


@functools.partial(jax.jit, static_argnames=("cfg", "slots"), keep_unused=True)
def _empty(params, cfg, slots, options) -> DecodeState:
    """A state whose rows have all ended, on the devices of params."""
    rows, vocab = len(options.seeds), cfg.text.vocab_size
    cache = init_cache(cfg, rows, slots, compute_dtype(params))
    state = first_token(cache, jnp.zeros((rows, vocab)), jnp.full((rows, 1), vocab), options)
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
    cache = decode_loop.insert_rows(state.cache, rows, filled, source)
    pair = (state.replace(cache=None), first.replace(cache=None))
    state = jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), *pair)
    return on_mesh(state.replace(cache=cache)), first.token, first.logprob


@functools.partial(jax.jit, donate_argnames="state")
def _clear_row(state, row) -> DecodeState:
    """The state with zeros in a row's cache: NaN there would reach the next answer, as 0 times NaN."""
    k, v = ([x.at[row].set(0) for x in part] for part in (state.cache.k, state.cache.v))
    return on_mesh(state.replace(cache=state.cache.replace(k=k, v=v)))


class _Engine(decode_loop.Decoder):
    """The host's side: which prompts wait, which row answers what, and what is kept for later prompts."""

    def __init__(self, params, cfg, options: RowOptions, decode, chunk_of, stats: Stats):
        # Of its own, for the sampling of a row changes with its request.
        options = options.replace(sampling=jax.tree.map(np.array, options.sampling))
        super().__init__(params, cfg, None, options)
        self.decode, self.chunk_of, self.stats = decode, chunk_of, stats
        self.rows = stats.rows = len(options.seeds)
        self.group, self.stop_ids = group_size(self.rows), options.stop_ids.tolist()
        self.waiting: list[tuple[Request, EncodedPrompt]] = []
        self.running: dict[int, Running] = {}
        self.waited = False
        self.stores = Stores(params, cfg, chunk_of, stats)

    def add(self, request: Request) -> None:
        if request.stop_strings and self.decode is None:
            raise InputError("stop_strings need decode=, the function from tokens to text")
        given = request.arrays
        prompt = given if isinstance(given, EncodedPrompt) else from_hf_arrays(self.cfg, given)
        self.waiting.append((dataclasses.replace(request, arrays={}), prompt.with_digests()))
        self.stats.shown += len(prompt.images)

    def refill(self, more: bool) -> Iterator[Finished]:
        """Fills free rows, a whole group at a time; yields answers that end there."""
        for request, _ in [x for x in self.waiting if x[0].watch and x[0].watch([], [])]:
            self.waiting = [x for x in self.waiting if x[0] is not request]
            yield Finished(request.key, [], [], "cancelled")
        while self.waiting:
            free = [row for row in range(self.rows) if row not in self.running]
            group = min(self.group, len(self.waiting))
            if len(free) < group:
                return
            # Others may come during one dispatch, and fill the group.
            if more and group < self.group and self.running and not self.waited:
                self.waited = True
                return
            self.waited = False
            yield from self._admit(free)

    def step(self) -> Iterator[Finished]:
        """One dispatch of decode steps; yields the answers that ended."""
        filled = max(x.prompt_tokens + len(x.answer.tokens) for x in self.running.values())
        self.make_room(filled + STEPS)
        free = self.rows - len(self.running)
        enough = max(self.group, free + 1) if self.waiting else self.rows
        self.compiled()
        tokens, logprobs = self.run(STEPS, enough)
        self.stats.steps += int((tokens >= 0).any(0).sum())
        self.stats.row_steps += int((tokens >= 0).sum())
        for row in list(self.running):
            yield from self._take(row, tokens[row], logprobs[row])

    def _take(self, row: int, tokens: np.ndarray, logprobs: np.ndarray) -> Iterator[Finished]:
        """Adds new tokens to a row's answer; yields it if it has ended."""
        request, _, answer = self.running[row]
        count = answer.add(tokens, self.stop_ids, self.decode)
        answer.logprobs += (new := logprobs[:count].tolist())
        self.stats.tokens += count
        watched = request.watch and request.watch(answer.tokens[-count:] if count else [], new)
        if watched and not answer.finish_reason:
            answer.finish_reason = "cancelled"
        if answer.error:
            self.state = _clear_row(self.state, row)
        if answer.finish_reason:
            self.ended[row], self.constraints[row] = True, None
            del self.running[row]
            said = answer.tokens, answer.logprobs, answer.finish_reason, answer.error
            yield Finished(request.key, *said)

    def make_room(self, needed: int) -> None:
        if self.state is None:
            likely = (len(p.ids) + min(r.max_new_tokens, EXPECTED) for r, p in self.waiting)
            slots = decode_loop.cache_slots(max(needed, *likely))
            self.state = _empty(self.params, self.cfg, slots, self.options)
            given = self.params, self.cfg, self.state, self.ended, self.options
            self.compiled = decode_loop.compile_ahead(*given, STEPS, self.rows)
        super().make_room(needed)

    def _admit(self, free: list[int]) -> Iterator[Finished]:
        """Prefills the oldest waiting prompt, with others beside it, and puts them into free rows."""
        first, *others = [prompt for _, prompt in self.waiting]
        prefix = self.stores.best(first, others)
        start = 0 if prefix is None else prefix.length
        packs = prefix is None and self.stores.fits(first)
        sizes = {i: len(prompt.ids) - start for i, prompt in enumerate([first, *others])}
        width = bucket(sizes[0])

        def goes_along(i: int, prompt: EncodedPrompt) -> bool:
            fits = self.stores.fits(prompt) if packs else sizes[i] <= width
            return fits and self.stores.lookup(prompt) is prefix

        along = [i for i, prompt in enumerate(others, 1) if goes_along(i, prompt)]
        # Packed: the oldest, several in a row. Else: a row for each, those that fill it first.
        along = along if packs else sorted(along, key=lambda i: -sizes[i])
        capacity = max(PACKED_TOKENS, sizes[0]) if packs else width
        filled, places = [0] * (max_parts("batch") if packs else self.group), {}
        for i in (0, *along):
            row = filled.index(min(filled))
            if len(places) < self.group and filled[row] + sizes[i] <= capacity:
                places[i] = row, filled[row]
                filled[row] += sizes[i]
        new = [self.waiting[i] for i in places]
        self.make_room(max(len(prompt.ids) for _, prompt in new) + 1)
        self.waiting = [x for i, x in enumerate(self.waiting) if i not in places]
        yield from self._fill(new, [*places.values()], free, prefix, packs)

    def _fill(self, new: list, places: list, free: list[int], prefix: Prefix | None, packs: bool):
        """Prefills requests and their prompts `new`, a group at most; yields as `refill`."""
        start, slots = (0, 0) if prefix is None else (prefix.length, prefix.cache.slots)
        prompts = [prompt.rest(start) for _, prompt in new]
        # Not packed, each has a row of its own; those that are missing a token.
        if not packs:
            missing = range(len(new), self.group)
            prompts += [prompts[0].rest(len(prompts[0].ids) - 1)] * len(missing)
            places = [*places, *((row, 0) for row in missing)]
        rows = max_parts("batch") if packs else self.group
        batch, *where = group_prompts(self.cfg, prompts, places, rows, self.group)
        width, ahead = batch.tokens.shape[1], [prompt for _, prompt in self.waiting]
        features = self.stores.features(prompts, batch.tokens.size, ahead)
        if packs:
            filled = prefill_packed(self.params, self.cfg, batch, *where, features=features)
        elif prefix is None:
            how = {"features": features, "chunk": self.chunk_of(width)}
            filled = prefill(self.params, self.cfg, batch, width, **how)
        else:
            filled = _extend(self.params, self.cfg, batch, features, prefix.cache)
        tokens, logprobs = self._insert(new, free, filled, where[0], slots + width)
        if packs and len(new) > 1 and (tokens == NOT_FINITE).any():
            # One prompt may have reached the others, as 0 times NaN: each by itself.
            for one, row in zip(new, free):
                yield from self._fill([one], [(0, 0)], [row], None, True)
            return
        self.stats.prefilled += sum(len(prompt.ids) - start for _, prompt in new)
        self.stats.reused += start * len(new)
        self.take(tokens := np.array(tokens)[:, None], free)
        for i, ((request, prompt), row) in enumerate(zip(new, free)):
            ends = request.stop_strings, request.max_repeats
            answer = RowAnswer(request.max_new_tokens, *ends)
            self.running[row] = Running(request, len(prompt.ids), answer)
            self.ended[row] = False
            yield from self._take(row, tokens[i], logprobs[i : i + 1])

    def _insert(self, new: list, free: list[int], filled, source: np.ndarray, width: int):
        """Puts prefilled prompts into free rows; their first tokens [A], and those's log-probabilities."""
        none, missing = self.cfg.text.vocab_size, self.group - len(new)
        rows = np.asarray([*free[: len(new)], *[self.rows] * missing], np.int32)
        asked = [request for request, _ in new + [new[0]] * missing]
        sampling = [request.sampling.rows(1) for request in asked]
        starts = start_rows([x.constraint for x, _ in new], [y.ids for _, y in new], self.stop_ids)
        for row, constraint in zip(free, starts):
            self.constraints[row] = constraint
        options = self.options.replace(
            masks=masks_of([*starts, *[None] * missing], none),
            sampling=jax.tree.map(lambda *x: np.concatenate(x), *sampling),
            seeds=np.concatenate([row_seeds(request.seed, 1) for request in asked]),
            limit=np.asarray([request.max_new_tokens for request in asked], np.int32),
        )
        ids = np.full((self.group, width), none, np.int32)
        for row, (_, prompt) in zip(ids, new):
            row[: len(prompt.ids)] = prompt.ids
        given = self.state, *filled, ids, rows, source, options, none
        self.state, tokens, logprobs = _insert(*given)
        kept = jax.tree.leaves(self.options.sampling)
        for old, x in zip(kept, jax.tree.leaves(options.sampling), strict=True):
            old[rows[: len(new)]] = x[: len(new)]
        return np.asarray(tokens), np.asarray(logprobs)
