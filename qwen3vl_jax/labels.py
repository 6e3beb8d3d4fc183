"""Labels of tokens, and their log-probabilities. Dims as in model/layers.py."""

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import IGNORE_INDEX


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
