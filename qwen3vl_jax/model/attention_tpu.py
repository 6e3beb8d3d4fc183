"""attend() on a TPU: JAX's splash attention with block tables of our own, and a kernel of a decode step.

Splash expects masks that are known when a program is traced. Here its block tables are made from lo and
hi on the device: blocks that no query sees are skipped. The sequences of a batch are concatenated; a
block of queries visits the key blocks of its own sequence. Dims as in layers.py.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from qwen3vl_jax.model.attention_gpu import ATTENTION
from qwen3vl_jax.model.sharding import platform

# Block sizes are multiples of LANES up to BLOCK.
LANES = 128
BLOCK = 512
# Of a decode step: slots of a row, and bytes of keys, that are loaded at a time.
STEP_BLOCK, STEP_BYTES = 256, 2 << 20


def attend(q, k, v, lo, hi, key_segments=None, most: int = 0) -> jax.Array | None:
    """`attention.attend` by a kernel; None for few queries, and for keys whose segments are not known.

    most: `key_blocks`, of queries that are the keys.
    """
    queries, keys = q.shape[1], k.shape[1]
    if queries == 1 and lo is None and keys % STEP_BLOCK == 0:
        return attend_step(q, k, v, hi)
    served = queries >= LANES and (lo is None or key_segments is not None or queries == keys)
    most *= queries == keys
    return splash_attend(q, k, v, lo, hi, key_segments, most) if served else None


def key_blocks(lo: np.ndarray, hi: np.ndarray) -> int:
    """The most key blocks that a block of queries sees, of few values: 1 to 8, 10, 12 .. [.. T]."""
    t, real = lo.shape[-1], hi > lo
    block = _block(t)
    first = np.minimum.reduceat(np.where(real, lo, t), np.arange(0, t, block), axis=-1)
    end = np.maximum.reduceat(np.where(real, hi, 0), np.arange(0, t, block), axis=-1)
    most = max(int(np.max(-(-end // block) - first // block)), 1)
    step = 1 << max(most.bit_length() - 3, 0)
    return -(-most // step) * step


def splash_attend(q, k, v, lo, hi, key_segments=None, most: int = 0) -> jax.Array:
    """`attention.attend` where a segment starts at the lo of its tokens: [B T N H].

    key_segments [B S] int32: the segment ids of the keys, lo + 1 of each token and 0 of padding; None:
    the keys are the sequence itself (T = S). lo None means 0. An empty range gives zeros. most: steps
    over key blocks (static), by `key_blocks`, 0 for all; a sequence that needs more gives NaN.
    """
    (b, t, n, h), slots, empty = q.shape, k.shape[1], hi <= (0 if lo is None else lo)
    rows, block_q, block_k = jnp.arange(b)[:, None], _block(t), _block(slots)
    ids = None
    if lo is not None:
        own = jnp.where(hi > lo, lo + 1, 0)
        of_keys = own if key_segments is None else key_segments
        ids = splash.SegmentIds(_concatenate(own, block_q), _concatenate(of_keys, block_k))
    q = _concatenate((q * jnp.asarray(h**-0.5, q.dtype)).transpose(2, 0, 1, 3), block_q, 1)
    k, v = (_concatenate(x.transpose(2, 0, 1, 3).astype(q.dtype), block_k, 1) for x in (k, v))
    width = -(-slots // block_k) * block_k
    first, end = jnp.where(empty, width, 0 if lo is None else lo), jnp.where(empty, 0, hi)
    seen = _seen(first, end, block_q, block_k, width)
    reach: Any = _concatenate(end + rows * width, block_q)
    *by_block, beyond = _steps(seen, most)
    tables = by_block, [x.swapaxes(1, 2) for x in _steps(seen.swapaxes(1, 2), most)[:2]]
    # No mask block is stored, since `mask_function` computes them.
    by_query, by_key = (MaskInfo(loads, None, runs, None, reach) for loads, runs in tables)
    # "_dkv" and "_dq": the kernels of the backward pass.
    blocks: dict[str, Any] = {f"block_q{which}": block_q for which in ("", "_dkv", "_dq")}
    blocks |= {f"block_kv{which}": block_k for which in ("", "_dkv", "_dq")}
    kernel = splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=splash.BlockSizes(**blocks),
        # Besides segments; positions count over the concatenated sequences.
        mask_function=lambda reach, key: key < reach,
        is_mqa=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        save_residuals=False,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENTION,
        # Off the TPU, in tests.
        interpret=platform() != "tpu",
    )
    out = cast(jax.Array, kernel(q, k, v, ids)).reshape(n, b, -1, h)[:, :, :t].transpose(1, 2, 0, 3)
    out = jnp.where(beyond[:, None, None, None], jnp.nan, out)
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


def _seen(first: jax.Array, end: jax.Array, block_q: int, block_k: int, width: int) -> jax.Array:
    """Key blocks that each query block visits [B n m] bool: from its smallest `first` to largest `end`."""

    def per_block(x, fill):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block_q)), constant_values=fill)
        return x.reshape(x.shape[0], -1, block_q)

    first = jnp.min(per_block(first, width), -1)[..., None]
    end = jnp.max(per_block(end, 0), -1)[..., None]
    start = block_k * jnp.arange(width // block_k)
    return (first < start + block_k) & (end > start)


def _steps(seen: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(block to load, whether to run) at each step of a pass: [1 B*n steps] from seen [B n m].

    Each of a sequence's n blocks visits up to `most` of m others, or m if that is 0; the third [B] says
    which sequences need more. A skipped step names the last visited block, so nothing is loaded for it.
    The tables live in scalar memory, hence the small integers.
    """
    b, n, m = seen.shape
    index, steps = jnp.arange(m), jnp.arange(min(most or m, m))
    last = jnp.max(jnp.where(seen, index, 0), -1, keepdims=True)
    first = jnp.min(jnp.where(seen, index, last), -1, keepdims=True)
    block = jnp.minimum(first + steps, last)
    runs = jnp.take_along_axis(seen, block, -1) & (first + steps <= last)
    loads = m * jnp.arange(b)[:, None, None] + block
    beyond = jnp.any(last - first >= len(steps), axis=(1, 2))
    flat = (1, b * n, len(steps))
    return loads.astype(jnp.int16).reshape(flat), runs.astype(jnp.int8).reshape(flat), beyond


def attend_step(q: jax.Array, k: jax.Array, v: jax.Array, hi: jax.Array) -> jax.Array:
    """Attention of one token a row, q [B 1 N H], to the first hi [B 1] keys of k, v [B S K H]: [B 1 N H].

    A few rows load their blocks together, up to the last filled slot of the longest. Every query is
    multiplied by the keys of all heads, and the products with other heads are masked: the chip has time
    for that while it loads, and the cache is taken as it lies. No gradient.
    """
    (b, _, n, h), (slots, heads) = q.shape, k.shape[1:3]
    q = (q * jnp.asarray(h**-0.5, q.dtype)).reshape(b, n, h)
    k, v = (x.reshape(b, slots * heads, h).astype(q.dtype) for x in (k, v))
    size = STEP_BLOCK * heads
    most = max(1, STEP_BYTES // (size * h * q.dtype.itemsize))
    rows = max(r for r in range(1, b + 1) if b % r == 0 and r <= most)
    reach = jnp.clip(hi[:, 0], 0, slots).astype(jnp.int32)
    # Blocks of each group of rows, at least one: it sets the sums to zero.
    blocks = jnp.maximum(-(-jnp.max(reach.reshape(-1, rows), axis=1) // STEP_BLOCK), 1)
    cache = pl.BlockSpec((rows, size, h), lambda i, j, _, n: (i, jnp.minimum(j, n[i] - 1), 0))
    sums, token = (pl.BlockSpec((rows, n, x), lambda i, *_: (i, 0, 0)) for x in (1, h))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(b // rows, jnp.max(blocks)),
        in_specs=[token, cache, cache],
        out_specs=[sums, sums, token],
    )
    shapes = [jax.ShapeDtypeStruct((b, n, x), jnp.float32) for x in (1, 1, h)]
    kernel = functools.partial(_step_kernel, heads)
    call = pl.pallas_call(kernel, shapes, grid_spec=grid, interpret=platform() != "tpu")
    _, total, out = call(reach, blocks, q, k, v)
    return (out / jnp.where(total > 0, total, 1)).astype(q.dtype)[:, None]


def _step_kernel(heads, reach, _, q, k, v, top, total, out):
    """Adds a block of keys [R s*K H] to the running softmax (top, total, out) of queries [R N H]."""
    group, block = pl.program_id(0), pl.program_id(1)
    # 16 bits have one precision there, whatever jax's configuration says.
    precision = jax.lax.Precision.DEFAULT if q.dtype.itemsize == 2 else None
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32, precision=precision)

    @pl.when(block == 0)
    def _():
        top[...] = jnp.full(top.shape, splash.DEFAULT_MASK_VALUE, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        out[...] = jnp.zeros(out.shape, jnp.float32)

    for r in range(len(q)):
        left = (reach[group * len(q) + r] - block * STEP_BLOCK) * heads

        @pl.when(left > 0)
        def _(r=r, left=left):
            scores = dot(q[r], k[r].T)
            query, key = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, i) for i in (0, 1))
            own = query // (scores.shape[0] // heads) == key % heads
            scores = jnp.where(own & (key < left), scores, splash.DEFAULT_MASK_VALUE)
            new_top = jnp.maximum(top[r], jnp.max(scores, axis=1, keepdims=True))
            probs, keep = jnp.exp(scores - new_top), jnp.exp(top[r] - new_top)
            top[r] = new_top
            total[r] = total[r] * keep + jnp.sum(probs, axis=1, keepdims=True)
            out[r] = out[r] * keep + dot(probs.astype(v.dtype), v[r])
