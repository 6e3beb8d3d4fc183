"""The key/value cache and what fills it: prefill, extend, decode_step. Dims as in layers.py.

All functions can be traced; callers jit them (cfg static) and donate the cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model import transformer
from qwen3vl_jax.model.attention import append_and_attend, attend, causal_ranges, head_copies
from qwen3vl_jax.model.layers import repeat_one
from qwen3vl_jax.model.rope import mrope
from qwen3vl_jax.model.sharding import jit_wide, mesh_axes_for, on_shards, platform, shard, spec
from qwen3vl_jax.model.structs import Batch, Features, KVCache, Params, check_call
from qwen3vl_jax.model.text import AttendFn, Block, shard_residual, split_heads
from qwen3vl_jax.model.vision import vision_encode

# Logical axes of a layer's keys or values [B S K H]; a TPU copies other orders around a decode loop.
KV_AXES = ("batch", None, "kv_heads", None)
WHOLE = 512


def init_cache(cfg: Config, batch: int, slots: int, dtype) -> KVCache:
    """An empty cache for `batch` sequences of at least `slots` tokens, in whole blocks of attention.

    On a CPU it is float32: XLA:CPU (jax 0.10) converts a whole bf16 cache at every write. Where the
    mesh shards heads into more parts than K, each key/value head is stored several times.
    """
    c = cfg.text
    dtype = jnp.float32 if platform() == "cpu" else dtype
    heads = c.num_key_value_heads * head_copies(c.num_attention_heads, c.num_key_value_heads)
    shape = (batch, _round_to_blocks(slots), heads, c.head_dim)
    k, v = ([jnp.zeros(shape, dtype) for _ in range(c.num_hidden_layers)] for _ in range(2))
    return pinned(KVCache(k, v, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)))


def pinned(cache: KVCache) -> KVCache:
    """The cache in its one sharding. Every function returns it so, and none is compiled twice."""
    k, v = ([shard(x, *KV_AXES) for x in part] for part in (cache.k, cache.v))
    return cache.replace(k=k, v=v, length=shard(cache.length, None), delta=shard(cache.delta, None))


def _round_to_blocks(slots: int) -> int:
    """Slots of a long cache in the largest blocks of any kernel, so that none copies it to pad it."""
    return slots if slots <= WHOLE else -(-slots // WHOLE) * WHOLE


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The cache with room for at least `slots` tokens per sequence; raises InputError for fewer."""
    if slots < cache.slots:
        raise InputError(f"grow_cache: slots is {slots}, the cache has {cache.slots} already")
    pad = ((0, 0), (0, _round_to_blocks(slots) - cache.slots), (0, 0), (0, 0))
    k, v = ([jnp.pad(x, pad) for x in part] for part in (cache.k, cache.v))
    return pinned(cache.replace(k=k, v=v))


def _write(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """Writes new [B T K H] into old [B S K H] at slot [B T]; a slot past the end is dropped."""

    def put(old, new, slot):
        return old.at[jnp.arange(len(old))[:, None], slot].set(new.astype(old.dtype), mode="drop")

    where = mesh_axes_for(("batch", old.shape[0]), ("kv_heads", old.shape[2]))
    kv = spec(KV_AXES, where)
    return on_shards(put, (kv, kv, spec(("batch", None), where)), kv, old, new, slot)


def prefill(
    params: Params,
    cfg: Config,
    batch: Batch,
    max_len: int,
    *,
    features: Features | None = None,
    chunk: int | None = None,
    intervene: Callable | None = None,
) -> tuple[KVCache, jax.Array]:
    """Runs the prompts into a new cache: (cache, next-token logits [B V] float32).

    The cache has room for max_len tokens per sequence, prompt and answer, and at least for the
    prompts. Prompts may be padded left or right; each is one segment. Layers are per-layer lists.
    chunk (static): at most that many tokens of each sequence at a time, so that activations do not grow
    with the prompt; the vision tower runs first and at once. Not traced, one program serves all layers.
    intervene: as in `decode_layers`. Raises InputError for it with chunk.
    """
    check_call(params, cfg, batch=batch)
    transformer.lm_head(params, cfg)
    slots = max(max_len, batch.tokens.shape[1])
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    batch = batch.replace(vision=None, labels=None)
    layers, rest = _per_layer(params)["layers"], {**params, "layers": None, "vision": None}
    if chunk is not None:
        if intervene:
            raise InputError("intervene: got one with chunk, expected one of them; leave chunk out")
        return _prefill_in_chunks(params, cfg, batch, features, slots, chunk)
    slots = _round_to_blocks(slots)
    x, length, delta, k, v = fill_layers(layers, rest, cfg, batch, features, slots, 0, intervene)
    return KVCache(k, v, length, delta), end_prompt(rest, cfg, x, length)


def fill_layers(layers, rest, cfg, batch, features, slots, segments, intervene=None):
    """The residual after all layers, length and delta, and the keys and values of each layer.

    segments: upper bound of the prompts in a row, 0 for one that starts at the first token.
    """
    x, rotary, lo, hi, deepstack, length, delta = _embed_prompt(rest, cfg, batch, features)
    written = []
    for i, layer in enumerate(layers):
        x, *kv = _fill_layer(cfg, layer, x, rotary, lo, hi, slots, segments)
        x = shard_residual(x + deepstack[i]) if i < len(deepstack) else x
        x = intervene(i, x) if intervene else x
        written.append(kv)
    return x, length, delta, [k for k, _ in written], [v for _, v in written]


@functools.partial(jax.jit, static_argnames=("cfg", "slots", "chunk"))
def _prefill_in_chunks(params, cfg, batch, features, slots, chunk):
    cache = init_cache(cfg, len(batch.tokens), slots, transformer.compute_dtype(params))
    return extend(params, cfg, cache, batch, features=features, chunk=chunk)


@functools.partial(jax.jit, static_argnames="cfg")
def _embed_prompt(params, cfg, batch, features):
    """Residual, angles, ranges and DeepStack of left-aligned prompts; their length and delta."""
    batch = _left_align(batch)
    x, deepstack = transformer.embed_tokens(params, cfg, batch, features)
    rotary = mrope(cfg.text, batch.positions, x.dtype)
    length = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
    deepstack, kept = [] if deepstack is None else [*deepstack], (length, batch.delta)
    ranges = causal_ranges(batch.segment_ids)
    return x, rotary, *ranges, deepstack, *(shard(each, None) for each in kept)


@functools.partial(jit_wide, static_argnames=("cfg", "slots", "segments"))
def _fill_layer(cfg, layer, x, rotary, lo, hi, slots, segments):
    """One layer of a prefill, and its part of the cache: one program for all layers, if not traced."""
    c = cfg.text
    copies = head_copies(c.num_attention_heads, c.num_key_value_heads)

    def keep(y):
        """[B T K H] -> [B S K H], zeros where no token is."""
        y = jnp.where((hi > lo)[..., None, None], y, 0)
        y = jnp.repeat(y, copies, axis=2) if copies > 1 else y
        y = jnp.pad(y, ((0, 0), (0, slots - y.shape[1]), (0, 0), (0, 0)))
        return shard(y.astype(jnp.float32) if platform() == "cpu" else y, *KV_AXES)

    def attend_fn(*heads):
        q, k, v = split_heads(*heads)
        layout = "causal" if segments else "prompt"
        out = attend(q, k, v, lo, hi, layout=layout, segments=segments)
        return out, (keep(k), keep(v))

    out: Any = Block(c).apply({"params": layer}, x, rotary, attend_fn)
    return shard_residual(out[0]), *out[1]


@functools.partial(jax.jit, static_argnames="cfg")
def end_prompt(params, cfg, x, length, source=None):
    """Next-token logits [A V] of prompts of `length` in x [R T D], by default one from a row's start."""
    row, start = (jnp.arange(len(x)), 0) if source is None else source.T
    return _next_token_logits(params, cfg, x[row, jnp.maximum(start + length - 1, 0)])


def _left_align(batch: Batch) -> Batch:
    """The batch with each sequence's tokens first and its padding last."""
    width = batch.tokens.shape[1]
    first = jnp.argmax(batch.segment_ids > 0, axis=1)[:, None]
    index = (jnp.arange(width) + first) % width

    def align(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    positions = jax.vmap(align)(batch.positions)
    names = ("tokens", "segment_ids", "vision_rows", "embeds")
    fields = {name: jax.tree.map(align, getattr(batch, name)) for name in names}
    return batch.replace(positions=positions, **fields)


def extend(
    params: Params,
    cfg: Config,
    cache: KVCache,
    batch: Batch,
    *,
    features: Features | None = None,
    chunk: int | None = None,
) -> tuple[KVCache, jax.Array]:
    """Appends tokens or an image to each sequence of a filled cache: (cache, next-token logits [B V]).

    The batch is made as for prefill, with positions from 0; they are shifted past the cache here.
    Call `grow_cache` first: tokens past the last slot are dropped. chunk: as in prefill.
    """
    check_call(params, cfg, cache=cache, batch=batch)
    lo, _ = causal_ranges(batch.segment_ids)
    valid = batch.segment_ids > 0
    place = cache.length[:, None] + jnp.arange(batch.tokens.shape[1]) - lo
    slot = jnp.where(valid, place, cache.slots)
    start = cache.length + cache.delta
    batch = batch.replace(positions=batch.positions + start[:, None])
    if chunk is not None:
        return _fill_in_chunks(params, cfg, cache, batch, features, slot, chunk)
    attend_fn = cached_attention(cache.k, cache.v, slot, jnp.where(valid, place + 1, 0))
    x, written = transformer.run_decoder(_per_layer(params), cfg, batch, features, attend_fn)
    x = transformer.at_last_attended(x, batch.segment_ids)
    return _advance(params, cfg, cache, written, jnp.sum(valid, axis=1), batch.delta, x)


def decode_step(
    params: Params, cfg: Config, cache: KVCache, tokens: jax.Array, intervene: Any = None
) -> tuple[KVCache, jax.Array]:
    """Appends one token per sequence, tokens [B] int32: (cache, next-token logits [B V] float32).

    Layers are per-layer lists. Call `grow_cache` first: a token past the last slot is dropped.
    intervene: as in `decode_layers`; x may be one row several times.
    """
    check_call(params, cfg, cache=cache)
    slot = cache.length[:, None]
    positions = jnp.broadcast_to((cache.length + cache.delta)[:, None], (3, *slot.shape))
    dtype = transformer.compute_dtype(params)
    x = repeat_one(transformer.embed_lookup(params, tokens[:, None], dtype))
    rotary, written = mrope(cfg.text, positions, dtype), []
    for i, layer in enumerate(_per_layer(params)["layers"]):
        x, *kv = _step_layer(cfg, layer, x, rotary, cache.k[i], cache.v[i], slot)
        x = intervene(i, x) if intervene else x
        written.append(kv)
    return _advance(params, cfg, cache, written, 1, 0, x[: len(slot), 0])


@functools.partial(jax.jit, static_argnames="cfg", inline=True)
def _step_layer(cfg, layer, x, rotary, k, v, slot):
    """One layer of a decode step, and its part of the cache: traced once for all layers."""

    def attend_fn(qkv, *rest):
        # The rows of `repeat_one` are one.
        heads = qkv[: len(slot)], *rest
        found = append_and_attend(k, v, slot, *heads)
        out, kept = found or cached_attention([k], [v], slot, slot + 1)(0, *split_heads(*heads))
        return jnp.repeat(out, len(x) // len(slot), axis=0), kept

    out: Any = Block(cfg.text).apply({"params": layer}, x, rotary, attend_fn)
    return out[0], *out[1]


def cached_attention(keys, values, slot, hi) -> AttendFn:
    """Attention to layers' caches [B S K H]: token t is written at slot [B T], and sees those below hi.

    hi is slot + 1, or 0 at padding. Written first: the other order copies the cache at every step.
    """

    def attend_fn(i, q, k, v):
        copies = keys[i].shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
        written = _write(keys[i], k, slot), _write(values[i], v, slot)
        return attend(q, *written, None, hi), written

    return attend_fn


def _per_layer(params: Params) -> Params:
    if not isinstance(params["layers"], (list, tuple)):
        raise InputError("a cache is filled by per-layer parameters: call unstack_layers first")
    return params


def _fill_in_chunks(params, cfg, cache, batch, features, slot, chunk):
    """`extend` as a scan over chunks [B chunk] of the sequences; each attends to the cache so far."""
    if chunk < 1:
        raise InputError(f"chunk is {chunk}, expected tokens from 1")
    params = _per_layer(params)
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    rows, width = batch.tokens.shape
    last, longest = transformer.last_attended(batch.segment_ids), jnp.max(batch.positions)
    # Chunks of one length, in whole tiles of 128, so that the last is not mostly padding.
    count = -(-width // chunk)
    chunk = min(chunk, -(-width // (count * 128)) * 128)

    def split(x, fill):
        """[B T ..] -> [count B chunk ..]."""
        pad = [(0, 0), (0, count * chunk - width), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pad, constant_values=fill)
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    fills = {"tokens": 0, "segment_ids": 0, "vision_rows": -1, "embeds": 0}
    given = {name: getattr(batch, name) for name in fills}
    pieces = {name: split(x, fills[name]) for name, x in given.items() if x is not None}
    pieces["positions"] = jnp.stack([split(axis, 0) for axis in batch.positions], axis=1)
    xs = pieces, split(slot, cache.slots), chunk * jnp.arange(count)

    def body(carry, xs):
        written, last_x = carry
        k, v = map(list, zip(*written))
        fields, slot, start = xs
        piece = batch.replace(**fields, vision=None, labels=None)
        attend_fn = cached_attention(k, v, slot, jnp.where(piece.segment_ids > 0, slot + 1, 0))
        args = params, cfg, piece, features, attend_fn
        x, written = transformer.run_decoder(*args, longest=longest)
        index = last - start
        here = jnp.take_along_axis(x, jnp.clip(index, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        inside = ((index >= 0) & (index < chunk))[:, None]
        return (written, jnp.where(inside, here, last_x)), None

    x = jnp.zeros((rows, cfg.text.hidden_size), transformer.compute_dtype(params))
    (written, x), _ = jax.lax.scan(body, (list(zip(cache.k, cache.v)), x), xs)
    count = jnp.sum(batch.segment_ids > 0, axis=1)
    return _advance(params, cfg, cache, written, count, batch.delta, x)


def _advance(params, cfg, cache, written, count, delta, x):
    """The cache of `written` (k, v), `count` tokens longer; logits of the last tokens x [B D]."""
    k, v = map(list, zip(*written, strict=True))
    cache = cache.replace(k=k, v=v, length=cache.length + count, delta=cache.delta + delta)
    return pinned(cache), _next_token_logits(params, cfg, x)


def _next_token_logits(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Logits [B V] of x [B D], gathered for sampling."""
    # In the lm_head's sharding, since moving the head is too expensive; then one axis at a time.
    logits = transformer.lm_logits(params, cfg, shard(repeat_one(x), "decode_batch", None))
    logits = shard(logits[: len(x)], "decode_batch", "vocab")
    return shard(shard(logits, "batch", "vocab"), "batch", None)
