"""The key/value cache and what fills it: prefill, extend, decode_step. Dims as in layers.py.

All can be traced; the caller jits them (cfg static) and donates the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.attention import (
    BLOCK,
    attend,
    causal_ranges,
    head_copies,
)
from qwen3vl_jax.model.sharding import (
    mesh_axes_for,
    on_shards,
    platform,
    shard,
)
from qwen3vl_jax.model.structs import (
    Batch,
    Features,
    KVCache,
    Params,
    check_call,
)
from qwen3vl_jax.model.text import decode_layers
from qwen3vl_jax.model.transformer import (
    compute_dtype,
    embed_lookup,
    last_attended,
    lm_logits,
    run_decoder,
)
from qwen3vl_jax.model.vision import vision_encode

_HELD = ("rows", "kv_heads", None, None)


def init_cache(cfg: Config, rows: int, slots: int, dtype) -> KVCache:
    """An empty cache for `rows` rows of at least `slots` tokens, in whole blocks of attention.

    On a CPU it is fp32, because XLA:CPU (jax 0.10) converts a whole bf16 cache at every write. A mesh
    that cuts heads into more parts than K has each head as often as that takes.
    """
    c = cfg.text
    dtype = jnp.float32 if platform() == "cpu" else dtype
    heads = c.num_key_value_heads
    heads *= head_copies(c.num_attention_heads, heads)
    shape = (rows, heads, _whole_blocks(slots), c.head_dim)
    k, v = ([jnp.zeros(shape, dtype) for _ in range(c.num_hidden_layers)] for _ in range(2))
    return pinned(KVCache(k, v, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32)))


def pinned(cache: KVCache) -> KVCache:
    """The cache as every function leaves it on the ambient mesh, so that none is compiled twice."""
    k, v = ([shard(x, *_HELD) for x in part] for part in (cache.k, cache.v))
    return cache.replace(k=k, v=v, length=shard(cache.length, None), delta=shard(cache.delta, None))


def _whole_blocks(slots: int) -> int:
    """Attention pads keys to whole blocks; a cache that has them is never copied for it."""
    return slots if slots <= BLOCK else -(-slots // BLOCK) * BLOCK


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same cache with room for at least `slots` tokens a row; raises InputError for fewer."""
    if slots < cache.slots:
        raise InputError(f"grow_cache: slots is {slots}, the cache has {cache.slots} already")
    pad = ((0, 0), (0, 0), (0, _whole_blocks(slots) - cache.slots), (0, 0))
    k, v = ([jnp.pad(x, pad) for x in part] for part in (cache.k, cache.v))
    return pinned(cache.replace(k=k, v=v))


def insert_rows(cache: KVCache, rows: jax.Array, new: KVCache) -> KVCache:
    """Puts row i of `new` in the place of row rows[i] (int32); one past the last row is dropped.

    Slots of `new` that the cache has not are cut: no filled one may be among them.
    """
    n = min(cache.slots, new.slots)

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        return old.at[rows, :, :n].set(x[:, :, :n].astype(old.dtype), mode="drop")

    k, v = (
        [put(old, x) for old, x in zip(*part, strict=True)]
        for part in ((cache.k, new.k), (cache.v, new.v))
    )
    length = cache.length.at[rows].set(new.length, mode="drop")
    delta = cache.delta.at[rows].set(new.delta, mode="drop")
    return pinned(cache.replace(k=k, v=v, length=length, delta=delta))


def _write(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """new [B T K H] into old [B K S H] at slot [B T]; a slot past the end is dropped."""
    more = old.shape[1] // new.shape[2]
    new = jnp.repeat(new, more, axis=2) if more > 1 else new

    def put(old, new, slot):
        rows = jnp.arange(old.shape[0])[:, None]
        return old.at[rows, :, slot].set(new.astype(old.dtype), mode="drop")

    where = mesh_axes_for(("rows", old.shape[0]), ("kv_heads", old.shape[1]))
    in_axes = (_HELD, ("rows", None, "kv_heads", None), ("rows", None))
    return on_shards(put, where, in_axes, _HELD, old, new, slot)


def prefill(
    params: Params,
    cfg: Config,
    batch: Batch,
    max_len: int,
    *,
    features: Features | None = None,
    chunk: int | None = None,
) -> tuple[KVCache, jax.Array]:
    """Runs the prompts into a new cache; returns it and each row's next logits [B V] in fp32.

    The cache has room for max_len tokens a row, prompt and answer, and never less than the batch is
    wide. Rows may be padded left or right; each is one segment. Layers are per-layer lists. chunk
    (static): at most as many tokens of each row at a time, so that activations do not grow with the prompt;
    the vision tower still runs first and whole.
    """
    check_call(params, cfg, batch=batch)
    rows, width = batch.tokens.shape
    cache = init_cache(cfg, rows, max(max_len, width), compute_dtype(params))
    batch = _from_the_left(batch)
    lo, hi = causal_ranges(batch.segment_ids)
    slot = jnp.where(batch.segment_ids > 0, jnp.arange(width), cache.slots)
    if chunk is not None:
        return _fill_in_chunks(params, cfg, cache, batch, features, slot, chunk)

    def mix(i, q, k, v):
        new = (_write(cache.k[i], k, slot), _write(cache.v[i], v, slot))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return attend(q, k, v, lo, hi, layout="prompt"), new

    return _fill(params, cfg, cache, batch, features, mix)


def _from_the_left(batch: Batch) -> Batch:
    """The batch with each row's tokens moved to the row's start, its padding behind them."""
    width = batch.tokens.shape[1]
    first = jnp.argmax(batch.segment_ids > 0, axis=1)[:, None]
    index = (jnp.arange(width) + first) % width

    def moved(x: jax.Array) -> jax.Array:
        at = index.reshape(*index.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, at, axis=1)

    named = {
        name: getattr(batch, name) for name in ("tokens", "segment_ids", "vision_rows", "embeds")
    }
    fields = {name: moved(x) for name, x in named.items() if x is not None}
    return batch.replace(**fields, positions=jax.vmap(moved)(batch.positions))


def _fill_in_chunks(params, cfg, cache, batch, features, slot, chunk):
    """`_fill` as a scan over pieces [B chunk] of the rows; each attends to what the cache holds."""
    if chunk < 1:
        raise InputError(f"chunk is {chunk}, expected tokens from 1")
    params = {**params, "layers": _lists(params["layers"])}
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    rows, width = batch.tokens.shape
    last, longest = last_attended(batch.segment_ids), jnp.max(batch.positions)
    count = -(-width // chunk)
    chunk = -(-width // count)  # pieces of one length, so that the last is not mostly padding

    def pieces(x, fill):
        """[B T ...] -> [count B chunk ...]."""
        pad = [(0, 0), (0, count * chunk - width), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pad, constant_values=fill)
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    positions = jnp.stack([pieces(axis, 0) for axis in batch.positions], axis=1)
    cut = {"tokens": pieces(batch.tokens, 0), "positions": positions}
    cut["segment_ids"] = pieces(batch.segment_ids, 0)
    if batch.vision_rows is not None:
        cut["vision_rows"] = pieces(batch.vision_rows, -1)
    if batch.embeds is not None:
        cut["embeds"] = pieces(batch.embeds, 0)
    slots, starts = pieces(slot, cache.slots), chunk * jnp.arange(count)

    def body(carry, xs):
        (k, v), kept = carry
        fields, slot, start = xs
        piece = batch.replace(**fields, vision=None, labels=None)
        filled = cache.replace(k=k, v=v)
        reach = jnp.where(piece.segment_ids > 0, slot + 1, 0)
        mix = cached_attention(filled, slot, reach)
        x, new = run_decoder(params, cfg, piece, features, mix, longest=longest)
        mine = last - start
        here = jnp.take_along_axis(x, jnp.clip(mine, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        inside = ((mine >= 0) & (mine < chunk))[:, None]
        k, v = (list(part) for part in zip(*new, strict=True))
        return ((k, v), jnp.where(inside, here, kept)), None

    x = jnp.zeros((rows, cfg.text.hidden_size), compute_dtype(params))
    ((k, v), x), _ = jax.lax.scan(body, ((cache.k, cache.v), x), (cut, slots, starts))
    return _filled(params, cfg, cache, batch, k, v, x)


def extend(
    params: Params,
    cfg: Config,
    cache: KVCache,
    batch: Batch,
    *,
    features: Features | None = None,
    chunk: int | None = None,
) -> tuple[KVCache, jax.Array]:
    """Appends tokens or a picture to each row of a filled cache; returns it and the next logits [B V].

    The batch is made as for prefill, positions from 0: they are moved behind the cache here. The
    caller makes room first (`grow_cache`): tokens past the last slot are dropped. chunk: as in prefill.
    """
    check_call(params, cfg, cache=cache, batch=batch)
    lo, _ = causal_ranges(batch.segment_ids)
    valid = batch.segment_ids > 0
    place = cache.length[:, None] + jnp.arange(batch.tokens.shape[1]) - lo
    slot = jnp.where(valid, place, cache.slots)
    reach = jnp.where(valid, place + 1, 0)
    start = cache.length + cache.delta
    batch = batch.replace(positions=batch.positions + start[:, None])
    if chunk is not None:
        return _fill_in_chunks(params, cfg, cache, batch, features, slot, chunk)
    return _fill(params, cfg, cache, batch, features, cached_attention(cache, slot, reach))


def decode_step(
    params: Params, cfg: Config, cache: KVCache, tokens: jax.Array
) -> tuple[KVCache, jax.Array]:
    """One token a row, tokens [B] int32, onto the cache; returns it and the next logits [B V] in fp32.

    The caller makes room first (`grow_cache`): a token past the last slot is not kept, and the logits
    are then wrong. Layers are per-layer lists.
    """
    check_call(params, cfg, cache=cache)
    slot = cache.length[:, None]
    positions = jnp.broadcast_to((cache.length + cache.delta)[:, None], (3, *slot.shape))
    x = embed_lookup(params, tokens[:, None])
    mix = cached_attention(cache, slot, slot + 1)
    x, kept = decode_layers(_lists(params["layers"]), cfg.text, x, positions, mix)
    k, v = (list(part) for part in zip(*kept, strict=True))
    cache = pinned(cache.replace(k=k, v=v, length=cache.length + 1))
    return cache, _logits(params, cfg, x[:, 0])


def cached_attention(cache: KVCache, slot: jax.Array, reach: jax.Array):
    """Write first, then attend to the written array: the other order copies the cache at every step."""

    def mix(i, q, k, v):
        k, v = _write(cache.k[i], k, slot), _write(cache.v[i], v, slot)
        return attend(q, k, v, None, reach), (k, v)

    return mix


def _lists(layers):
    if not isinstance(layers, (list, tuple)):
        raise InputError("a cache is filled by per-layer parameters: call unstack_layers first")
    return layers


def _fill(params, cfg, cache, batch, features, mix):
    params = {**params, "layers": _lists(params["layers"])}
    x, kept = run_decoder(params, cfg, batch, features, mix)
    k, v = (list(part) for part in zip(*kept, strict=True))
    last = last_attended(batch.segment_ids)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return _filled(params, cfg, cache, batch, k, v, x)


def _filled(params, cfg, cache, batch, k, v, x):
    """The cache after a batch, and the logits of its last tokens x [B D]."""
    count = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
    cache = cache.replace(k=k, v=v, length=cache.length + count, delta=cache.delta + batch.delta)
    return pinned(cache), _logits(params, cfg, x)


def _logits(params, cfg, x):
    # As the head is cut, for it must not move; then whole rows, an axis at a time, to draw tokens of.
    logits = shard(lm_logits(params, cfg, shard(x, "step_rows", None)), "step_rows", "vocab")
    return shard(shard(logits, "rows", "vocab"), "rows", None)
