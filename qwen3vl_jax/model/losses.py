"""Labels and the plain next-token loss; training/losses.py has the chunked one. Dims as in layers.py."""

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Batch, Features, Params, check_call
from qwen3vl_jax.model.transformer import forward


def shift_labels(labels: jax.Array, fill: int = IGNORE_INDEX) -> jax.Array:
    """labels [B T] of each token -> of the next token; the last column is `fill`."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=fill)


def label_logprobs(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each label, logsumexp), both [..] fp32; logits [.. V], labels [..].

    The log-probability is 0 where the label is IGNORE_INDEX.
    """
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(labels != IGNORE_INDEX, picked - logsumexp, 0.0), logsumexp


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
    logits, labels = forward(params, cfg, batch, features=features), shift_labels(batch.labels)
    counted, tokens = labels != IGNORE_INDEX, jnp.sum(labels != IGNORE_INDEX)
    loss = -jnp.sum(label_logprobs(logits, labels)[0]) / jnp.maximum(tokens, 1)
    correct = jnp.sum(counted & (jnp.argmax(logits, axis=-1) == labels))
    return loss, {"loss": loss, "tokens": tokens, "correct": correct}
