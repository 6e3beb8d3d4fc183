"""Our side of a comparison: parameters from released weights, and jitted public functions."""

import jax
import jax.numpy as jnp
import numpy as np

import qwen3vl_jax as q3
from qwen3vl_jax.checkpoint import name_map

forward = jax.jit(q3.forward, static_argnames=("cfg", "logits_to_keep"))
vision_encode = jax.jit(q3.vision_encode, static_argnames="cfg")
prefill = jax.jit(q3.prefill, static_argnames=("cfg", "max_len"))
extend = jax.jit(q3.extend, static_argnames="cfg", donate_argnames="cache")
decode_step = jax.jit(q3.decode_step, static_argnames="cfg", donate_argnames="cache")


def build(ref, dtype=jnp.float32):
    """(params, cfg) of a reference or golden model (anything with .config and .weights)."""
    cfg = q3.Config.from_hf(ref.config)
    params = name_map.from_hf(cfg, ref.weights)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params), cfg


def worst(got, want) -> float:
    """The largest difference, relative to the reference's largest magnitude."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max())


def greedy(params, cfg, batch, steps: int, slots: int = 256):
    """Greedy tokens [B steps] and the logits [B steps V] they came from, by prefill and decode_step."""
    cache, logits = prefill(params, cfg, batch, slots)
    tokens, chosen = [], []
    for step in range(steps):
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        tokens.append(token)
        chosen.append(logits)
        if step + 1 < steps:
            cache, logits = decode_step(params, cfg, cache, token)
    return np.stack(tokens, 1), np.stack(chosen, 1)
