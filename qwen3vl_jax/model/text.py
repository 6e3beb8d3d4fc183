"""The decoder: attention with q/k norm and GQA, SwiGLU, the Block, and the run over its layers.

Dims as in layers.py. A Block does not know about masks or caches: it is given `mix(q, k, v)`, which
returns what attention mixes and anything the caller wants to keep (a cache, probabilities, nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.model.layers import (
    ACTIVATIONS,
    apply,
    linear,
    ones,
    rms_norm,
    run_layers,
    weight,
    zeros,
)
from qwen3vl_jax.model.moe import Experts
from qwen3vl_jax.model.rope import mrope, rotate
from qwen3vl_jax.model.sharding import shard

Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rows_of(x: jax.Array) -> str:
    """The logical axis of the rows of x [B T ..] inside a layer: a decode step's are few."""
    return "rows" if x.shape[1] > 1 else "step_rows"


def _streamed(y: jax.Array) -> jax.Array:
    """What a layer adds to the stream [B T D], laid out as it is."""
    if y.shape[1] == 1:  # first as the weight is cut that it comes from
        return shard(shard(y, "step_rows", None, "step_embed"), "step_rows", None, None)
    return shard(y, "rows", "stream", None)


class Attention(nn.Module):
    """Grouped-query attention, RMSNorm on each head of q and k before the rotary embedding.

    q, k and v are one weight [K G+2 H D]: for each key/value head its G query heads, its key, its
    value. The MLP's gate and up are one too: benchmarks/fused.py measures what that saves.
    """

    cfg: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array, rotary, mix: Mix) -> tuple[jax.Array, Any]:
        c = self.cfg
        d, h = (c.hidden_size, "embed"), (c.head_dim, None)
        n, k = (c.num_attention_heads, "heads"), (c.num_key_value_heads, "kv_heads")
        group = c.num_attention_heads // c.num_key_value_heads
        fused = (k, (group + 2, None), h)
        bias = weight(self, "qkv_bias", *fused, init=zeros) if c.attention_bias else None
        qkv = linear(x, weight(self, "qkv", *fused, d), bias)  # [B T K G+2 H]
        qkv = shard(qkv, rows_of(x), "tokens", "kv_heads", None, None)
        query = qkv[..., :group, :].reshape(*x.shape[:2], c.num_attention_heads, c.head_dim)
        key, value = qkv[..., group, :], qkv[..., group + 1, :]

        def turn(name: str, y: jax.Array) -> jax.Array:
            return rotate(rms_norm(y, weight(self, name, h, init=ones), c.rms_norm_eps), *rotary)

        out, kept = mix(turn("q_norm", query), turn("k_norm", key), value)
        out = shard(out, rows_of(x), "tokens", "heads", None)
        bias = weight(self, "o_bias", d, init=zeros) if c.attention_bias else None
        return linear(out, weight(self, "o", d, n, h), bias, in_dims=2), kept


class Mlp(nn.Module):
    """SwiGLU: down(act(gate x) * up x)."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = (self.cfg.hidden_size, "embed"), (self.cfg.intermediate_size, "mlp")
        gate_up = linear(x, weight(self, "gate_up", (2, None), f, d))
        gate_up = shard(gate_up, rows_of(x), "tokens", None, "mlp")
        hidden = ACTIVATIONS[self.cfg.hidden_act](gate_up[..., 0, :]) * gate_up[..., 1, :]
        return linear(hidden, weight(self, "down", d, f))


class Block(nn.Module):
    """One decoder layer, pre-norm, dense or sparse: x [B T D] -> ([B T D], kept by mix, how it routed)."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array, rotary, mix: Mix) -> tuple[jax.Array, Any, Any]:
        def norm(name: str, y: jax.Array) -> jax.Array:
            scale = weight(self, name, (self.cfg.hidden_size, None), init=ones)
            return rms_norm(y, scale, self.cfg.rms_norm_eps)

        def whole(y: jax.Array) -> jax.Array:
            return shard(y, rows_of(y), "tokens", None)

        y, kept = Attention(self.cfg, name="attn")(whole(norm("ln1", x)), rotary, mix)
        x = x + _streamed(y)
        if self.cfg.num_experts:
            y, routed = Experts(self.cfg, name="mlp")(norm("ln2", x))
            return x + _streamed(y), kept, routed
        y = Mlp(self.cfg, name="mlp")(whole(norm("ln2", x)))
        return x + _streamed(y), kept, None


def decode_layers(
    layers,
    cfg: TextConfig,
    x,
    positions,
    mix,
    deepstack=None,
    keep=None,
    remat="none",
    longest=None,
):
    """Runs the decoder: x [B T D], positions [3 B T] -> (x before the final norm, what each layer kept).

    `mix(i, q, k, v)` attends in layer i. `deepstack` [n B T D] is added after layers 0 .. n-1, to the
    whole residual stream (zero rows where there is no vision). `keep(x, kept, routed)` picks what is
    returned in place of what mix kept; routed is how a sparse layer's router chose (moe.RouterOutput).
    longest: as in `mrope`.
    """
    rotary = mrope(cfg, positions, x.dtype, longest)

    def body(x, layer, i):
        x, kept, routed = apply(Block(cfg), layer, x, rotary, lambda *qkv: mix(i, *qkv))
        if deepstack is not None:
            x = x + jnp.take(deepstack, i, axis=0, mode="fill", fill_value=0)
        return x, kept if keep is None else keep(x, kept, routed)

    return run_layers(body, x, layers, remat)
