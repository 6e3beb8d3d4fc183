"""The decoder: attention with q/k norm and GQA, SwiGLU, the Block, DeepStack, the loop over layers.

Dims as in layers.py. A Block knows neither masks nor caches: its caller passes an attend function.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.model.layers import ACTIVATIONS, linear, ones, rms_norm, run_layers, weight, zeros
from qwen3vl_jax.model.moe import Experts, RouterOutput
from qwen3vl_jax.model.rope import Rotary, mrope, rotate
from qwen3vl_jax.model.sharding import shard

# Attention of layer i: (i, q [B T N H], k [B T K H], v [B T K H]) -> (out [B T N H], kept). `kept` is
# what the caller wants of the layer: its cache, its probabilities, or None.
AttendFn = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# What decode_layers returns of each layer: (residual after it, kept, RouterOutput or None) -> output.
CollectFn = Callable[[jax.Array, Any, RouterOutput | None], Any]


def batch_axis(x: jax.Array) -> str:
    """The logical axis of B of x [B T ..] inside a layer; a decode step (T = 1) has its own."""
    return "batch" if x.shape[1] > 1 else "decode_batch"


def shard_residual(y: jax.Array) -> jax.Array:
    """Shards the residual [B T D] between layers, or what a layer adds to it."""
    if y.shape[1] > 1:
        return shard(y, "batch", "residual", None)
    # A decode step: first as the weight is sharded that made y, which keeps its product local.
    return shard(shard(y, "decode_batch", None, "decode_embed"), "decode_batch", None, None)


def split_heads(qkv, q_norm, k_norm, rotary: Rotary, eps: float) -> tuple[jax.Array, ...]:
    """qkv [B T K G+2 H] -> q [B T N H] and k, v [B T K H]; q and k normalized by [H] and rotated."""
    heads, h = qkv.shape[3:]
    # The gradient of a split is one concatenation, that of slices a sum of padded arrays.
    parts = jnp.split(qkv, [heads - 2, heads - 1], axis=3)
    q, k, v = (y.reshape(*qkv.shape[:2], -1, h) for y in parts)
    q, k = (rotate(rms_norm(y, x, eps), *rotary) for y, x in ((q, q_norm), (k, k_norm)))
    return q, k, v


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head of q and k before the rotary embedding.

    q, k and v are one weight [K G+2 H D]: per key/value head its G query heads, its key, its value.
    `attend` takes what `split_heads` does. The MLP's gate and up are one weight too: benchmarks/fused.py.
    """

    cfg: TextConfig

    @nn.compact
    def __call__(self, x, rotary: Rotary, attend: Callable) -> tuple[jax.Array, Any]:
        c = self.cfg
        d, h = (c.hidden_size, "embed"), (c.head_dim, None)
        n, k = (c.num_attention_heads, "heads"), (c.num_key_value_heads, "kv_heads")
        group = c.num_attention_heads // c.num_key_value_heads
        fused = (k, (group + 2, None), h)
        bias = weight(self, "qkv_bias", *fused, init=zeros) if c.attention_bias else None
        qkv = linear(x, weight(self, "qkv", *fused, d), bias)  # [B T K G+2 H]
        qkv = shard(qkv, batch_axis(x), "tokens", "kv_heads", None, None)
        norms = (weight(self, name, h, init=ones) for name in ("q_norm", "k_norm"))
        out, kept = attend(qkv, *norms, rotary, c.rms_norm_eps)
        out = shard(out, batch_axis(x), "tokens", "heads", None)
        bias = weight(self, "o_bias", d, init=zeros) if c.attention_bias else None
        return linear(out, weight(self, "o", d, n, h), bias, in_dims=2), kept


class Mlp(nn.Module):
    """SwiGLU: down(act(gate x) * up x)."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = (self.cfg.hidden_size, "embed"), (self.cfg.intermediate_size, "mlp")
        gate_up = linear(x, weight(self, "gate_up", (2, None), f, d), wide=True)
        gate_up = shard(gate_up, batch_axis(x), "tokens", None, "mlp")
        gate, up = (y[..., 0, :] for y in jnp.split(gate_up, 2, axis=-2))
        return linear(ACTIVATIONS[self.cfg.hidden_act](gate) * up, weight(self, "down", d, f))


class Block(nn.Module):
    """One pre-norm decoder layer, dense or MoE: x [B T D] -> (x, kept, RouterOutput of an MoE layer)."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, x, rotary: Rotary, attend: Callable) -> tuple[jax.Array, Any, Any]:
        def norm(name: str, y: jax.Array) -> jax.Array:
            scale = weight(self, name, (self.cfg.hidden_size, None), init=ones)
            return rms_norm(y, scale, self.cfg.rms_norm_eps)

        def gather_embed(y: jax.Array) -> jax.Array:
            return shard(y, batch_axis(y), "tokens", None)

        y, kept = Attention(self.cfg, name="attn")(gather_embed(norm("ln1", x)), rotary, attend)
        x = x + shard_residual(y)
        if self.cfg.num_experts:
            y, routed = Experts(self.cfg, name="mlp")(norm("ln2", x))
        else:
            y, routed = Mlp(self.cfg, name="mlp")(gather_embed(norm("ln2", x))), None
        return x + shard_residual(y), kept, routed


def decode_layers(
    layers: Any,
    cfg: TextConfig,
    x: jax.Array,
    positions: jax.Array,
    attend_fn: AttendFn,
    *,
    deepstack: jax.Array | None = None,
    collect: CollectFn | None = None,
    intervene: Callable | None = None,
    remat: str = "none",
    longest: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Runs the decoder layers over x [B T D] with MRoPE ids positions [3 B T].

    Returns the residual before the final norm, and `collect`'s output of each layer (by default `kept`).
    deepstack [n B T D], zero where there is no vision, is added after layers 0 .. n-1. intervene: (i, x)
    -> the x that goes on after layer i. remat: of layers.REMAT. longest: as in `mrope`.
    """
    rotary = mrope(cfg, positions, x.dtype, longest)

    def body(x, layer, i):
        def attend(*heads: Any) -> tuple[jax.Array, Any]:
            return attend_fn(i, *split_heads(*heads))

        out: Any = Block(cfg).apply({"params": layer}, x, rotary, attend)
        x, kept, routed = out
        if deepstack is not None:
            x += jnp.take(deepstack, i, axis=0, mode="fill", fill_value=0)
        x = intervene(i, x) if intervene else x
        return x, collect(x, kept, routed) if collect else kept

    return run_layers(body, x, layers, remat)
