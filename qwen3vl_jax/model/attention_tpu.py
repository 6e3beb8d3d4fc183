"""attend() on a TPU: JAX's splash attention kernels, told on the device which blocks to run.

Splash is made for masks known when a program is traced. Here its tables of blocks are arrays worked
out from lo and hi, so packed rows, the frames of the ViT, a shard of a row at any offset and a filled
cache skip whatever no query of a block sees. Rows of a batch lie one behind another in one long
sequence, and every block of queries visits the key blocks of its own row. Dims as in layers.py.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SegmentIds,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

LANES = 128  # the unit of a block
BLOCK = 512  # the largest block


def splash_refusal(queries: int, keys: int, lo: jax.Array | None, key_segments) -> str:
    """Why splash does not serve a call of `attend` with so many queries and keys a row, or ""."""
    if queries < LANES:
        return f"{queries} queries a row are less than a block of {LANES}"
    if lo is not None and key_segments is None and queries != keys:
        return f"{queries} queries are not the row of {keys} keys, whose segments are not given"
    return ""


def segments(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Segment ids [B T] int32, 0 for padding, of tokens that see lo <= s < hi of their own segment."""
    return jnp.where(hi > lo, lo + 1, 0)


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lo: jax.Array | None,
    hi: jax.Array,
    *,
    key_segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` where a segment starts at the lo of its tokens; returns [B T N H].

    key_segments [B S] int32 are the `segments` of the keys; None: the keys are the row itself (T = S).
    lo None means 0. An empty range gives zeros. interpret: off the TPU, for tests.
    """
    (b, t, n, h), slots, empty = q.shape, k.shape[2], hi <= (0 if lo is None else lo)
    rows, block_q, block_k = jnp.arange(b)[:, None], _block(t), _block(slots)
    ids = None
    if lo is not None:
        own = segments(lo, hi)
        others = own if key_segments is None else key_segments
        ids = SegmentIds(_line(own, block_q), _line(others, block_k))
    q = _line((q * jnp.asarray(h**-0.5, q.dtype)).transpose(2, 0, 1, 3), block_q, 1)
    k, v = (_line(x.transpose(1, 0, 2, 3).astype(q.dtype), block_k, 1) for x in (k, v))

    width = -(-slots // block_k) * block_k
    first, end = jnp.where(empty, width, 0 if lo is None else lo), jnp.where(empty, 0, hi)
    seen = _seen(first, end, block_q, block_k, width)
    reach = _line(end + rows * width, block_q)
    by_query = _mask_info(_steps(seen), reach)
    by_key = jax.tree.map(lambda x: x.swapaxes(1, 2), _steps(seen.swapaxes(1, 2)))
    by_key = _mask_info(by_key, reach)
    kernel = SplashAttentionKernel(
        by_query, by_query, by_key,
        block_sizes=_block_sizes(block_q, block_k), mask_function=_below, is_mqa=False,
        mask_value=DEFAULT_MASK_VALUE, save_residuals=False, attn_logits_soft_cap=None,
        residual_checkpoint_name=None, interpret=interpret,
    )  # fmt: skip
    out = cast(jax.Array, kernel(q, k, v, ids)).reshape(n, b, -1, h)[:, :, :t].transpose(1, 2, 0, 3)
    return jnp.where(empty[..., None, None], 0, out)  # a block that visits nothing is 0 / 0


def _block(length: int) -> int:
    """The size of the fewest equal blocks, a multiple of LANES up to BLOCK, that hold `length`."""
    count = -(-length // BLOCK)
    return -(-length // (count * LANES)) * LANES


def _block_sizes(block_q: int, block_k: int) -> BlockSizes:
    return BlockSizes(
        block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k,
        block_q_dq=block_q, block_kv_dq=block_k,
    )  # fmt: skip


def _line(x: jax.Array, block: int, axis: int = 0) -> jax.Array:
    """Rows [.. B T ..] at `axis`, each padded with zeros to whole blocks, one behind another."""
    pad = [(0, 0)] * x.ndim
    pad[axis + 1] = (0, -x.shape[axis + 1] % block)
    x = jnp.pad(x, pad) if pad[axis + 1][1] else x
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _below(reach: jax.Array, key: jax.Array) -> jax.Array:
    """The kernel's mask, beside the segments: positions count over all rows."""
    return key < reach


def _seen(first: jax.Array, end: jax.Array, block_q: int, block_k: int, width: int) -> jax.Array:
    """Which blocks of keys each block of queries visits, [B T/block_q width/block_k] bool.

    Those between the smallest `first` and the largest `end` [B T] of its queries.
    """

    def per_block(x, fill):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block_q)), constant_values=fill)
        return x.reshape(x.shape[0], -1, block_q)

    first = jnp.min(per_block(first, width), -1)[..., None]
    end = jnp.max(per_block(end, 0), -1)[..., None]
    start = block_k * jnp.arange(width // block_k)
    return (first < start + block_k) & (end > start)


def _steps(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each step of a pass loads, and whether it runs: [1 B*n m] of seen [B n m].

    Blocks n of each row visit m others. A step that is skipped names the nearest block that is
    visited, so nothing is loaded for it. Both live in scalar memory, hence the small integers.
    """
    b, n, m = seen.shape
    index = jnp.arange(m)
    last = jnp.max(jnp.where(seen, index, 0), -1, keepdims=True)
    first = jnp.min(jnp.where(seen, index, last), -1, keepdims=True)
    loads = m * jnp.arange(b)[:, None, None] + jnp.clip(index, first, last)
    return loads.astype(jnp.int16).reshape(1, b * n, m), seen.astype(jnp.int8).reshape(1, b * n, m)


def _mask_info(steps: tuple[jax.Array, jax.Array], reach: jax.Array) -> MaskInfo:
    """The tables as the kernel takes them; no block of a mask is stored, `_below` makes them."""
    return MaskInfo(
        data_next=steps[0],
        mask_next=None,
        block_mask=steps[1],
        partial_mask_blocks=None,
        q_sequence=cast(Any, reach),  # annotated as numpy's
    )
