"""Training losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model import forward
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
    labels = batch.labels[:, 1:]
    counted = labels != IGNORE
    target = jnp.where(counted, labels, 0)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    nll = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    tokens = jnp.sum(counted)
    loss = jnp.sum(nll) / jnp.maximum(tokens, 1)
    correct = jnp.sum(counted & (jnp.argmax(logits, axis=-1) == target))
    return loss, {"loss": loss, "tokens": tokens, "correct": correct}
