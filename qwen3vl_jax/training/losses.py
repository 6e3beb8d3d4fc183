"""Losses: the plain one, cross entropy with a chunked vocabulary, z-loss, the router's balance loss.

train_step.py shifts the labels and sums the losses of a run; `loss_fn` is q3's, for a loop of one's own.
Dims as in model/layers.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.labels import label_logprobs, shift_labels
from qwen3vl_jax.model import attention, layers, moe, sharding, transformer
from qwen3vl_jax.model.lora import Adapted
from qwen3vl_jax.model.quantized import Quantized, Weight
from qwen3vl_jax.model.structs import Batch, Features, Params, check_call


class TokenSums(NamedTuple):
    """Sums over tokens whose label is not IGNORE_INDEX."""

    loss: jax.Array  # weighted cross entropy
    z: jax.Array  # weighted logsumexp^2: PaLM's z-loss, arXiv 2204.02311
    tokens: jax.Array  # int32, number of tokens
    correct: jax.Array  # int32, tokens whose label has the largest logit


def loss_fn(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token cross entropy in fp32, the mean over labels [B T] that are not -100.

    As in transformers, the logits of token t predict the label of token t + 1. Where all labels are
    -100 the loss is 0 with zero gradients; transformers gives nan. Metrics: loss, tokens (labels
    counted), correct (labels that are the argmax). Raises InputError for a batch without labels.
    """
    check_call(params, cfg, batch=batch)
    if batch.labels is None:
        raise InputError("loss_fn: the batch has no labels; make_batch takes labels=")
    logits = transformer.forward(params, cfg, batch, features=features)
    labels = shift_labels(batch.labels)
    counted, tokens = labels != IGNORE_INDEX, jnp.sum(labels != IGNORE_INDEX)
    loss = -jnp.sum(label_logprobs(logits, labels)[0]) / jnp.maximum(tokens, 1)
    correct = jnp.sum(counted & (jnp.argmax(logits, axis=-1) == labels))
    return loss, {"loss": loss, "tokens": tokens, "correct": correct}


def chunked_cross_entropy(
    x: jax.Array, table: Weight | Adapted, labels: jax.Array, weights: jax.Array, chunk: int
) -> TokenSums:
    """The sums of the lm_head's logits, of which those of `chunk` words are held at a time.

    x [.. D] after the final norm, table [V D], labels [..] already shifted, weights [..] without a
    gradient. The vocabulary is chunked, not the tokens: an online softmax over words is exact, and each
    row of the table gets its gradient once, in place; chunks of tokens would each add a whole table.
    The backward pass computes the logits again. There is no forward mode; `loss_fn` has it.
    Source: the online softmax of arXiv 1805.02867.
    """
    # Chunks are cut out of V, so V is gathered.
    table = sharding.shard(table, None, "embed") if isinstance(table, jax.Array) else table
    return _chunked_sums(min(chunk, table.shape[0]), x, table, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sums(chunk, x, table, labels, weights) -> TokenSums:
    return _chunked_forward(chunk, x, table, labels, weights)[0]


def _chunked_forward(chunk, x, table, labels, weights) -> tuple[TokenSums, tuple[Any, ...]]:
    """The sums by an online softmax, and what the backward pass needs."""

    def body(carry, j):
        top, best, total, picked = carry
        start, words = _chunk_words(chunk, table.shape[0], j)
        logits = layers.linear_fp32(x, _slice_vocab(table, start, chunk))
        logits = jnp.where(words >= 0, logits, attention.NEG)
        high = jnp.max(logits, -1)
        new_top = jnp.maximum(top, high)
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[..., None]), -1)
        best = jnp.where(high > top, words[jnp.argmax(logits, -1)], best)
        hit = jnp.where(words == labels[..., None], logits, 0.0)
        return (new_top, best, total, picked + jnp.sum(hit, -1)), None

    zero = jnp.zeros_like(labels, jnp.float32)
    start = (jnp.full_like(zero, attention.NEG), jnp.zeros_like(labels), zero, zero)
    chunks = jnp.arange(-(-table.shape[0] // chunk))
    top, best, total, picked = jax.lax.scan(body, start, chunks)[0]
    logsumexp, counted = top + jnp.log(total), labels != IGNORE_INDEX
    kept = jnp.where(counted, weights, 0.0)
    loss, z = jnp.sum(kept * (logsumexp - picked)), jnp.sum(kept * logsumexp**2)
    sums = TokenSums(loss, z, jnp.sum(counted), jnp.sum(counted & (best == labels)))
    return sums, (x, table, labels, weights, logsumexp)


def _chunk_words(chunk: int, vocab: int, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first word, words [chunk]) of chunk j. The last overlaps the one before: those words are -1."""
    start = jnp.minimum(j * chunk, vocab - chunk)
    words = start + jnp.arange(chunk)
    return start, jnp.where(words >= j * chunk, words, -1)


def _slice_vocab(table: Any, start: jax.Array, size: int) -> Any:
    """Words start .. start + size - 1 of an lm_head [V D], however it is held."""
    slice_words = jax.lax.dynamic_slice_in_dim
    cut = functools.partial(slice_words, start_index=start, slice_size=size)
    if isinstance(table, Adapted):
        pairs = {name: pair.replace(b=cut(pair.b)) for name, pair in table.pairs.items()}
        return table.replace(base=_slice_vocab(table.base, start, size), pairs=pairs)
    if isinstance(table, Quantized):
        scale = table.scale if table.scale.shape[0] == 1 else cut(table.scale)
        return table.replace(values=cut(table.values), scale=scale)
    return cut(table)


def _chunked_backward(chunk, saved, gradients):
    """Gradients of x and of the table's float leaves; jit drops those of a frozen table."""
    x, table, labels, weights, logsumexp = saved
    d_loss, d_z, *_ = gradients
    weights = jnp.where(labels != IGNORE_INDEX, weights, 0.0)
    scale = (weights * (d_loss + 2 * d_z * logsumexp))[..., None]

    def body(carry, j):
        d_x, d_table = carry
        start, words = _chunk_words(chunk, table.shape[0], j)
        logits, pull = jax.vjp(layers.linear_fp32, x, _slice_vocab(table, start, chunk))
        d_logits = jnp.exp(logits - logsumexp[..., None]) * scale
        d_logits -= jnp.where(words == labels[..., None], (weights * d_loss)[..., None], 0.0)
        more_x, more = pull(jnp.where(words >= 0, d_logits, 0.0))

        def add(total: jax.Array | None, more: jax.Array) -> jax.Array | None:
            # In place; leaves that have no axis V are added whole, and integers have no gradient.
            if total is None or total.shape == more.shape:
                return total if total is None else total + more
            old = jax.lax.dynamic_slice_in_dim(total, start, len(more))
            return jax.lax.dynamic_update_slice_in_dim(total, old + more, start, 0)

        d_table = jax.tree.map(add, d_table, more, is_leaf=lambda leaf: leaf is None)
        return (d_x + more_x.astype(jnp.float32), d_table), None

    floats = jax.tree.map(lambda y: y if jnp.issubdtype(y.dtype, jnp.inexact) else None, table)
    start = jnp.zeros(x.shape, jnp.float32), jax.tree.map(jnp.zeros_like, floats)
    (d_x, d_table), _ = jax.lax.scan(body, start, jnp.arange(-(-table.shape[0] // chunk)))
    return d_x.astype(x.dtype), d_table, None, None


_chunked_sums.defvjp(_chunked_forward, _chunked_backward)


class RouterSums(NamedTuple):
    """Sums of one MoE layer's RouterOutput over tokens that are not padding."""

    counts: jax.Array  # [A E] fp32: tokens whose choice a is expert e
    probs: jax.Array  # [E] fp32: sum of the probabilities


def router_sums(routed: moe.RouterOutput, mask: jax.Array) -> RouterSums:
    """The sums of one layer; mask [..] is true where a token counts."""
    counted, lead = mask[..., None].astype(jnp.float32), tuple(range(mask.ndim))
    hits = jax.nn.one_hot(routed.expert_index, routed.probs.shape[-1], dtype=jnp.float32)
    counts = jnp.sum(hits * counted[..., None], lead)
    return RouterSums(counts, jnp.sum(routed.probs * counted, lead))


def balance_loss(sums: RouterSums, tokens: jax.Array) -> jax.Array:
    """E times the sum over choices and experts of (fraction of tokens) x (mean probability).

    sums have a leading axis of layers; the means are over all of them, as in transformers. tokens:
    how many counted in each layer. Source: Switch Transformer, arXiv 2101.03961, eq. 4 to 6.
    """
    total = jnp.maximum(tokens * sums.probs.shape[0], 1)
    fraction, prob = jnp.sum(sums.counts, 0) / total, jnp.sum(sums.probs, 0) / total
    return sums.probs.shape[-1] * jnp.sum(fraction * prob)
