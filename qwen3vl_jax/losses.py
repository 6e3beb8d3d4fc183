"""Training losses. Dims as in layers.py; n tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.layers import linear_fp32, rms_norm
from qwen3vl_jax.model import forward
from qwen3vl_jax.moe import Routed
from qwen3vl_jax.quantized import Weight
from qwen3vl_jax.structs import Batch, Features, Params

IGNORE = -100


def loss_fn(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token cross entropy in fp32, the mean over labels [B T] that are not -100.

    The logits of token t are held against the label of token t + 1, as in transformers. Metrics:
    loss, tokens (how many labels counted), correct (how many of them the argmax hits).
    """
    if batch.labels is None:
        raise InputError("loss_fn: the batch has no labels; make_batch takes labels=")
    logits = forward(params, cfg, batch, features=features)[:, :-1]
    sums = _token_sums(logits, batch.labels[:, 1:], jnp.ones(batch.labels[:, 1:].shape))
    loss = sums.loss / jnp.maximum(sums.tokens, 1)
    return loss, {"loss": loss, "tokens": sums.tokens, "correct": sums.correct}


class TokenSums(NamedTuple):
    """Sums over tokens whose label is not -100."""

    loss: jax.Array  # weighted cross entropy
    z: jax.Array  # weighted squares of log(sum(exp(logits))): PaLM's z-loss, arXiv 2204.02311
    tokens: jax.Array  # int32, how many
    correct: jax.Array  # int32, of how many the label has the largest logit


def _token_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> TokenSums:
    """Logits [.. V] in fp32, labels and weights [..]."""
    counted = labels != IGNORE
    target = jnp.where(counted, labels, 0)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.where(counted, weights, 0.0)
    correct = jnp.sum(counted & (jnp.argmax(logits, axis=-1) == target))
    loss, z = jnp.sum(weights * (total - picked)), jnp.sum(weights * total**2)
    return TokenSums(loss, z, jnp.sum(counted), correct)


def chunked_cross_entropy(
    x: jax.Array, table: Weight, labels: jax.Array, weights: jax.Array, chunk: int
) -> TokenSums:
    """Cross entropy of a head that never holds more than `chunk` rows of logits, sums over all tokens.

    x [n D] behind the final norm, table [V D], labels [n] (-100: not counted) already those of the
    next token, weights [n], which have no gradient. The backward pass computes each chunk's logits
    again; the table's gradient is summed over chunks in fp32 whatever the table is held in.
    """
    pad = -len(x) % chunk
    x, weights = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(weights, (0, pad))
    labels = jnp.pad(labels, (0, pad), constant_values=IGNORE)
    rows, told, weighed = (y.reshape(-1, chunk, *y.shape[1:]) for y in (x, labels, weights))
    return _chunk_sums(table, rows, told, weighed)


@jax.custom_vjp
def _chunk_sums(table: Weight, rows: jax.Array, labels: jax.Array, weights: jax.Array) -> TokenSums:
    """Sums over chunks: rows [c n D], labels and weights [c n]."""

    def body(sums: TokenSums, xs):
        more = _token_sums(linear_fp32(xs[0], table), *xs[1:])
        return jax.tree.map(jnp.add, sums, more), None

    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return jax.lax.scan(body, TokenSums(zero, zero, none, none), (rows, labels, weights))[0]


def _chunk_forward(table, rows, labels, weights):
    """The sums, and what the backward pass needs: the table cut into what is trained and the rest."""
    learned = jax.tree.map(lambda x: x.value if x.perturbed else None, table)
    still = jax.tree.map(lambda x: None if x.perturbed else x.value, table)
    rows, labels, weights = rows.value, labels.value, weights.value
    table = jax.tree.map(lambda x: x.value, table)
    return _chunk_sums(table, rows, labels, weights), (learned, still, rows, labels, weights)


def _chunk_backward(kept, slopes):
    learned, still, *xs = kept
    zero = jnp.zeros((), jnp.float32)
    slopes = [zero if isinstance(s, SymbolicZero) else s for s in slopes[:2]]

    def body(total, xs):
        rows, *told = xs

        def of(learned, rows):
            table = jax.tree.map(
                lambda a, b: b if a is None else a, learned, still, is_leaf=lambda x: x is None
            )
            return list(_token_sums(linear_fp32(rows, table), *told)[:2])

        d_table, d_rows = jax.vjp(of, learned, rows)[1](slopes)
        return jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, d_table), d_rows

    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), learned)
    total, d_rows = jax.lax.scan(body, total, tuple(xs))
    return jax.tree.map(lambda t, x: t.astype(x.dtype), total, learned), d_rows, None, None


_chunk_sums.defvjp(_chunk_forward, _chunk_backward, symbolic_zeros=True)


def head_sums(
    params: Params, cfg: Config, x: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int
) -> TokenSums:
    """`chunked_cross_entropy` of the stream x [.. D] before the final norm; labels, weights [..]."""
    table = params["embed"] if cfg.tie_word_embeddings else params["head"]
    x = rms_norm(x, params["norm"], cfg.text.rms_norm_eps).reshape(-1, x.shape[-1])
    return chunked_cross_entropy(x, table, labels.reshape(-1), weights.reshape(-1), chunk)


class RouterSums(NamedTuple):
    """What one sparse layer's router did, over tokens that are not padding."""

    chosen: jax.Array  # [A E] fp32: how often expert e was choice a
    probs: jax.Array  # [E] fp32: sum of its probabilities


def router_sums(routed: Routed, mask: jax.Array) -> RouterSums:
    """The sums of one layer; mask [n], true where a token counts."""
    counted = mask.reshape(-1, 1).astype(jnp.float32)
    experts = routed.probs.shape[-1]
    hits = jax.nn.one_hot(routed.chosen, experts, dtype=jnp.float32)  # [n A E]
    return RouterSums(jnp.sum(hits * counted[..., None], 0), jnp.sum(routed.probs * counted, 0))


def balance_loss(sums: RouterSums, tokens: jax.Array) -> jax.Array:
    """E times the sum over choices and experts of (share of tokens) x (mean probability).

    sums with a leading axis of layers, over all of which the means are taken, as in transformers;
    tokens: how many counted in each. Source: Switch Transformer, arXiv 2101.03961, eq. 4 to 6.
    """
    total = jnp.maximum(tokens * sums.probs.shape[0], 1)
    share, prob = jnp.sum(sums.chosen, 0) / total, jnp.sum(sums.probs, 0) / total
    return sums.probs.shape[-1] * jnp.sum(share * prob)
