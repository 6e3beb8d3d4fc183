"""The whole model as pure functions of (params, cfg, inputs). Dims as in layers.py.

forward, hidden_states and attentions look at whole rows; what fills a cache is in cache.py. All can
be traced; the caller jits them (cfg static).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config, TextConfig, VisionConfig
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.attention import (
    Dropout,
    attend,
    attention_probs,
    causal_ranges,
)
from qwen3vl_jax.model.layers import (
    linear_fp32,
    ones,
    rms_norm,
    weight,
)
from qwen3vl_jax.model.quantized import Quantized, embedding_lookup
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.model.structs import (
    Batch,
    Features,
    Params,
    check_call,
)
from qwen3vl_jax.model.text import Block, decode_layers
from qwen3vl_jax.model.vision import (
    PatchEmbed,
    PatchMerger,
    VisionBlock,
    vision_encode,
)


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
    if not isinstance(cfg, Config):
        raise InputError(
            f"cfg: got {'an array' if isinstance(cfg, jax.Array) else type(cfg).__name__}, expected a "
            "Config; the order is (key, cfg, dtype)"
        )
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
    turn = jnp.zeros((1, 1, 1, c.head_dim // 2))
    zero = jnp.zeros((1, 1), jnp.int32)
    patch = jnp.zeros((c.merge_unit, c.hidden_size))
    vision_args = (patch[None, :1], (turn, turn), zero, zero)
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


def logical_axes(cfg: Config) -> dict[str, tuple[str | None, ...]]:
    """{"layers.attn.qkv": ("kv_heads", None, None, "embed"), ..} of every parameter, one layer each.

    Traced with one layer a tower: the names do not change with depth.
    """
    text = dataclasses.replace(cfg.text, num_hidden_layers=1)
    vision = dataclasses.replace(cfg.vision, depth=1)
    small = dataclasses.replace(cfg, text=text, vision=vision)
    boxed = jax.eval_shape(functools.partial(_boxed_params, cfg=small), jax.random.key(0))
    boxed = {**boxed, "layers": boxed["layers"][0]}
    boxed["vision"] = {**boxed["vision"], "blocks": boxed["vision"]["blocks"][0]}
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="."): x.names for path, x in leaves}


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


def compute_dtype(params: Params) -> Any:
    """The dtype of the computation: the embedding's, or the final norm's where that is in 8 bits."""
    embed = params["embed"]
    return (params["norm"] if isinstance(embed, Quantized) else embed).dtype


def embed_lookup(params: Params, tokens: jax.Array, dtype: Any = None) -> jax.Array:
    """Token embeddings [.. D] of tokens [..], in the dtype of the computation."""
    dtype = compute_dtype(params) if dtype is None else dtype
    if tokens.ndim != 2:
        return embedding_lookup(params["embed"], tokens, dtype)
    # As the table is cut, for a lookup must move no table; then from the channels to the tokens, and
    # to the rows: the last axes of the mesh first, which XLA does without making x whole.
    # One token is looked up twice: XLA makes a slice of a lookup of one, and the whole table for that.
    looked_up = tokens if tokens.size > 1 else jnp.repeat(tokens, 2, axis=1)
    x = embedding_lookup(params["embed"], shard(looked_up, "lookup_rows", None), dtype)
    x = x[:, : tokens.shape[1]]
    if tokens.shape[1] == 1:
        return shard(shard(x, "lookup_rows", None, "step_embed"), "step_rows", None, None)
    for axes in (("lookup_rows", None), ("lookup_rows", "stream"), ("rows", "stream")):
        x = shard(x, *axes, "embed")
    return x


def embed_tokens(
    params: Params, cfg: Config, batch: Batch, features: Features | None, dtype: Any = None
) -> tuple[jax.Array, jax.Array | None]:
    """Token embeddings with the vision rows written over the placeholders, and DeepStack [n B T D].

    `features` (a kept vision_encode result) stands in for batch.vision; text alone needs neither.
    Raises InputError for placeholders whose pictures are not there.
    """
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    dtype = compute_dtype(params) if dtype is None else dtype
    rows, given = batch.vision_rows, batch.embeds
    x = embed_lookup(params, batch.tokens, dtype) if given is None else jnp.asarray(given, dtype)
    if rows is None:
        return _stream(x), None
    if features is None:
        raise InputError(
            "the batch has image or video placeholders but neither pixels nor features=: give "
            "make_batch the pixel values, or pass what vision_encode returned"
        )
    here = rows[..., None] >= 0
    x = jnp.where(here, _feature_rows(features.merged, batch).astype(x.dtype), x)
    if not len(cfg.vision.deepstack_visual_indexes):
        return _stream(x), None
    deep = jnp.stack([_feature_rows(taps, batch) for taps in features.taps])
    return _stream(x), jnp.where(here, deep, 0).astype(x.dtype)


def _feature_rows(table: jax.Array, batch: Batch) -> jax.Array:
    """Rows [B T D] of features [R D], each group of a batch's rows from its own part of them."""
    groups, rows = batch.groups, cast(jax.Array, batch.vision_rows)
    table = shard(table.reshape(groups, -1, table.shape[-1]), "rows", None, None)
    found = jax.vmap(lambda t, r: t[r])(table, rows.reshape(groups, -1, rows.shape[-1]))
    return _stream(found.reshape(*rows.shape, -1))


def _stream(x: jax.Array) -> jax.Array:
    return shard(x, "rows", "stream", None)


def last_attended(segment_ids: jax.Array) -> jax.Array:
    """The index [B] of each row's last token that is not padding, whichever side it is padded on."""
    index = jnp.arange(segment_ids.shape[1])
    return jnp.max(jnp.where(segment_ids > 0, index, 0), axis=1)


def lm_logits(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Final norm and head: x [.. D] -> logits [.. V] in fp32."""
    table = params["embed"] if cfg.tie_word_embeddings else params.get("head")
    if table is None:
        raise InputError(
            "the checkpoint holds no lm_head and its config does not tie it to the embedding: it is an "
            "embedding model, use hidden_states; for text use a checkpoint with lm_head"
        )
    return linear_fp32(rms_norm(x, params["norm"], cfg.text.rms_norm_eps), table)


def run_decoder(
    params: Params, cfg: Config, batch: Batch, features, mix, keep=None, dtype=None, remat="none",
    longest=None,
):  # fmt: skip
    """Embeds a batch and runs the decoder over it with one way to attend: (stream [B T D], kept)."""
    x, deepstack = embed_tokens(params, cfg, batch, features, dtype)
    return decode_layers(
        params["layers"], cfg.text, x, batch.positions, mix, deepstack, keep, remat, longest
    )


def full_attention(batch: Batch, dropout: Dropout | None = None):
    """The way to attend of whole rows, for `run_decoder`: each token to its own segment, up to itself."""
    lo, hi = causal_ranges(batch.segment_ids)

    def mix(i, q, k, v):
        drop = dropout and Dropout(jax.random.fold_in(dropout.key, i), dropout.rate)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return attend(q, k, v, lo, hi, drop, layout="causal"), None

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
    side it is padded on, and no more than the batch is wide (a shorter row repeats its first); an array
    [m] of token indices those. Raises InputError for a negative number.
    """
    check_call(params, cfg, batch=batch)
    x, _ = run_decoder(params, cfg, batch, features, full_attention(batch))
    if getattr(logits_to_keep, "ndim", 0) or isinstance(logits_to_keep, (list, tuple)):
        x = x[:, jnp.asarray(logits_to_keep)]
    elif count := operator.index(cast(Any, logits_to_keep)):
        if count < 0:
            raise InputError(f"logits_to_keep is {count}, expected 0 (all), a count, or indices")
        last, count = last_attended(batch.segment_ids), min(count, x.shape[1])
        kept = jnp.maximum(last[:, None] + jnp.arange(1 - count, 1), 0)
        x = jnp.take_along_axis(x, kept[..., None], axis=1)
    return lm_logits(params, cfg, x)


def hidden_states(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """The residual stream [L+1 B T D]: embeddings with vision written in, then after each layer.

    Each with its DeepStack addition, the last before the final norm: what ForConditionalGeneration of
    transformers 4.57.1 returns. Behind that norm: `last_hidden_state`.
    """
    check_call(params, cfg, batch=batch)
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    x, _ = embed_tokens(params, cfg, batch, features)
    _, after = run_decoder(
        params, cfg, batch, features, full_attention(batch), keep=lambda x, *_: x
    )
    after = jnp.stack(after) if isinstance(after, list) else after
    return jnp.concatenate([x[None], after])


def last_hidden_state(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """The decoder's output [B T D], after the final norm: transformers' last_hidden_state.

    In the dtype of the parameters; what stands at padding tokens means nothing.
    """
    check_call(params, cfg, batch=batch)
    x, _ = run_decoder(params, cfg, batch, features, full_attention(batch))
    return rms_norm(x, params["norm"], cfg.text.rms_norm_eps)


def attentions(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """Attention probabilities [L B N T T] of every layer, in the dtype of the parameters."""
    check_call(params, cfg, batch=batch)
    lo, hi = causal_ranges(batch.segment_ids)

    def mix(i, q, k, v):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return attend(q, k, v, lo, hi, layout="causal"), attention_probs(q, k, lo, hi)

    _, probs = run_decoder(params, cfg, batch, features, mix)
    return jnp.stack(probs) if isinstance(probs, list) else probs
