"""attend() on a TPU: JAX's splash attention kernels with block tables computed on the device.

Splash expects masks that are known when a program is traced. Here its block tables are arrays made
from lo and hi, so blocks that no query sees are skipped: in packed sequences, frames of the ViT, a
shard of a sequence at any offset and a filled cache. The sequences of a batch are concatenated into
one; a block of queries visits the key blocks of its own sequence. Dims as in layers.py.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from qwen3vl_jax.model.sharding import platform

# Block sizes are multiples of LANES up to BLOCK.
LANES = 128
BLOCK = 512


def splash_refusal(queries: int, keys: int, lo: jax.Array | None, key_segments) -> str:
    """Why splash does not serve a call of `attend` with these numbers of queries and keys, or ""."""
    if queries < LANES:
        return f"{queries} queries a row are less than a block of {LANES}"
    if lo is not None and key_segments is None and queries != keys:
        return f"{queries} queries are not the row of {keys} keys, whose segments are not given"
    return ""


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lo: jax.Array | None,
    hi: jax.Array,
    *,
    key_segments: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend` where a segment starts at the lo of its tokens: [B T N H].

    key_segments [B S] int32: the segment ids of the keys, lo + 1 of each token and 0 of padding; None:
    the keys are the sequence itself (T = S). lo None means 0. An empty range gives zeros.
    """
    (b, t, n, h), slots, empty = q.shape, k.shape[2], hi <= (0 if lo is None else lo)
    rows, block_q, block_k = jnp.arange(b)[:, None], _block(t), _block(slots)
    ids = None
    if lo is not None:
        own = jnp.where(hi > lo, lo + 1, 0)
        of_keys = own if key_segments is None else key_segments
        ids = splash.SegmentIds(_concatenate(own, block_q), _concatenate(of_keys, block_k))
    q = _concatenate((q * jnp.asarray(h**-0.5, q.dtype)).transpose(2, 0, 1, 3), block_q, 1)
    k, v = (_concatenate(x.transpose(1, 0, 2, 3).astype(q.dtype), block_k, 1) for x in (k, v))
    width = -(-slots // block_k) * block_k
    first, end = jnp.where(empty, width, 0 if lo is None else lo), jnp.where(empty, 0, hi)
    seen = _seen(first, end, block_q, block_k, width)
    reach = _concatenate(end + rows * width, block_q)
    by_query = _mask_info(*_steps(seen), reach)
    loads, runs = (x.swapaxes(1, 2) for x in _steps(seen.swapaxes(1, 2)))
    # "_dkv" and "_dq": the kernels of the backward pass.
    blocks: dict[str, Any] = {f"block_q{which}": block_q for which in ("", "_dkv", "_dq")}
    blocks |= {f"block_kv{which}": block_k for which in ("", "_dkv", "_dq")}
    kernel = splash.SplashAttentionKernel(
        by_query,
        by_query,
        _mask_info(loads, runs, reach),
        block_sizes=splash.BlockSizes(**blocks),
        mask_function=_below,
        is_mqa=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        save_residuals=False,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        # Off the TPU, in tests.
        interpret=platform() != "tpu",
    )
    out = cast(jax.Array, kernel(q, k, v, ids)).reshape(n, b, -1, h)[:, :, :t].transpose(1, 2, 0, 3)
    # A block without visits is 0 / 0.
    return jnp.where(empty[..., None, None], 0, out)


def _block(length: int) -> int:
    """Block size: a multiple of LANES up to BLOCK, of the fewest equal blocks that hold `length`."""
    count = -(-length // BLOCK)
    return -(-length // (count * LANES)) * LANES


def _concatenate(x: jax.Array, block: int, axis: int = 0) -> jax.Array:
    """Sequences [.. B T ..] at `axis` padded with zeros to whole blocks and concatenated."""
    pad = [(0, 0)] * x.ndim
    pad[axis + 1] = (0, -x.shape[axis + 1] % block)
    x = jnp.pad(x, pad) if pad[axis + 1][1] else x
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _below(reach: jax.Array, key: jax.Array) -> jax.Array:
    """The kernel's mask besides segments; positions count over the concatenated sequences."""
    return key < reach


def _seen(first: jax.Array, end: jax.Array, block_q: int, block_k: int, width: int) -> jax.Array:
    """Key blocks that each query block visits [B n m] bool: from its smallest `first` to largest `end`."""

    def per_block(x, fill):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block_q)), constant_values=fill)
        return x.reshape(x.shape[0], -1, block_q)

    first = jnp.min(per_block(first, width), -1)[..., None]
    end = jnp.max(per_block(end, 0), -1)[..., None]
    start = block_k * jnp.arange(width // block_k)
    return (first < start + block_k) & (end > start)


def _steps(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(block to load, whether to run) at each step of a pass: [1 B*n m] from seen [B n m].

    Each of a sequence's n blocks visits m others. A skipped step names the nearest visited block, so
    nothing is loaded for it. Both tables live in scalar memory, hence the small integers.
    """
    b, n, m = seen.shape
    index = jnp.arange(m)
    last = jnp.max(jnp.where(seen, index, 0), -1, keepdims=True)
    first = jnp.min(jnp.where(seen, index, last), -1, keepdims=True)
    loads = m * jnp.arange(b)[:, None, None] + jnp.clip(index, first, last)
    return loads.astype(jnp.int16).reshape(1, b * n, m), seen.astype(jnp.int8).reshape(1, b * n, m)


def _mask_info(loads: jax.Array, runs: jax.Array, reach: jax.Array) -> MaskInfo:
    """The tables in the kernel's struct; no mask block is stored, since `_below` computes them."""
    return MaskInfo(loads, None, runs, None, cast(Any, reach))
