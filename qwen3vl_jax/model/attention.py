"""attend(): every attention of both towers, on every platform, from two integers a query.

Query i sees keys lo[i] <= s < hi[i]. That says causal, padding, packed segments, the frames of the
ViT and a filled cache alike, so no [T S] mask exists anywhere. Dims as in layers.py.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.model import attention_gpu
from qwen3vl_jax.model.attention_gpu import cudnn_refusal
from qwen3vl_jax.model.sharding import (
    max_parts,
    mesh_axes_for,
    mesh_sizes,
    on_shards,
    platform,
)

BLOCK = 512
DECODE_BLOCK = 64  # keys at a time of a decode step on a CPU: they stay in its cache
CUDNN_STEP = 16384  # slots of a cache's rows together from which on cuDNN is the faster decode step
NEG = -1e30
# What a row holds, as far as a caller knows it when the program is traced; kernels are chosen by it.
# "frames": segments that tokens see wholly. "causal": segments that they see up to themselves. "prompt":
# one causal segment, from the first token on. "any": nothing is known but lo and hi.
Layout = Literal["frames", "causal", "prompt", "any"]


def causal_ranges(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row layout -> what each token sees: its own segment, up to itself. Padding (id 0) sees nothing.

    segment_ids [B T] = 0 1 1 1 2 2 gives lo = 0 1 1 1 4 4 and hi = 0 2 3 4 5 6.
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    first = segment_ids != jnp.roll(segment_ids, 1, axis=1)
    first = first.at[:, 0].set(True)
    lo = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return lo, jnp.where(segment_ids > 0, index + 1, lo)


class Dropout(NamedTuple):
    """Which probabilities of attention are dropped in training."""

    key: jax.Array
    rate: float


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lo: jax.Array | None,
    hi: jax.Array,
    dropout: Dropout | None = None,
    names: tuple[str, str] = ("rows", "tokens"),
    layout: Layout = "any",
    segments: int = 0,
) -> jax.Array:
    """Softmax attention of q [B T N H] over k, v [B K S H], scale H^-0.5; returns [B T N H].

    lo, hi [B T] int32: query i sees keys lo <= s < hi; an empty range gives zeros (of a "prompt",
    anything finite). Scores and softmax are fp32. Where lo is given and T = S, q and k are of one row,
    and tokens of one segment have one lo. lo None means 0: the queries are one run of tokens that
    stands behind a filled cache, each sees the cache up to itself.
    layout: what the rows hold, and segments: how many of them a row holds at most (static), 0 where
    that is not known. A GPU kernel serves "any" not at all, the others where T = S.
    dropout is of the probabilities, whose rest is scaled up, on the XLA path of every platform.
    names: logical axes of B and T. On a mesh each device attends with its rows, heads and queries to
    all keys of those rows, which is context parallelism where T is cut: a query's range says where
    it stands.
    """
    if dropout is not None:  # its bits are those of one device when XLA cuts them
        return _attend_blocks(q, k, v, lo, hi, dropout)
    run = functools.partial(_attend, layout, segments)
    if not mesh_sizes():
        return run(q, k, v, hi, lo)
    rows, tokens = names
    more = head_copies(q.shape[2], k.shape[1])
    k, v = (jnp.repeat(x, more, axis=1) if more > 1 else x for x in (k, v))
    where = mesh_axes_for((rows, q.shape[0]), (tokens, q.shape[1]), ("heads", k.shape[1]))
    queries, keys, ranges = (
        (rows, tokens, "heads", None), (rows, "heads", None, None), (rows, tokens),
    )  # fmt: skip
    args, in_axes = [q, k, v, hi], [queries, keys, keys, ranges]
    if lo is not None:
        args, in_axes = [*args, lo], [*in_axes, ranges]
        if q.shape[1] == k.shape[2]:  # what a shard of a row must know of the whole one
            args, in_axes = [*args, jnp.where(hi > lo, lo + 1, 0)], [*in_axes, (rows, None)]
    return on_shards(run, where, tuple(in_axes), queries, *args)


def head_copies(query_heads: int, kv_heads: int) -> int:
    """How often the ambient mesh has each key/value head where it cuts heads into more parts than K."""
    parts = max_parts("heads")
    more = parts // math.gcd(parts, kv_heads)
    return more if query_heads % (kv_heads * more) == 0 else 1


def _attend(layout: Layout, segments: int, q, k, v, hi, lo=None, key_segments=None) -> jax.Array:
    """`attend` on one device; key_segments [B S]: see splash.segments, of no use elsewhere."""
    if platform() == "tpu":
        from qwen3vl_jax.model import attention_tpu  # Pallas for a TPU is loaded where there is one

        if not attention_tpu.splash_refusal(q.shape[1], k.shape[2], lo, key_segments):
            return attention_tpu.splash_attend(q, k, v, lo, hi, key_segments=key_segments)
    if _on_cudnn(layout, q, k, lo):
        if lo is None:
            attend_cache = attention_gpu.attend_behind_cache
            return (attention_gpu.attend_step if q.shape[1] == 1 else attend_cache)(q, k, v, hi)
        if layout == "prompt":
            return attention_gpu.attend_row(q, k, v)
        if segments:
            return attention_gpu.attend_packed(q, k, v, lo, hi, layout == "causal", segments)
        return attention_gpu.attend_segments(q, k, v, lo, hi, layout == "causal", _attend_blocks)
    return _attend_blocks(q, k, v, lo, hi)


def _on_cudnn(layout: Layout, q, k, lo) -> bool:
    """Whether cuDNN serves these queries: behind a cache, or of rows of a known layout."""
    if platform() != "gpu" or (q.shape[1] == 1 and k.shape[0] * k.shape[2] < CUDNN_STEP):
        return False
    if lo is not None and (layout == "any" or q.shape[1] != k.shape[2]):
        return False
    return not cudnn_refusal(q.dtype.name, q.shape[-1])


def attention_probs(q: jax.Array, k: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """The probabilities [B N T S] that `attend` never holds, in the dtype of q; for looking at."""
    scores = _scores(_group(q, k.shape[1]), k)
    scores = jnp.where(_visible(lo, hi, jnp.arange(k.shape[2])), scores, NEG)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return probs.reshape(q.shape[0], q.shape[2], q.shape[1], k.shape[2])


def _group(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B T N H] -> [B K G T H], scaled: query head n uses key head n // G."""
    b, t, n, h = q.shape
    q = (q * jnp.asarray(h**-0.5, q.dtype)).reshape(b, t, kv_heads, n // kv_heads, h)
    return q.transpose(0, 2, 3, 1, 4)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(q.dtype, k.dtype)  # a cache on a CPU is fp32
    q, k = q.astype(dtype), k.astype(dtype)
    return jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)


def _visible(lo: jax.Array, hi: jax.Array, keys: jax.Array) -> jax.Array:
    return ((keys >= lo[..., None]) & (keys < hi[..., None]))[:, None, None]


def _attend_blocks(q, k, v, lo, hi, drop: Dropout | None = None):
    """Plain XLA: online softmax over key blocks, blocks outside every range of the call skipped.

    Memory is O(T BLOCK), time follows the ranges. Source: arXiv 2112.05682, 2205.14135.
    """
    (b, t, n, h), slots, dtype = q.shape, k.shape[2], q.dtype
    lo = jnp.zeros_like(hi) if lo is None else lo
    q = _group(q, k.shape[1])
    if t == 1 and platform() == "cpu" and slots % DECODE_BLOCK == 0:
        out = _over_filled_blocks(k, v, q, lo, hi)
    elif slots <= BLOCK or t == 1:
        out = _finish(_fold(_start(q), q, k, v, lo, hi, 0, drop))
    else:
        pad = -slots % BLOCK
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) if pad else x for x in (k, v))
        out = _each_query_block(functools.partial(_over_key_blocks, k, v), q, lo, hi, drop)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(dtype)


def _each_query_block(fn, q, lo, hi, drop):
    t = q.shape[3]
    if t <= BLOCK:
        return fn(q, lo, hi, drop)
    count, pad = -(-t // BLOCK), -t % BLOCK
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
    q = jnp.moveaxis(q.reshape(*q.shape[:3], count, BLOCK, q.shape[-1]), 3, 0)
    lo, hi = (jnp.pad(x, ((0, 0), (0, pad))) for x in (lo, hi))  # lo = hi: padding sees nothing
    lo, hi = (jnp.moveaxis(x.reshape(-1, count, BLOCK), 1, 0) for x in (lo, hi))

    def run(args):
        q, lo, hi, i = args
        return fn(q, lo, hi, _fold_in(drop, i))

    out = jax.lax.map(jax.checkpoint(run), (q, lo, hi, jnp.arange(count)))
    out = jnp.moveaxis(out, 0, 3)
    return out.reshape(*out.shape[:3], count * BLOCK, out.shape[-1])[:, :, :, :t]


def _fold_in(drop: Dropout | None, i) -> Dropout | None:
    return drop and Dropout(jax.random.fold_in(drop.key, i), drop.rate)


def _fold_block(carry, k, v, q, lo, hi, j, block, drop=None):
    kb, vb = (jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2) for x in (k, v))
    return _fold(carry, q, kb, vb, lo, hi, j * block, _fold_in(drop, j))


def _over_filled_blocks(k, v, q, lo, hi):
    """A decode step, which has no gradient: its loop ends where the fullest row does."""

    def body(j, carry):
        return _fold_block(carry, k, v, q, lo, hi, j, DECODE_BLOCK)

    first, last = jnp.min(lo) // DECODE_BLOCK, -(-jnp.max(hi) // DECODE_BLOCK)
    return _finish(jax.lax.fori_loop(first, last, body, _start(q)))


def _over_key_blocks(k, v, q, lo, hi, drop):
    count = k.shape[2] // BLOCK

    def fold(j, carry):
        return _fold_block(carry, k, v, q, lo, hi, j, BLOCK, drop)

    def body(carry, j):
        seen = (lo < (j + 1) * BLOCK) & (hi > j * BLOCK) & (lo < hi)
        return jax.lax.cond(jnp.any(seen), lambda c: fold(j, c), lambda c: c, carry), None

    return _finish(jax.lax.scan(jax.checkpoint(body), _start(q), jnp.arange(count))[0])


def _start(q):
    """Running maximum, sum and output of the online softmax."""
    top = jnp.full(q.shape[:-1], NEG, jnp.float32)
    return top, jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32)


def _fold(carry, q, k, v, lo, hi, first_key, drop=None):
    """Takes one block of keys [B K s H] into the running softmax."""
    top, total, out = carry
    visible = _visible(lo, hi, first_key + jnp.arange(k.shape[2]))
    scores = jnp.where(visible, _scores(q, k), NEG)
    new_top = jnp.maximum(top, jnp.max(scores, -1))
    probs = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
    keep = jnp.exp(top - new_top)
    dtype, mixing = v.dtype, probs
    if drop is not None:  # of what is mixed, not of the sum that it is divided by
        kept = jax.random.bernoulli(drop.key, 1 - drop.rate, probs.shape)
        mixing = jnp.where(kept, probs / (1 - drop.rate), 0.0)
    mixed = jnp.einsum(
        "bkgts,bksh->bkgth", mixing.astype(dtype), v, preferred_element_type=jnp.float32
    )
    return new_top, total * keep + jnp.sum(probs, -1), out * keep[..., None] + mixed


def _finish(carry):
    _, total, out = carry
    return out / jnp.where(total > 0, total, 1.0)[..., None]


def backends() -> list[tuple[str, bool, str]]:
    """Each attention back end as (name, available here, why or what for)."""
    here = platform()
    refusal = cudnn_refusal("bfloat16", 128) if here == "gpu" else f"needs a GPU, this is {here}"
    use = "packed rows, prompts, images and videos, tokens behind a cache; bf16 and fp16"
    tpu = "128 queries a row or more" if here == "tpu" else f"needs a TPU, this is {here}"
    return [
        (
            "xla blocks",
            True,
            "every platform, dtype and layout; online softmax, empty blocks skipped",
        ),
        ("cudnn", not refusal, refusal or use),
        ("splash", here == "tpu", tpu),
    ]
