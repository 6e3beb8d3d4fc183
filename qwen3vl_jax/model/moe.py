"""The sparse MLP: router, experts, and their exchange of tokens. Dims as in layers.py.

n tokens, A experts chosen by each, e experts of a device.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.model.expert_parallel import ExpertParallel
from qwen3vl_jax.model.layers import ACTIVATIONS, linear_fp32, weight
from qwen3vl_jax.model.lora import (
    dropout_mask,
    each_expert,
    lora_product,
    split,
)
from qwen3vl_jax.model.quantized import scaled_matmul_parts
from qwen3vl_jax.model.sharding import platform

# Times an even router's share of tokens: what a device's experts take in their first pass.
CAPACITY_FACTOR = 1.5


class RouterOutput(NamedTuple):
    """How a router chose."""

    probs: jax.Array  # [B T E] fp32, over all experts
    expert_index: jax.Array  # [B T A]


class Experts(nn.Module):
    """Top-A of E SwiGLU experts, dropless: [B T D] -> ([B T D], how the router chose).

    Weights keep the released layout: gate_up [E D 2M] (gate columns, then up), down [E M D].
    """

    cfg: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, RouterOutput]:
        c = self.cfg
        e, d, m = (c.num_experts, "expert"), (c.hidden_size, "embed"), c.moe_intermediate_size
        router = weight(self, "router", (c.num_experts, None), (c.hidden_size, "router_embed"))
        gate_up = weight(self, "gate_up", e, d, (2 * m, "expert_mlp"))
        down = weight(self, "down", e, (m, "expert_mlp"), d)
        share, routed = route(x, router, c.num_experts_per_tok)
        return moe_apply(x, share, routed.expert_index, gate_up, down, c.hidden_act), routed


def route(x: jax.Array, router: jax.Array, per_token: int) -> tuple[jax.Array, RouterOutput]:
    """x [.. D] -> shares [.. A] of the chosen experts, which sum to 1 in the dtype of x, and the choice.

    Softmax over all experts in fp32, then the top A renormalised (always: the reference ignores
    norm_topk_prob).
    """
    logits = linear_fp32(x, router).astype(x.dtype).astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    share, chosen = jax.lax.top_k(probs, per_token)
    share = (share / jnp.sum(share, -1, keepdims=True)).astype(x.dtype)
    return share, RouterOutput(probs, chosen)


def moe_apply(x, share, chosen, gate_up, down, act: str) -> jax.Array:
    """Every token through its experts, wherever they are: [B T D] -> [B T D].

    Devices that share a set of experts between them gather each other's tokens, run their own experts
    on all of those, and each gets back the sum of what the others made of its tokens (all-gather and
    reduce-scatter: for A experts a token and up to A devices no more bytes than an all-to-all, and
    of a size that no router changes).
    """
    kept = _dropped(x.shape[:2], x.dtype, gate_up, down)
    weights = each_expert(gate_up), each_expert(down)
    exchange = ExpertParallel.of(x.shape, *weights)
    run = experts_scan if platform() == "cpu" else experts_ragged

    def here(tokens, weights):
        shape = tokens[0].shape
        x, share, chosen, kept = exchange.gather(tokens)
        gate_up, down = exchange.whole(weights, x.dtype)
        chosen = chosen - exchange.first()
        parts = 1 if exchange.partial else exchange.count
        out = run(x, share, chosen, gate_up, down, act, kept, parts, exchange.summed)
        return exchange.scatter(out.astype(x.dtype)).reshape(shape)

    return exchange.on_shards(here, (x, share, chosen, kept), weights)


def _dropped(lead: tuple[int, ...], dtype: Any, *weights: Any) -> list[jax.Array | None]:
    """What dropout leaves of the inputs of each weight's pair [*lead in], None without dropout."""
    pairs = ((w, split(w)[1]) for w in weights)
    return [dropout_mask(pair, (*lead, w.shape[1]), dtype) for w, pair in pairs]


def _swiglu(gate_up: jax.Array, act: str) -> jax.Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return ACTIVATIONS[act](gate) * up


def experts_ragged(x, share, chosen, gate_up, down, act: str, kept=None, parts=1, summed=None):
    """Tokens sorted by expert, two grouped matrix products, each result weighted and added back.

    x [n D], share and chosen [n A]; an index outside 0 .. e-1 is no expert of this device, which
    has one of `parts` sets of experts. kept: see `_dropped`, made here where it is not given. What
    goes beyond the room of the first pass is done in further passes, which an even router never
    sees, and whose memory is that of one. summed: makes a product over D whole, where x and weights are
    one part of D. Returns [n D] in fp32.
    """
    summed = summed or (lambda y: y)
    kept = _dropped(x.shape[:1], x.dtype, gate_up, down) if kept is None else kept
    gate_up, down = each_expert(gate_up), each_expert(down)
    (n, per_token), count = chosen.shape, gate_up.shape[0]
    mine = (chosen >= 0) & (chosen < count)
    expert = jnp.where(mine, chosen, count).reshape(-1)
    total = n * per_token
    room = min(total, math.ceil(CAPACITY_FACTOR * total / parts))
    passes = math.ceil(total / room)
    order = jnp.pad(jnp.argsort(expert), (0, passes * room - total))
    ends = jnp.cumsum(jnp.bincount(expert, length=count))

    def run(start):
        """What the chosen pairs start .. start + room - 1 add."""
        pair = jax.lax.dynamic_slice_in_dim(order, start, room)
        here = (start + jnp.arange(room) < ends[-1])[:, None]
        edges = jnp.clip(jnp.pad(ends, (1, 0)), start, start + room)
        rows = _Rows(pair // per_token, expert[pair], jnp.diff(edges).astype(jnp.int32), here)
        wide = summed(rows.times(x[rows.token], gate_up, kept[0]))
        hidden = _swiglu(wide.astype(x.dtype), act)
        out = rows.times(hidden, down, kept[1])
        out *= share.reshape(-1)[pair].astype(jnp.float32)[:, None]
        return jnp.zeros(x.shape, jnp.float32).at[rows.token].add(jnp.where(here, out, 0))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def further(total, start):
        return jax.lax.cond(start < ends[-1], lambda t: t + run(start), lambda t: t, total), None

    out = run(0)
    if passes == 1:
        return out
    starts = room * jnp.arange(1, passes)
    rest = lambda out: jax.lax.scan(further, out, starts)[0]  # noqa: E731
    return jax.lax.cond(ends[-1] > room, rest, lambda out: out, out)


class _Rows(NamedTuple):
    """Rows sorted by expert: of which token and expert each is, and how many each expert has."""

    token: jax.Array
    expert: jax.Array
    sizes: jax.Array  # [e]
    here: jax.Array  # [rows 1]: false behind the last

    def times(self, x: jax.Array, w: Any, kept: jax.Array | None) -> jax.Array:
        """Each row of x with its expert's matrix, in fp32."""
        base, pair = split(w)
        x = jnp.where(
            self.here, x, 0
        )  # else what a kernel leaves behind the last row has a gradient
        values, factor = scaled_matmul_parts(base, x.dtype, (1,))
        y = ragged_dot(x, values, self.sizes).astype(jnp.float32)
        y = y if factor is None else y * factor[self.expert]
        if pair is None:
            return y
        x = x if kept is None else x * kept[self.token]
        low = ragged_dot(x, pair.a.swapaxes(1, 2).astype(x.dtype), self.sizes).astype(x.dtype)
        more = ragged_dot(low, pair.b.swapaxes(1, 2).astype(x.dtype), self.sizes)
        return y + more.astype(jnp.float32) * pair.scale[self.expert][:, None]


def experts_scan(x, share, chosen, gate_up, down, act: str, kept=None, parts=1, summed=None):
    """`experts_ragged`, one expert after another over all tokens, experts nobody chose skipped.

    XLA:CPU's fast form: jax.lax.ragged_dot runs every group densely there.
    """
    summed = summed or (lambda y: y)
    kept = _dropped(x.shape[:1], x.dtype, gate_up, down) if kept is None else kept
    gate_up, down = each_expert(gate_up), each_expert(down)
    n, count = x.shape[0], gate_up.shape[0]
    column = jnp.where((chosen >= 0) & (chosen < count), chosen, count)
    table = jnp.zeros((n, count + 1), jnp.float32)
    table = table.at[jnp.arange(n)[:, None], column].add(share.astype(jnp.float32))[:, :count]

    def product(x, w, kept):
        base, pair = split(w)
        values, factor = scaled_matmul_parts(base, x.dtype, (0,))
        y = jnp.dot(x, values, preferred_element_type=jnp.float32)
        y = y if factor is None else y * factor
        return y if pair is None else y + lora_product(x if kept is None else x * kept, pair)

    def run(total, up_e, down_e, share_e):
        hidden = _swiglu(summed(product(x, up_e, kept[0])).astype(x.dtype), act)
        return total + product(hidden, down_e, kept[1]) * share_e[:, None]

    def body(total, xs):
        return jax.lax.cond(jnp.any(xs[2] != 0), run, lambda t, *_: t, total, *xs), None

    total = jnp.zeros((n, x.shape[1]), jnp.float32)
    return jax.lax.scan(body, total, (gate_up, down, table.T))[0]


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [n in] in runs of `sizes` [E], run e times w[e] [in out]. On a GPU by tokamax if installed.

    XLA runs jax.lax.ragged_dot densely on a GPU; tokamax has a grouped kernel. On a TPU XLA makes a
    grouped kernel of it itself, with tiles of its own choice for any shape. JAX's megablox takes tiles
    (which a float32 product overflows), compiles 2 to 7 times as long, and saves one transposed copy
    of `w` in the backward pass.
    """
    if platform() == "gpu" and (tokamax := _tokamax()) is not None:
        return _shared(tokamax.ragged_dot, x, w, sizes)
    return jax.lax.ragged_dot(x, w, sizes)


@functools.partial(jax.jit, static_argnames="kernel")
def _shared(kernel, x, w, sizes):
    """One function of a program for all layers: a kernel takes a second or two to be lowered."""
    return kernel(x, w, sizes)


def _tokamax():
    try:
        import tokamax  # the extra `moe` brings it
    except ImportError:
        return None
    return tokamax
