"""What a forward pass computes besides logits: final hidden states, attention. Dims as in layers.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
from qwen3vl_jax.model.attention import (
    NEG,
    attention_scores,
    causal_ranges,
    group_heads,
    visible_keys,
)
from qwen3vl_jax.model.structs import Batch, Features, Params, check_call
from qwen3vl_jax.model.transformer import final_norm, full_attention, run_decoder


def last_hidden_state(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """The decoder's output [B T D] after the final norm; values at padding tokens mean nothing."""
    check_call(params, cfg, batch=batch)
    x, _ = run_decoder(params, cfg, batch, features, full_attention(batch))
    return final_norm(params, cfg, x)


def attentions(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """Attention probabilities [L B N T T] of every layer, in the dtype of the parameters."""
    check_call(params, cfg, batch=batch)
    (lo, hi), attend_fn = causal_ranges(batch.segment_ids), full_attention(batch)

    def attend_and_keep(i, q, k, v):
        return attend_fn(i, q, k, v)[0], attention_probs(q, k.swapaxes(1, 2), lo, hi)

    _, probs = run_decoder(params, cfg, batch, features, attend_and_keep)
    return jnp.stack(probs) if isinstance(probs, list) else probs


def attention_probs(q: jax.Array, k: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Attention probabilities [B N T S] in the dtype of q, for inspection: `attend` never holds them."""
    scores = attention_scores(group_heads(q, k.shape[1]), k)
    scores = jnp.where(visible_keys(lo, hi, jnp.arange(k.shape[2])), scores, NEG)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return probs.reshape(q.shape[0], q.shape[2], q.shape[1], k.shape[2])
