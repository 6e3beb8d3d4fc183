"""The whole model as pure functions of (params, cfg, inputs). Dims as in layers.py.

Start reading here, then: structs (inputs and outputs), layers (weights, products, norms), rope,
attention (causal_ranges, attend), text (the decoder layer, DeepStack), vision (the ViT), moe, cache
(prefill, decode_step). How it is fast comes last: sharding (logical axes -> mesh axes),
expert_parallel, attention_gpu, attention_tpu, matmul, quantized, lora.
forward sees whole sequences. All functions can be traced; callers jit them with cfg static.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.attention import Dropout, attend, causal_ranges
from qwen3vl_jax.model.layers import linear_fp32, rms_norm
from qwen3vl_jax.model.quantized import Quantized, embedding_lookup
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.model.structs import Batch, Features, Params, check_call
from qwen3vl_jax.model.text import AttendFn, decode_layers, shard_residual
from qwen3vl_jax.model.vision import vision_encode


def compute_dtype(params: Params) -> Any:
    """Dtype of the computation: the embedding's, or the final norm's for an 8-bit embedding."""
    embed = params["embed"]
    return (params["norm"] if isinstance(embed, Quantized) else embed).dtype


def embed_lookup(params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Token embeddings [B T D] of tokens [B T]."""
    # XLA turns the lookup of a single token into a slice of the gathered table, so it is done twice.
    repeated = tokens if tokens.size > 1 else jnp.repeat(tokens, 2, axis=1)
    # First as the table is sharded, since moving the table is too expensive; then from channels to
    # tokens, then to sequences. In this order XLA never gathers x.
    x = embedding_lookup(params["embed"], shard(repeated, "lookup_batch", None), dtype)
    x = x[:, : tokens.shape[1]]
    if tokens.shape[1] == 1:
        return shard(shard(x, "lookup_batch", None, "decode_embed"), "decode_batch", None, None)
    for axes in (("lookup_batch", None), ("lookup_batch", "residual"), ("batch", "residual")):
        x = shard(x, *axes, "embed")
    return x


def embed_tokens(
    params: Params, cfg: Config, batch: Batch, features: Features | None, dtype: Any = None
) -> tuple[jax.Array, jax.Array | None]:
    """Embeddings [B T D] with vision features over the placeholders; DeepStack [n B T D] or None.

    `features` (a kept vision_encode result) replaces batch.vision; text alone needs neither.
    Raises InputError for placeholders without pixels and features.
    """
    if features is None and batch.vision is not None:
        features = vision_encode(params, cfg, batch.vision)
    dtype = compute_dtype(params) if dtype is None else dtype
    given = batch.embeds
    x = embed_lookup(params, batch.tokens, dtype) if given is None else jnp.asarray(given, dtype)
    if batch.vision_rows is None:
        return shard_residual(x), None
    if features is None:
        found = "the batch has image or video placeholders but neither pixels nor features="
        raise InputError(f"{found}: give make_batch the pixels, or what vision_encode returned")
    placeholder = batch.vision_rows[..., None] >= 0
    x = jnp.where(placeholder, _features_of_tokens(features.merged, batch).astype(x.dtype), x)
    if not len(cfg.vision.deepstack_visual_indexes):
        return shard_residual(x), None
    deepstack = jnp.stack([_features_of_tokens(level, batch) for level in features.taps])
    return shard_residual(x), jnp.where(placeholder, deepstack, 0).astype(x.dtype)


def _features_of_tokens(features: jax.Array, batch: Batch) -> jax.Array:
    """features [R D] -> [B T D] by vision_rows, which counts inside each group's slice of R."""
    groups, rows = batch.groups, cast(jax.Array, batch.vision_rows)
    features = shard(features.reshape(groups, -1, features.shape[-1]), "batch", None, None)
    found = jax.vmap(lambda f, r: f[r])(features, rows.reshape(groups, -1, rows.shape[-1]))
    return shard_residual(found.reshape(*rows.shape, -1))


def last_attended(segment_ids: jax.Array) -> jax.Array:
    """Index [B] of each sequence's last token that is not padding, on whichever side it is padded."""
    index = jnp.arange(segment_ids.shape[1])
    return jnp.max(jnp.where(segment_ids > 0, index, 0), axis=1)


def at_last_attended(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """x [B T D] at each sequence's last attended token: [B D]."""
    return jnp.take_along_axis(x, last_attended(segment_ids)[:, None, None], axis=1)[:, 0]


def lm_head(params: Params, cfg: Config) -> Any:
    """The weight [V D] of the lm_head. Raises InputError for an embedding model, which has none."""
    table = params["embed"] if cfg.tie_word_embeddings else params.get("head")
    if table is None:
        found = "the checkpoint holds no lm_head and its config does not tie it to the embedding"
        advice = "use hidden_states; for text use a checkpoint with lm_head"
        raise InputError(f"{found}: it is an embedding model, {advice}")
    return table


def final_norm(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    return rms_norm(x, params["norm"], cfg.text.rms_norm_eps)


@jax.named_scope("head")
def lm_logits(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Final norm and lm_head: residual x [.. D] -> logits [.. V] float32."""
    return linear_fp32(final_norm(params, cfg, x), lm_head(params, cfg))


def run_decoder(
    params: Params, cfg: Config, batch: Batch, features, attend_fn: AttendFn, dtype=None, **options
) -> tuple[jax.Array, Any]:
    """`embed_tokens` and `decode_layers`, which takes the options and whose results these are."""
    x, deepstack = embed_tokens(params, cfg, batch, features, dtype)
    options = {"deepstack": deepstack, **options}
    return decode_layers(params["layers"], cfg.text, x, batch.positions, attend_fn, **options)


def full_attention(batch: Batch, dropout: Dropout | None = None) -> AttendFn:
    """Causal attention within each segment: the attend_fn of whole sequences, training and scoring."""
    lo, hi = causal_ranges(batch.segment_ids)

    def attend_fn(i, q, k, v):
        drop = dropout and dropout.fold_in(i)
        return attend(q, k, v, lo, hi, drop, layout="causal", segments=batch.segments), None

    return attend_fn


def forward(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    features: Features | None = None,
    logits_to_keep: int | jax.Array = 0,
    intervene: Callable | None = None,
) -> jax.Array:
    """Logits [B T V] in fp32 of whole sequences; those of padding tokens mean nothing.

    logits_to_keep: 0 keeps all tokens; n (static under jit) the last n attended tokens of each
    sequence, on whichever side it is padded, at most T (a shorter sequence repeats its first); an array
    [m] of token indices keeps those. intervene: as in `decode_layers`. Raises InputError below 0.
    """
    check_call(params, cfg, batch=batch)
    x, _ = run_decoder(params, cfg, batch, features, full_attention(batch), intervene=intervene)
    if getattr(logits_to_keep, "ndim", 0) or isinstance(logits_to_keep, (list, tuple)):
        x = x[:, jnp.asarray(logits_to_keep)]
    elif count := operator.index(cast(Any, logits_to_keep)):
        if count < 0:
            raise InputError(f"logits_to_keep is {count}, expected 0 (all), a count, or indices")
        last, count = last_attended(batch.segment_ids), min(count, x.shape[1])
        index = jnp.maximum(last[:, None] + jnp.arange(1 - count, 1), 0)
        x = jnp.take_along_axis(x, index[..., None], axis=1)
    return lm_logits(params, cfg, x)
