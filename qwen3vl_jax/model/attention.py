"""attend(): every attention of both towers, on every platform, from two integers per query.

Query i sees keys lo[i] <= s < hi[i]. That covers causal masks, padding, packed segments, the frames
of the ViT and a filled cache, so no [T S] mask exists anywhere. Dims as in layers.py.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.model import attention_gpu
from qwen3vl_jax.model.attention_gpu import gpu_refusal
from qwen3vl_jax.model.sharding import max_parts, mesh_axes_for, on_shards, platform, spec

BLOCK = 256
# Keys per block of a decode step on a CPU: they stay in its cache.
DECODE_BLOCK = 64
NEG = -1e30
_slice = jax.lax.dynamic_slice_in_dim
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
# What is known of a sequence when the program is traced. "frames": segments with full attention.
# "causal": with causal attention. "prompt": one causal segment at the start. "any": lo and hi alone.
Layout = Literal["frames", "causal", "prompt", "any"]


def causal_ranges(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(lo, hi) [B T] int32 of causal attention inside each segment; padding (id 0) sees nothing.

    segment_ids [B T] = 0 1 1 1 2 2 gives lo = 0 1 1 1 4 4 and hi = 0 2 3 4 5 6.
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    first = (segment_ids != jnp.roll(segment_ids, 1, axis=1)).at[:, 0].set(True)
    lo = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return lo, jnp.where(segment_ids > 0, index + 1, lo)


class Dropout(NamedTuple):
    """Dropout of attention probabilities in training."""

    key: jax.Array
    rate: float

    def fold_in(self, i) -> "Dropout":
        return Dropout(jax.random.fold_in(self.key, i), self.rate)


def attend(
    q, k, v, lo, hi, dropout: Dropout | None = None, layout: Layout = "any", segments: int = 0
) -> jax.Array:
    """Softmax attention of q [B T N H] over k, v [B S K H] with scale H^-0.5: [B T N H].

    lo, hi [B T] int32: query i sees keys lo <= s < hi; an empty range gives zeros (in a "prompt", anything
    finite). Scores and softmax are fp32. If lo is given and T = S, q and k are one sequence. lo None means
    0: the queries are consecutive tokens after a filled cache. dropout: of the probabilities, on the XLA
    path. layout: what a sequence holds; a GPU kernel serves all but "any", where T = S. segments (static):
    most segments of a sequence, for frames `host_bound`, 0 if unknown; more may give NaN. On a mesh each
    device has its sequences, heads and queries, and all keys of those: lo and hi are absolute.
    """
    # XLA shards the random bits of dropout so that they are those of one device.
    if dropout is not None:
        return _attend_blocks(q, k, v, lo, hi, dropout)
    run = functools.partial(_attend, layout, segments)
    batch, tokens = ("vision_batch", "patches") if layout == "frames" else ("batch", "tokens")
    copies = head_copies(q.shape[2], k.shape[2])
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
    where = mesh_axes_for((batch, q.shape[0]), (tokens, q.shape[1]), ("heads", k.shape[2]))
    queries = spec((batch, tokens, "heads", None), where)
    keys, ranges = spec((batch, None, "heads", None), where), spec((batch, tokens), where)
    in_specs = (queries, keys, keys, ranges, ranges, spec((batch, None), where))
    # A shard of the queries knows only the segments of its own tokens.
    same = q.shape[1] == k.shape[1]
    key_segments = jnp.where(hi > lo, lo + 1, 0) if lo is not None and same else None
    return on_shards(run, in_specs, queries, q, k, v, hi, lo, key_segments)


def host_bound(lo: Any, hi: Any, frames: int) -> int:
    """`segments` of attend() for frames: `frames`, on a TPU `key_blocks`, 0 where lo, hi are no numpy."""
    if platform() != "tpu":
        return frames
    from qwen3vl_jax.model import attention_tpu

    return attention_tpu.key_blocks(lo, hi) if isinstance(lo, np.ndarray) else 0


def head_copies(query_heads: int, kv_heads: int) -> int:
    """Copies of each key/value head that the ambient mesh needs, if it has more parts than heads."""
    parts = max_parts("heads")
    copies = parts // math.gcd(parts, kv_heads)
    return copies if query_heads % (kv_heads * copies) == 0 else 1


def _attend(layout: Layout, segments: int, q, k, v, hi, lo, key_segments) -> jax.Array:
    """`attend` on one device. key_segments [B S]: ids of all keys' segments, for splash."""
    if platform() == "tpu":
        # Pallas for a TPU is imported only where there is one.
        from qwen3vl_jax.model import attention_tpu

        most = segments if layout == "frames" else 0
        if (out := attention_tpu.attend(q, k, v, lo, hi, key_segments, most)) is not None:
            return out
    # cuDNN serves tokens behind a cache, and whole sequences of a known layout.
    whole = layout != "any" and q.shape[1] == k.shape[1]
    served = 1 < q.shape[1] <= k.shape[1] if lo is None else whole
    if served and platform() == "gpu" and not gpu_refusal(q.dtype.name, q.shape[-1]):
        if lo is None:
            return attention_gpu.attend_behind_cache(q, k, v, hi)
        if layout == "prompt":
            return attention_gpu.attend_row(q, k, v)
        if segments:
            return attention_gpu.attend_packed(q, k, v, lo, hi, layout == "causal", segments)
        return attention_gpu.attend_segments(q, k, v, lo, hi, layout == "causal", _attend_blocks)
    return _attend_blocks(q, k, v, lo, hi)


def append_and_attend(k, v, slot, qkv, q_norm, k_norm, rotary, eps) -> Any:
    """`attention_gpu.append_and_attend` where it serves, on a mesh too; else None.

    k, v [B S K H]: the cache, which may have copies of a head. The rest: as in text.split_heads.
    """
    b, _, count, h = k.shape
    if platform() != "gpu" or gpu_refusal(qkv.dtype.name, h, "step"):
        return None
    if (copies := count // qkv.shape[2]) > 1:
        query, pair = jnp.split(qkv, [qkv.shape[3] - 2], axis=3)
        pair = jnp.repeat(pair, copies, axis=2)
        qkv = jnp.concatenate([query.reshape(b, 1, count, -1, h), pair], axis=3)
    where = mesh_axes_for(("batch", b), ("heads", count))
    rows, by_head = spec(("batch",), where), spec(("batch", None, "heads", None), where)
    in_specs = (by_head, spec((), where), spec((), where), rows, rows, by_head, by_head, rows)
    run = functools.partial(attention_gpu.append_and_attend, eps)
    args = qkv, q_norm, k_norm, *rotary, k, v, slot
    out, *written = on_shards(run, in_specs, [by_head] * 3, *args)
    return out, tuple(written)


def group_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B T N H] -> [B K G T H], scaled: query head n uses key head n // G."""
    b, t, n, h = q.shape
    q = (q * jnp.asarray(h**-0.5, q.dtype)).reshape(b, t, kv_heads, n // kv_heads, h)
    return q.transpose(0, 2, 3, 1, 4)


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scores [B K G T S] float32 of grouped queries and keys [B K S H]; a cache on a CPU is fp32."""
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k = q.astype(dtype), k.astype(dtype)
    # XLA copies the keys for a product with queries of two axes, G and T.
    if q.shape[3] == 1:
        return _einsum("bkgh,bksh->bkgs", q[:, :, :, 0], k)[:, :, :, None]
    return _einsum("bkgth,bksh->bkgts", q, k)


def visible_keys(lo: jax.Array, hi: jax.Array, keys: jax.Array) -> jax.Array:
    """Whether a query sees a key, [B 1 1 T S]."""
    return ((keys >= lo[..., None]) & (keys < hi[..., None]))[:, None, None]


def _attend_blocks(q, k, v, lo, hi, drop: Dropout | None = None):
    """Online softmax over key blocks in plain XLA, O(T BLOCK) memory: arXiv 2112.05682, 2205.14135."""
    (b, t, n, h), (slots, heads), dtype = q.shape, k.shape[1:3], q.dtype
    lo = jnp.zeros_like(hi) if lo is None else lo
    grouped = group_heads(q, heads)
    if t == 1 and platform() == "cpu" and slots % DECODE_BLOCK == 0:
        out = _over_filled_blocks(k, v, grouped, lo, hi)
    elif slots <= 2 * BLOCK:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        out = _finish(_fold(_start(grouped), grouped, k, v, lo, hi, 0, drop))
    else:
        pad = ((0, 0), (0, -slots % BLOCK), (0, 0), (0, 0))
        k, v = (jnp.pad(x, pad) if slots % BLOCK else x for x in (k, v))
        out = _each_query_block(functools.partial(_over_key_blocks, k, v), grouped, lo, hi, drop)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(dtype)


def _each_query_block(fn, q, lo, hi, drop):
    t = q.shape[3]
    if t <= BLOCK:
        return fn(q, lo, hi, drop)
    count, pad = -(-t // BLOCK), -t % BLOCK
    # Padding has lo = hi = 0 and sees nothing.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
    q = jnp.moveaxis(q.reshape(*q.shape[:3], count, BLOCK, q.shape[-1]), 3, 0)
    lo, hi = (jnp.pad(x, ((0, 0), (0, pad))) for x in (lo, hi))
    lo, hi = (jnp.moveaxis(x.reshape(-1, count, BLOCK), 1, 0) for x in (lo, hi))

    def run(args):
        q, lo, hi, i = args
        return fn(q, lo, hi, drop and drop.fold_in(i))

    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(run), (q, lo, hi, jnp.arange(count))), 0, 3)
    return out.reshape(*out.shape[:3], count * BLOCK, out.shape[-1])[:, :, :, :t]


def _over_filled_blocks(k, v, q, lo, hi):
    """A decode step over keys [B S K H]: the loop ends at the last filled slot. No gradient."""
    fold = functools.partial(_fold_block, k, v, DECODE_BLOCK, q, lo, hi, None)
    first, last = jnp.min(lo) // DECODE_BLOCK, -(-jnp.max(hi) // DECODE_BLOCK)
    return _finish(jax.lax.fori_loop(first, last, fold, _start(q)))


def _over_key_blocks(k, v, q, lo, hi, drop):
    """All blocks of keys [B S K H]; one outside every range is skipped."""
    fold = functools.partial(_fold_block, k, v, BLOCK, q, lo, hi, drop)

    def body(carry, j):
        seen = jnp.any((lo < (j + 1) * BLOCK) & (hi > j * BLOCK) & (lo < hi))
        return jax.lax.cond(seen, functools.partial(fold, j), lambda c: c, carry), None

    blocks = jnp.arange(k.shape[1] // BLOCK)
    return _finish(jax.lax.scan(jax.checkpoint(body), _start(q), blocks)[0])


def _start(q):
    """Running (maximum, sum, output) of the online softmax."""
    top = jnp.full(q.shape[:-1], NEG, jnp.float32)
    return top, jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32)


def _fold_block(k, v, size, q, lo, hi, drop, j, carry):
    """`_fold` of block j of `size` keys of k, v [B S K H]."""
    keys, values = (_slice(x, j * size, size, 1).swapaxes(1, 2) for x in (k, v))
    return _fold(carry, q, keys, values, lo, hi, j * size, drop and drop.fold_in(j))


def _fold(carry, q, k, v, lo, hi, first_key, drop=None):
    """Adds one block of keys [B K s H] to the running softmax."""
    top, total, out = carry
    visible = visible_keys(lo, hi, first_key + jnp.arange(k.shape[2]))
    scores = jnp.where(visible, attention_scores(q, k), NEG)
    new_top = jnp.maximum(top, jnp.max(scores, -1))
    probs = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
    keep = jnp.exp(top - new_top)
    new_total, weights = total * keep + jnp.sum(probs, -1), probs
    # Dropout acts on the weights of the values, not on the sum that normalises them.
    if drop is not None:
        kept = jax.random.bernoulli(drop.key, 1 - drop.rate, probs.shape)
        weights = jnp.where(kept, probs / (1 - drop.rate), 0.0)
    added = _einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
    return new_top, new_total, out * keep[..., None] + added


def _finish(carry):
    return carry[2] / jnp.where(carry[1] > 0, carry[1], 1.0)[..., None]
