"""The sparse MLP: router and experts. Dims as in layers.py; n tokens, A experts chosen by each."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.layers import ACTIVATIONS, linear_fp32, weight
from qwen3vl_jax.lora import each_expert, kept_share, split, times
from qwen3vl_jax.quantized import factored
from qwen3vl_jax.sharding import platform


class Routed(NamedTuple):
    """How a router chose, for n tokens."""

    probs: jax.Array  # [n E] fp32, over all experts
    chosen: jax.Array  # [n A]


class Experts(nn.Module):
    """Top-A of E SwiGLU experts, dropless: [B T D] -> ([B T D], how the router chose).

    Weights keep the released layout: gate_up [E D 2M] (gate columns, then up), down [E M D].
    """

    cfg: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routed]:
        c = self.cfg
        e, d, m = (c.num_experts, "expert"), (c.hidden_size, "embed"), c.moe_intermediate_size
        router = weight(self, "router", (c.num_experts, None), d)
        gate_up = weight(self, "gate_up", e, d, (2 * m, "expert_mlp"))
        down = weight(self, "down", e, (m, "expert_mlp"), d)
        flat = x.reshape(-1, x.shape[-1])
        share, routed = route(flat, router, c.num_experts_per_tok)
        run = experts_scan if platform() == "cpu" else experts_ragged
        out = run(flat, share, routed.chosen, gate_up, down, c.hidden_act)
        return out.reshape(x.shape), routed


def route(x: jax.Array, router: jax.Array, per_token: int) -> tuple[jax.Array, Routed]:
    """x [n D] -> shares [n A] of the chosen experts, which sum to 1 in the dtype of x, and the choice.

    Softmax over all experts in fp32, then the top A renormalised (always: the reference ignores
    norm_topk_prob).
    """
    logits = linear_fp32(x, router).astype(x.dtype).astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    share, chosen = jax.lax.top_k(probs, per_token)
    share = (share / jnp.sum(share, -1, keepdims=True)).astype(x.dtype)
    return share, Routed(probs, chosen)


def _swiglu(gate_up: jax.Array, act: str) -> jax.Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return ACTIVATIONS[act](gate) * up


def experts_ragged(x, share, chosen, gate_up, down, act: str) -> jax.Array:
    """Tokens sorted by expert, two grouped matrix products, each result weighted and added back."""
    n, per_token = chosen.shape
    order = jnp.argsort(chosen.reshape(-1))
    token = order // per_token
    expert = chosen.reshape(-1)[order]
    sizes = jnp.bincount(expert, length=gate_up.shape[0]).astype(jnp.int32)

    def product(x, w):
        base, pair = split(w)
        values, factor = factored(base, x.dtype, (1,))
        y = ragged_dot(x, values, sizes).astype(jnp.float32)
        y = y if factor is None else y * factor[expert]
        if pair is None:
            return y
        kept = kept_share(pair, (n, x.shape[1]), x.dtype)
        x = x if kept is None else x * kept[token]
        low = ragged_dot(x, pair.a.swapaxes(1, 2).astype(x.dtype), sizes).astype(x.dtype)
        more = ragged_dot(low, pair.b.swapaxes(1, 2).astype(x.dtype), sizes)
        return y + more.astype(jnp.float32) * pair.scale

    hidden = _swiglu(product(x[token], gate_up).astype(x.dtype), act)
    out = product(hidden, down) * share.reshape(-1)[order].astype(jnp.float32)[:, None]
    return jnp.zeros((n, x.shape[1]), jnp.float32).at[token].add(out).astype(x.dtype)


def experts_scan(x, share, chosen, gate_up, down, act: str) -> jax.Array:
    """One expert after another over all tokens, experts nobody chose skipped: XLA:CPU's fast form.

    jax.lax.ragged_dot runs every group densely there.
    """
    n, count = x.shape[0], gate_up.shape[0]
    table = jnp.zeros((n, count), jnp.float32)
    table = table.at[jnp.arange(n)[:, None], chosen].add(share.astype(jnp.float32))

    kept = [kept_share(pair, (n, w.shape[1]), x.dtype) for w, pair in map(split, (gate_up, down))]

    def product(x, w, kept):
        base, pair = split(w)
        values, factor = factored(base, x.dtype, (0,))
        y = jnp.dot(x, values, preferred_element_type=jnp.float32)
        y = y if factor is None else y * factor
        return y if pair is None else y + times(x if kept is None else x * kept, pair)

    def run(total, up_e, down_e, share_e):
        hidden = _swiglu(product(x, up_e, kept[0]).astype(x.dtype), act)
        return total + product(hidden, down_e, kept[1]) * share_e[:, None]

    def body(total, xs):
        return jax.lax.cond(jnp.any(xs[2] != 0), run, lambda t, *_: t, total, *xs), None

    total = jnp.zeros((n, x.shape[1]), jnp.float32)
    xs = (each_expert(gate_up), each_expert(down), table.T)
    return jax.lax.scan(body, total, xs)[0].astype(x.dtype)


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [n in] in runs of `sizes` [E], run e times w[e] [in out]. On a GPU by tokamax if installed.

    XLA runs jax.lax.ragged_dot densely on a GPU; tokamax has a grouped kernel. On a TPU XLA makes a
    grouped kernel of it itself, with tiles of its own choice for any shape. JAX's megablox takes tiles
    (which a float32 product overflows), compiles 2 to 4 times as long, and saves one transposed copy
    of `w` in the backward pass.
    """
    if platform() == "gpu" and (tokamax := _tokamax()) is not None:
        return tokamax.ragged_dot(x, w, sizes)
    return jax.lax.ragged_dot(x, w, sizes)


def _tokamax():
    try:
        import tokamax  # the extra `cuda` brings it
    except ImportError:
        return None
    return tokamax
