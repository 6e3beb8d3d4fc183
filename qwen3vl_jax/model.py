"""The whole model as pure functions of (params, cfg, inputs). Dims as in layers.py.

forward, hidden_states and attentions look at whole rows; prefill, extend and decode_step fill a
KVCache. All can be traced; the caller jits them (cfg static) and donates the cache.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.attention import BLOCK, attend, attention_probs, causal_ranges
from qwen3vl_jax.config import Config, TextConfig, VisionConfig
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.layers import linear_fp32, ones, rms_norm, weight
from qwen3vl_jax.sharding import platform
from qwen3vl_jax.structs import Batch, Features, KVCache, Params
from qwen3vl_jax.text import Block, decode_layers
from qwen3vl_jax.vision import PatchEmbed, PatchMerger, VisionBlock, vision_encode


class Tables(nn.Module):
    """The parameters outside the layers: token embedding, final norm, head (absent when tied)."""

    cfg: TextConfig
    tied: bool

    @nn.compact
    def __call__(self) -> None:
        v, d = (self.cfg.vocab_size, "vocab"), (self.cfg.hidden_size, "embed")
        weight(self, "embed", v, d)
        weight(self, "norm", (self.cfg.hidden_size, None), init=ones)
        if not self.tied:
            weight(self, "head", v, d)


class VisionTables(nn.Module):
    """The table of learned positions."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self) -> None:
        c = self.cfg
        weight(self, "pos", (c.num_position_embeddings, None), (c.hidden_size, "vision_embed"))


def init_params(key: jax.Array, cfg: Config, dtype=jnp.float32) -> Params:
    """Random parameters, normal(initializer_range), unit norms, zero biases; layers are lists. Jit it.

    `jax.eval_shape(functools.partial(init_params, cfg=cfg), key)` gives the shapes for free.
    """
    boxed = _boxed_params(key, cfg)
    return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(boxed))


def _boxed_params(key: jax.Array, cfg: Config) -> Params:
    """Parameters still in the boxes that hold their logical axis names."""
    keys = iter(jax.random.split(key, 8 + cfg.text.num_hidden_layers + 2 * cfg.vision.depth))
    t, c = cfg.text, cfg.vision

    def init(module, *args):
        return module.init(next(keys), *args)["params"]

    angle = jnp.zeros((1, 1, 1, t.head_dim // 2))
    text_args = (jnp.zeros((1, 1, t.hidden_size)), (angle, angle), lambda q, k, v: (q, None))
    turn = jnp.zeros((1, 1, c.head_dim // 2))
    zero = jnp.zeros(1, jnp.int32)
    patch = jnp.zeros((c.merge_unit, c.hidden_size))
    vision_args = (patch[:1], (turn, turn), zero, zero)
    pixels = jnp.zeros((1, functools.reduce(lambda a, b: a * b, c.patch_shape)))
    taps = c.deepstack_visual_indexes
    vision = {
        "patch": init(PatchEmbed(c), pixels),
        **init(VisionTables(c)),
        "blocks": [init(VisionBlock(c), *vision_args) for _ in range(c.depth)],
        "merger": init(PatchMerger(c, False), patch),
        "deepstack": [init(PatchMerger(c, True), patch) for _ in taps],
    }
    layers = [init(Block(t), *text_args) for _ in range(t.num_hidden_layers)]
    return {**init(Tables(t, cfg.tie_word_embeddings)), "layers": layers, "vision": vision}


def stack_layers(params: Params) -> Params:
    """Per-layer lists -> one stacked array a parameter, for `lax.scan` (training)."""

    def stack(layers):
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)

    vision = {**params["vision"], "blocks": stack(params["vision"]["blocks"])}
    return {**params, "layers": stack(params["layers"]), "vision": vision}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    vision = {**params["vision"], "blocks": _per_layer(params["vision"]["blocks"])}
    return {**params, "layers": _per_layer(params["layers"]), "vision": vision}


def _per_layer(layers):
    if isinstance(layers, (list, tuple)):
        return layers
    count = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]


def embed_tokens(
    params: Params, cfg: Config, batch: Batch, features: Features | None
) -> tuple[jax.Array, jax.Array | None]:
    """Token embeddings with the vision rows written over the placeholders, and DeepStack [n B T D].

    `features` (a kept vision_encode result) stands in for batch.vision; text alone needs neither.
    Raises InputError for placeholders whose pictures are not there.
    """
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    table, rows = params["embed"], batch.vision_rows
    x = table[batch.tokens] if batch.embeds is None else jnp.asarray(batch.embeds, table.dtype)
    if rows is None:
        return x, None
    if features is None:
        raise InputError(
            "the batch has image or video placeholders but neither pixels nor features=: give "
            "make_batch the pixel values, or pass what vision_encode returned"
        )
    x = jnp.where(rows[..., None] >= 0, features.merged[rows].astype(x.dtype), x)
    if not len(cfg.vision.deepstack_visual_indexes):
        return x, None
    rows = jnp.where(rows >= 0, rows, features.taps.shape[1])  # past the end: zeros
    deepstack = jnp.take(features.taps, rows, axis=1, mode="fill", fill_value=0)
    return x, deepstack.astype(x.dtype)


def unembed(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Final norm and head: x [.. D] -> logits [.. V] in fp32."""
    table = params["embed"] if cfg.tie_word_embeddings else params.get("head")
    if table is None:
        raise InputError(
            "the checkpoint holds no lm_head and its config does not tie it to the embedding: it is an "
            "embedding model, use hidden_states; for text use a checkpoint with lm_head"
        )
    return linear_fp32(rms_norm(x, params["norm"], cfg.text.rms_norm_eps), table)


def _run(params: Params, cfg: Config, batch: Batch, features, mix, keep=None):
    x, deepstack = embed_tokens(params, cfg, batch, features)
    layers = params["layers"]
    x, kept = decode_layers(layers, cfg.text, x, batch.positions, mix, deepstack, keep)
    return x, kept


def _row_mix(batch: Batch):
    lo, hi = causal_ranges(batch.segment_ids)

    def mix(i, q, k, v):
        return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), lo, hi), None

    return mix


def forward(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    features: Features | None = None,
    logits_to_keep: int | jax.Array = 0,
) -> jax.Array:
    """Logits [B T V] in fp32 of whole rows; what stands at padding tokens means nothing.

    logits_to_keep: 0 all tokens; n (static under jit) the last n attended tokens of each row, whichever
    side it is padded on; an array [m] of token indices those.
    """
    x, _ = _run(params, cfg, batch, features, _row_mix(batch))
    if getattr(logits_to_keep, "ndim", 0) or isinstance(logits_to_keep, (list, tuple)):
        x = x[:, jnp.asarray(logits_to_keep)]
    elif (count := operator.index(cast(Any, logits_to_keep))) > 0:
        index = jnp.arange(batch.tokens.shape[1])
        last = jnp.max(jnp.where(batch.segment_ids > 0, index, 0), axis=1)
        kept = jnp.maximum(last[:, None] + jnp.arange(1 - count, 1), 0)
        x = jnp.take_along_axis(x, kept[..., None], axis=1)
    return unembed(params, cfg, x)


def hidden_states(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """The residual stream [L+1 B T D]: embeddings with vision written in, then after each layer.

    Each with its DeepStack addition, the last before the final norm: what ForConditionalGeneration of
    transformers 4.57.1 returns.
    """
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    x, _ = embed_tokens(params, cfg, batch, features)
    _, after = _run(params, cfg, batch, features, _row_mix(batch), keep=lambda x, _: x)
    after = jnp.stack(after) if isinstance(after, list) else after
    return jnp.concatenate([x[None], after])


def attentions(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """Attention probabilities [L B N T T] of every layer, in the dtype of the parameters."""
    lo, hi = causal_ranges(batch.segment_ids)

    def mix(i, q, k, v):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return attend(q, k, v, lo, hi), attention_probs(q, k, lo, hi)

    _, probs = _run(params, cfg, batch, features, mix)
    return jnp.stack(probs) if isinstance(probs, list) else probs


def init_cache(cfg: Config, rows: int, slots: int, dtype) -> KVCache:
    """An empty cache for `rows` rows of at least `slots` tokens, in whole blocks of attention.

    On a CPU it is fp32, because XLA:CPU (jax 0.10) converts a whole bf16 cache at every write.
    """
    c = cfg.text
    dtype = jnp.float32 if platform() == "cpu" else dtype
    shape = (rows, c.num_key_value_heads, _whole_blocks(slots), c.head_dim)
    k, v = ([jnp.zeros(shape, dtype) for _ in range(c.num_hidden_layers)] for _ in range(2))
    return KVCache(k, v, length=jnp.zeros(rows, jnp.int32), delta=jnp.zeros(rows, jnp.int32))


def _whole_blocks(slots: int) -> int:
    """Attention pads keys to whole blocks; a cache that has them is never copied for it."""
    return slots if slots <= BLOCK else -(-slots // BLOCK) * BLOCK


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same cache with room for at least `slots` tokens a row; raises InputError for fewer."""
    if slots < cache.slots:
        raise InputError(f"grow_cache: slots is {slots}, the cache has {cache.slots} already")
    pad = ((0, 0), (0, 0), (0, _whole_blocks(slots) - cache.slots), (0, 0))
    k, v = ([jnp.pad(x, pad) for x in part] for part in (cache.k, cache.v))
    return cache.replace(k=k, v=v)


def _write(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """new [B T K H] into old [B K S H] at slot [B T]; a slot past the end is dropped."""
    rows = jnp.arange(old.shape[0])[:, None]
    return old.at[rows, :, slot].set(new.astype(old.dtype), mode="drop")


def prefill(
    params: Params, cfg: Config, batch: Batch, max_len: int, *, features: Features | None = None
) -> tuple[KVCache, jax.Array]:
    """Runs the prompts into a new cache; returns it and each row's next logits [B V] in fp32.

    The cache has room for max_len tokens a row, prompt and answer, and never less than the batch is
    wide. Rows may be padded left or right; each is one segment. Layers are per-layer lists.
    """
    rows, width = batch.tokens.shape
    dtype = params["embed"].dtype
    cache = init_cache(cfg, rows, max(max_len, width), dtype)
    lo, hi = causal_ranges(batch.segment_ids)
    valid = batch.segment_ids > 0
    slot = jnp.where(valid, jnp.arange(width) - lo, cache.slots)

    def mix(i, q, k, v):
        new = (_write(cache.k[i], k, slot), _write(cache.v[i], v, slot))
        return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), lo, hi), new

    return _fill(params, cfg, cache, batch, features, mix)


def extend(
    params: Params, cfg: Config, cache: KVCache, batch: Batch, *, features: Features | None = None
) -> tuple[KVCache, jax.Array]:
    """Appends tokens or a picture to each row of a filled cache; returns it and the next logits [B V].

    The batch is made as for prefill, positions from 0: they are moved behind the cache here. The
    caller makes room first (`grow_cache`): tokens past the last slot are dropped.
    """
    lo, _ = causal_ranges(batch.segment_ids)
    valid = batch.segment_ids > 0
    place = cache.length[:, None] + jnp.arange(batch.tokens.shape[1]) - lo
    slot = jnp.where(valid, place, cache.slots)
    reach = jnp.where(valid, place + 1, 0)
    start = cache.length + cache.delta
    batch = batch.replace(positions=batch.positions + start[:, None])
    return _fill(params, cfg, cache, batch, features, _cache_mix(cache, slot, reach))


def decode_step(
    params: Params, cfg: Config, cache: KVCache, tokens: jax.Array
) -> tuple[KVCache, jax.Array]:
    """One token a row, tokens [B] int32, onto the cache; returns it and the next logits [B V] in fp32.

    The caller makes room first (`grow_cache`): a token past the last slot is not kept, and the logits
    are then wrong. Layers are per-layer lists.
    """
    slot = cache.length[:, None]
    positions = jnp.broadcast_to((cache.length + cache.delta)[:, None], (3, *slot.shape))
    x = params["embed"][tokens][:, None]
    mix = _cache_mix(cache, slot, slot + 1)
    x, kept = decode_layers(_lists(params["layers"]), cfg.text, x, positions, mix)
    k, v = (list(part) for part in zip(*kept, strict=True))
    cache = cache.replace(k=k, v=v, length=cache.length + 1)
    return cache, unembed(params, cfg, x[:, 0])


def _cache_mix(cache: KVCache, slot: jax.Array, reach: jax.Array):
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
    x, kept = _run(params, cfg, batch, features, mix)
    k, v = (list(part) for part in zip(*kept, strict=True))
    count = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
    index = jnp.arange(batch.tokens.shape[1])
    last = jnp.max(jnp.where(batch.segment_ids > 0, index, 0), axis=1)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    cache = cache.replace(k=k, v=v, length=cache.length + count, delta=cache.delta + batch.delta)
    return cache, unembed(params, cfg, x)
