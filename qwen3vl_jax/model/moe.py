"""The mixture-of-experts MLP: router and experts. Dims as in layers.py; n tokens, e local experts."""

import functools
import logging
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.model.expert_parallel import ExpertParallel
from qwen3vl_jax.model.layers import ACTIVATIONS, linear_fp32, weight
from qwen3vl_jax.model.lora import dropout_mask, expert_leaves, lora_product, split
from qwen3vl_jax.model.quantized import matmul_parts
from qwen3vl_jax.model.sharding import platform

# Capacity of a device's first pass over its experts, in multiples of an even router's share.
CAPACITY_FACTOR = 1.5


class RouterOutput(NamedTuple):
    """The router's probabilities and choices."""

    probs: jax.Array  # [B T E] fp32, over all experts
    expert_index: jax.Array  # [B T A]


class Experts(nn.Module):
    """Top-A of E SwiGLU experts, dropless: [B T D] -> ([B T D], RouterOutput).

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
        gates, routed = route(x, router, c.num_experts_per_tok)
        return moe_apply(x, gates, routed.expert_index, gate_up, down, c.hidden_act), routed


def route(x: jax.Array, router: jax.Array, per_token: int) -> tuple[jax.Array, RouterOutput]:
    """x [.. D] -> (gates [.. A] in the dtype of x, RouterOutput).

    Softmax over all E in fp32; the top A are renormalised, as the reference ignores norm_topk_prob.
    """
    logits = linear_fp32(x, router).astype(x.dtype).astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    gates, expert_index = jax.lax.top_k(probs, per_token)
    gates = (gates / jnp.sum(gates, -1, keepdims=True)).astype(x.dtype)
    return gates, RouterOutput(probs, expert_index)


def moe_apply(x, gates, expert_index, gate_up, down, act: str) -> jax.Array:
    """The gated sum of each token's experts, on whatever devices they are: [B T D] -> [B T D].

    gates, expert_index [B T A]. See expert_parallel.py for how tokens cross devices.
    """
    pairs = ((split(w)[1], (*x.shape[:2], w.shape[1])) for w in (gate_up, down))
    masks = [dropout_mask(pair, shape, x.dtype) for pair, shape in pairs]
    weights = expert_leaves(gate_up), expert_leaves(down)
    layout = ExpertParallel.of(x.shape, *weights)
    experts = experts_scan if platform() == "cpu" else experts_ragged
    shards = 1 if layout.partial else layout.shards
    run_experts = functools.partial(experts, act=act, shards=shards, psum=layout.psum_embed)

    def on_device(tokens, weights):
        x, gates, index, masks = layout.all_gather_tokens(tokens)
        gate_up, down = layout.all_gather_weights(weights, x.dtype)
        index = index - layout.first_expert
        out = run_experts(x, gates, index, gate_up, down, masks=masks).astype(x.dtype)
        return layout.reduce_scatter_tokens(out).reshape(tokens[0].shape)

    return layout.on_shards(on_device, (x, gates, expert_index, masks), weights)


def _swiglu(gate_up: jax.Array, act: str) -> jax.Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return ACTIVATIONS[act](gate) * up


def experts_ragged(x, gates, index, gate_up, down, act, *, masks=(None, None), shards=1, psum=None):
    """Tokens sorted by expert, two grouped products, each result gated and added back: [n D] fp32.

    x [n D], gates and expert index [n A]; one outside 0 .. e-1 belongs to another device, which has one of
    `shards` shards of the experts. masks: LoRA's [n in]. psum completes a product over D where x and
    weights hold a slice of D. The first pass takes CAPACITY_FACTOR times an even share of the pairs.
    Overflow passes, which an even router never needs, take the rest.
    """
    (n, per_token), count = index.shape, gate_up.shape[0]
    expert = jnp.where((index >= 0) & (index < count), index, count).reshape(-1)
    pairs = n * per_token
    capacity = min(pairs, math.ceil(CAPACITY_FACTOR * pairs / shards))
    passes = math.ceil(pairs / capacity)
    order = jnp.pad(jnp.argsort(expert), (0, passes * capacity - pairs))
    ends = jnp.cumsum(jnp.bincount(expert, length=count))

    def run_pass(start):
        """The outputs [n D] of sorted pairs start .. start + capacity - 1."""
        pair = jax.lax.dynamic_slice_in_dim(order, start, capacity)
        valid = (start + jnp.arange(capacity) < ends[-1])[:, None]
        edges = jnp.clip(jnp.pad(ends, (1, 0)), start, start + capacity)
        group_sizes = jnp.diff(edges).astype(jnp.int32)
        token = pair // per_token
        product = functools.partial(_grouped_product, token, expert[pair], group_sizes, valid)
        hidden = product(x[token], gate_up, masks[0])
        hidden = _swiglu((psum(hidden) if psum else hidden).astype(x.dtype), act)
        out = product(hidden, down, masks[1])
        out *= gates.reshape(-1)[pair].astype(jnp.float32)[:, None]
        return jnp.zeros(x.shape, jnp.float32).at[token].add(jnp.where(valid, out, 0))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def overflow_pass(out, start):
        return jax.lax.cond(start < ends[-1], lambda y: y + run_pass(start), lambda y: y, out), None

    def overflow(out):
        return jax.lax.scan(overflow_pass, out, capacity * jnp.arange(1, passes))[0]

    out = run_pass(0)
    return out if passes == 1 else jax.lax.cond(ends[-1] > capacity, overflow, lambda y: y, out)


def _grouped_product(token, expert, group_sizes, valid, x, w, mask) -> jax.Array:
    """Each row of x times its expert's matrix, in fp32; the rows after the last pair are not valid."""
    base, pair = split(w)
    # Without zeros, what a kernel leaves after the last row would get a gradient.
    x = jnp.where(valid, x, 0)
    values, scale = matmul_parts(base, x.dtype, (1,))
    y = ragged_dot(x, values, group_sizes).astype(jnp.float32)
    y = y if scale is None else y * scale[expert]
    if pair is None:
        return y
    x = x if mask is None else x * mask[token]
    a, b = (m.swapaxes(1, 2).astype(x.dtype) for m in (pair.a, pair.b))
    low = ragged_dot(x, a, group_sizes).astype(x.dtype)
    delta = ragged_dot(low, b, group_sizes).astype(jnp.float32)
    return y + delta * pair.scale[expert][:, None]


def experts_scan(x, gates, index, gate_up, down, act, *, masks=(None, None), shards=1, psum=None):
    """`experts_ragged` as a scan over experts with all tokens; an expert without tokens is skipped.

    For XLA:CPU, where jax.lax.ragged_dot is dense. shards is not used.
    """
    n, count = x.shape[0], gate_up.shape[0]
    column = jnp.where((index >= 0) & (index < count), index, count)
    table = jnp.zeros((n, count + 1), jnp.float32)
    table = table.at[jnp.arange(n)[:, None], column].add(gates.astype(jnp.float32))[:, :count]

    def product(x, w, mask):
        base, pair = split(w)
        values, scale = matmul_parts(base, x.dtype, (0,))
        y = jnp.dot(x, values, preferred_element_type=jnp.float32)
        y = y if scale is None else y * scale
        return y if pair is None else y + lora_product(x if mask is None else x * mask, pair)

    def run_expert(total, gate_up, down, gate):
        hidden = product(x, gate_up, masks[0])
        hidden = _swiglu((psum(hidden) if psum else hidden).astype(x.dtype), act)
        return total + product(hidden, down, masks[1]) * gate[:, None]

    def body(total, xs):
        return jax.lax.cond(jnp.any(xs[2] != 0), run_expert, lambda t, *_: t, total, *xs), None

    total = jnp.zeros((n, x.shape[1]), jnp.float32)
    return jax.lax.scan(body, total, (gate_up, down, table.T))[0]


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Grouped product of x [n in], in runs of `sizes` [E], with w [E in out]: run e times w[e].

    Rows after the runs must be zeros. On a GPU tokamax's kernel, if installed: XLA runs ragged_dot densely.
    """
    # One expert a device: libtpu compiles no run of one.
    if len(w) == 1:
        return x @ w[0]
    kernel = _tokamax_kernel() if platform() == "gpu" else None
    return (kernel or (ragged_dot_tpu if platform() == "tpu" else jax.lax.ragged_dot))(x, w, sizes)


@functools.cache
def _tokamax_kernel():
    """tokamax's ragged_dot, or None without the extra `moe`. Jitted: all layers share its lowering."""
    try:
        import tokamax
    except ImportError:
        message = "experts run dense on this GPU: qwen3vl-jax[moe] has a grouped kernel"
        logging.getLogger("qwen3vl_jax").warning(message)
        return None
    return jax.jit(tokamax.ragged_dot)


@jax.custom_vjp
def ragged_dot_tpu(x, w, sizes):
    """jax.lax.ragged_dot with a d_w by megablox; XLA's multiplies each row with every expert."""
    return jax.lax.ragged_dot(x, w, sizes)


def _ragged_backward(saved, d_y):
    # Pallas for a TPU is imported only where it is used; elsewhere, in tests, it is interpreted.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, w, sizes = saved
    d_x = jax.lax.ragged_dot(d_y, w.swapaxes(1, 2), sizes)
    rows = min(512, -(-len(x) // 128) * 128)
    wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    x, d_y = (jnp.pad(a.astype(wide), ((0, -len(a) % rows), (0, 0))) for a in (x, d_y))
    # The largest tile that divides a width, of those that fit into VMEM.
    most = 1024 if x.dtype.itemsize <= 2 else 512
    lanes = range(most, 0, -128)
    tiles = (next((t for t in lanes if n % t == 0), min(n, most)) for n in w.shape[1:])
    off_tpu = platform() != "tpu"
    d_w = tgmm(x.swapaxes(0, 1), d_y, sizes, wide, (rows, *tiles), interpret=off_tpu)
    return d_x, d_w.astype(w.dtype), None


ragged_dot_tpu.defvjp(lambda *args: (ragged_dot_tpu(*args), args), _ragged_backward)
