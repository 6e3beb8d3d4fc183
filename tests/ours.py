"""Our side of a comparison: parameters from released weights, and compiled public functions."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import released
import tiny

import qwen3vl_jax as q3

# Not traced, these compile one layer for all; tests of the traced forms say so.
vision_encode, prefill = q3.vision_encode, q3.prefill
extend = jax.jit(q3.extend, static_argnames="cfg", donate_argnames="cache")
decode_step = jax.jit(q3.decode_step, static_argnames="cfg", donate_argnames="cache")


@functools.partial(jax.jit, static_argnames=("cfg", "logits_to_keep"))
def forward(params, cfg, batch, **options):
    """q3.forward by scans over stacked layers: a third of the time to compile."""
    if isinstance(params["layers"], (list, tuple)):
        params = q3.stack_layers(params)
    return q3.forward(params, cfg, batch, **options)


def build(ref, dtype=jnp.float32):
    """(params, cfg) of a reference or golden model (anything with .config and .weights)."""
    cfg = q3.Config.from_hf(ref.config)
    params = released.from_hf(cfg, ref.weights)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params), cfg


@functools.cache
def tiny_model(variant="base", moe=False, rope="default"):
    """(params, cfg) of a model of tests/tiny.py with no reference behind it; not to be donated."""
    config = tiny.config_dict(variant, moe, rope)
    return build(SimpleNamespace(config=config, weights=tiny.weights(config, 0)))


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
