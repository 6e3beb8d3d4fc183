"""Training losses. Dims as in layers.py; n tokens."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.attention import NEG
from qwen3vl_jax.model.layers import linear_fp32, rms_norm
from qwen3vl_jax.model.moe import RouterOutput
from qwen3vl_jax.model.quantized import Weight
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.model.structs import (
    Batch,
    Features,
    Params,
    check_call,
)
from qwen3vl_jax.model.transformer import forward


def loss_fn(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token cross entropy in fp32, the mean over labels [B T] that are not -100.

    The logits of token t are held against the label of token t + 1, as in transformers. Where all
    labels are -100 the loss is 0, with zero gradients; transformers gives nan. Metrics: loss, tokens
    (how many labels counted), correct (how many of them the argmax hits).
    """
    check_call(params, cfg, batch=batch)
    if batch.labels is None:
        raise InputError("loss_fn: the batch has no labels; make_batch takes labels=")
    logits = forward(params, cfg, batch, features=features)[:, :-1]
    sums = token_sums(logits, batch.labels[:, 1:], jnp.ones(batch.labels[:, 1:].shape))
    loss = sums.loss / jnp.maximum(sums.tokens, 1)
    return loss, {"loss": loss, "tokens": sums.tokens, "correct": sums.correct}


class TokenSums(NamedTuple):
    """Sums over tokens whose label is not -100."""

    loss: jax.Array  # weighted cross entropy
    z: jax.Array  # weighted squares of log(sum(exp(logits))): PaLM's z-loss, arXiv 2204.02311
    tokens: jax.Array  # int32, how many
    correct: jax.Array  # int32, of how many the label has the largest logit


def token_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> TokenSums:
    """Logits [.. V] in fp32, labels and weights [..]."""
    counted = labels != IGNORE_INDEX
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
    """Cross entropy of a head that holds logits of `chunk` words at a time, sums over all tokens.

    x [.. D] behind the final norm, table [V D], labels [..] (-100: not counted) already those of the
    next token, weights [..], which have no gradient. The words are cut, not the tokens: a softmax over
    pieces is exact, and each row of the table gets its gradient once, written in place, where cutting
    tokens would add up a whole table a chunk. The backward pass computes the logits again.
    There is no forward mode; `loss_fn` has it.
    Source: the online softmax of arXiv 1805.02867.
    """
    return _sums_by_words(min(chunk, table.shape[0]), x, _whole_words(table), labels, weights)


def _whole_words(table: Any) -> Any:
    """A table whose words are whole on every device: pieces of them are cut out."""
    return table if not isinstance(table, jax.Array) else shard(table, None, "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums_by_words(chunk, x, table, labels, weights) -> TokenSums:
    return _reduced(chunk, x, table, labels, weights)[0]


def _reduced(chunk, x, table, labels, weights) -> tuple[TokenSums, jax.Array]:
    """The sums, and log(sum(exp(logits))) [..]."""

    def body(carry, j):
        top, best, total, picked = carry
        logits, words = _piece(chunk, x, table, j)
        high = jnp.max(logits, -1)
        new_top = jnp.maximum(top, high)
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[..., None]), -1)
        best = jnp.where(high > top, words[jnp.argmax(logits, -1)], best)
        hit = jnp.where(words == labels[..., None], logits, 0.0)
        return (new_top, best, total, picked + jnp.sum(hit, -1)), None

    zero = jnp.zeros_like(labels, jnp.float32)
    start = (jnp.full_like(zero, NEG), jnp.zeros_like(labels), zero, zero)
    pieces = jnp.arange(-(-table.shape[0] // chunk))
    top, best, total, picked = jax.lax.scan(body, start, pieces)[0]
    whole, counted = top + jnp.log(total), labels != IGNORE_INDEX
    weights = jnp.where(counted, weights, 0.0)
    loss, z = jnp.sum(weights * (whole - picked)), jnp.sum(weights * whole**2)
    correct = jnp.sum(counted & (best == labels))
    return TokenSums(loss, z, jnp.sum(counted), correct), whole


def _piece(chunk, x, table, j) -> tuple[jax.Array, jax.Array]:
    """Logits [.. chunk] of piece j, and its words [chunk]; NEG and -1 for those of an earlier piece."""
    start, words = _place(chunk, table.shape[0], j)
    logits = linear_fp32(x, _cut(table, table.shape[0], start, chunk))
    return jnp.where(words >= 0, logits, NEG), words


def _place(chunk: int, vocab: int, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first word of piece j and all of them; the last piece reaches back into the one before."""
    start = jnp.minimum(j * chunk, vocab - chunk)
    words = start + jnp.arange(chunk)
    return start, jnp.where(words >= j * chunk, words, -1)


def _cut(table: Any, vocab: int, start: jax.Array, chunk: int) -> Any:
    """Rows of every leaf that has one a word (not of scales for all, or of a low-rank A)."""

    def rows(leaf):
        one_a_word = leaf.ndim and leaf.shape[0] == vocab
        return jax.lax.dynamic_slice_in_dim(leaf, start, chunk) if one_a_word else leaf

    return jax.tree.map(rows, table)


def _forward(chunk, x, table, labels, weights):
    """The sums, and what the backward pass needs: the table cut into what is trained and the rest."""
    learned = jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, table)
    still = jax.tree.map(lambda leaf: None if leaf.perturbed else leaf.value, table)
    table = jax.tree.map(lambda leaf: leaf.value, table)
    x, labels, weights = x.value, labels.value, weights.value
    sums, whole = _reduced(chunk, x, table, labels, weights)
    return sums, (x, learned, still, labels, weights, whole)


def _backward(chunk, kept, slopes):
    x, learned, still, labels, weights, whole = kept
    of_loss, of_z = (0.0 if isinstance(s, SymbolicZero) else s for s in slopes[:2])
    weights = jnp.where(labels != IGNORE_INDEX, weights, 0.0)
    scale = (weights * (of_loss + 2 * of_z * whole))[..., None]
    table = _merged(learned, still)
    vocab = table.shape[0]

    def body(carry, j):
        d_x, d_table = carry
        start, words = _place(chunk, vocab, j)
        parts = _cut(learned, vocab, start, chunk), _cut(still, vocab, start, chunk)
        logits, pull = jax.vjp(lambda x, part: linear_fp32(x, _merged(part, parts[1])), x, parts[0])
        slope = jnp.exp(logits - whole[..., None]) * scale
        slope -= jnp.where(words == labels[..., None], (weights * of_loss)[..., None], 0.0)
        more_x, more = pull(jnp.where(words >= 0, slope, 0.0))
        d_table = jax.tree.map(lambda t, d: _added(t, d, start), d_table, more)
        return (d_x + more_x.astype(jnp.float32), d_table), None

    none = jnp.zeros(x.shape, jnp.float32), jax.tree.map(jnp.zeros_like, learned)
    (d_x, d_table), _ = jax.lax.scan(body, none, jnp.arange(-(-vocab // chunk)))
    return d_x.astype(x.dtype), d_table, None, None


def _merged(learned: Any, still: Any) -> Any:
    """The table of its two parts, which hold None at each other's leaves."""

    def either(a, b):
        return b if a is None else a

    return jax.tree.map(either, learned, still, is_leaf=lambda leaf: leaf is None)


def _added(total: jax.Array, more: jax.Array, start: jax.Array) -> jax.Array:
    """Adds the gradient of a piece to that of a leaf, in place."""
    if total.shape == more.shape:
        return total + more
    old = jax.lax.dynamic_slice_in_dim(total, start, len(more))
    return jax.lax.dynamic_update_slice_in_dim(total, old + more, start, 0)


_sums_by_words.defvjp(_forward, _backward, symbolic_zeros=True)


def lm_head_sums(
    params: Params, cfg: Config, x: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int
) -> TokenSums:
    """`chunked_cross_entropy` of the stream x [.. D] before the final norm; labels, weights [..]."""
    table = params["embed"] if cfg.tie_word_embeddings else params["head"]
    x = rms_norm(x, params["norm"], cfg.text.rms_norm_eps)
    return chunked_cross_entropy(x, table, labels, weights, chunk)


class RouterSums(NamedTuple):
    """What one sparse layer's router did, over tokens that are not padding."""

    counts: jax.Array  # [A E] fp32: how often expert e was choice a
    probs: jax.Array  # [E] fp32: sum of its probabilities


def router_sums(routed: RouterOutput, mask: jax.Array) -> RouterSums:
    """The sums of one layer; mask [..], true where a token counts."""
    counted, experts = mask[..., None].astype(jnp.float32), routed.probs.shape[-1]
    hits = jax.nn.one_hot(routed.expert_index, experts, dtype=jnp.float32)  # [.. A E]
    lead = tuple(range(mask.ndim))
    return RouterSums(
        jnp.sum(hits * counted[..., None], lead), jnp.sum(routed.probs * counted, lead)
    )


def balance_loss(sums: RouterSums, tokens: jax.Array) -> jax.Array:
    """E times the sum over choices and experts of (share of tokens) x (mean probability).

    sums with a leading axis of layers, over all of which the means are taken, as in transformers;
    tokens: how many counted in each. Source: Switch Transformer, arXiv 2101.03961, eq. 4 to 6.
    """
    total = jnp.maximum(tokens * sums.probs.shape[0], 1)
    share, prob = jnp.sum(sums.counts, 0) / total, jnp.sum(sums.probs, 0) / total
    return sums.probs.shape[-1] * jnp.sum(share * prob)
