"""attend() on a GPU: cuDNN's attention of contiguous segments and behind a cache, kernels of a decode step.

A row holds segments one behind another: the frames of the ViT, packed samples, one prompt. cuDNN takes
their starts and lengths (its packed, or THD, layout): no mask exists, and nothing outside a segment is
computed. The most segments of a row are part of the program: one too many costs a fifth of a microsecond
forward, and fp32 buffers of a whole row backward. Dims as in layers.py.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from qwen3vl_jax.model.sharding import compile_replicated, platform
from qwen3vl_jax.model.structs import FEW, MANY

# Parts of a row that may each have MANY segments, where the host does not count them.
WINDOWS = 16
# The name by which remat policies keep what attention gives.
ATTENTION = "attention"
# Keys that a program of a decode step loads at a time, and programs: two a multiprocessor of a large GPU.
STEP_BLOCK, STEP_PROGRAMS = 64, 256
log = logging.getLogger("qwen3vl_jax")


def cudnn() -> Any:
    """JAX's module of cuDNN's attention."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


@functools.cache
def gpu_refusal(dtype: str, head_dim: int, kernel: str = "cudnn") -> str:
    """Why a kernel, cudnn or step (of a decode step), does not serve this dtype and head size, or "".

    It is asked, not guessed, and logged once: a tiny program is compiled, so an old GPU, a missing cuDNN,
    a size or a dtype that it lacks and a JAX that has moved its modules all answer for themselves.
    """
    if dtype == "float32":
        return "no kernel has float32"
    q = jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((1, 64, 1, head_dim), dtype)
    ranges = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def probe(q, k, v, lo, hi):
        if kernel == "step":
            qkv, norm = jnp.stack([q[:, :1, :1], k[:, :1], v[:, :1]], axis=3), q[0, 0, 0]
            angles = q[:, :1, :1, : head_dim // 2]
            return append_and_attend(1e-6, qkv, norm, norm, angles, angles, k, v, hi[:, :1])
        packed = attend_packed(q, k, v, lo, hi, True, 2)
        return packed, attend_row(q, k, v), attend_behind_cache(q, k, v, hi)

    try:
        compile_replicated(probe, q, kv, kv, ranges, ranges)
    except Exception as e:  # the reason is what matters: any failure means the other path
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        log.warning("%s attention (%s, H = %d) runs on XLA: %s", kernel, dtype, head_dim, reason)
        return reason
    return ""


def attend_segments(q, k, v, lo, hi, causal: bool, blocks: Callable) -> jax.Array:
    """`attend_packed` of uncounted segments, `blocks(q, ..)` of very many: choosing stops the host."""
    starts = (hi > lo) & (lo == jnp.arange(lo.shape[1]))
    size = lo.shape[1] // (1 if lo.shape[1] % WINDOWS else WINDOWS)
    in_window = jnp.max(jnp.sum(starts.reshape(-1, size), axis=1))
    windows = functools.partial(_attend_windows, size, causal)
    return jax.lax.cond(in_window > MANY, blocks, windows, q, k, v, lo, hi)


def _attend_windows(size: int, causal: bool, q, k, v, lo, hi) -> jax.Array:
    """`attend_packed` of MANY segments in each window of `size` tokens; a row has few that cross two."""
    first = jnp.arange(lo.shape[1]) // size
    end = lo + jnp.take_along_axis(segment_lengths(lo, hi), lo, axis=1)
    crosses = (hi > lo) & (lo // size != (end - 1) // size)
    whole = attend_packed(q, k, v, lo, jnp.where(crosses, hi, lo), causal, WINDOWS)
    cut: Any = (q, k, v, lo - first * size, jnp.where(crosses, lo, hi) - first * size)
    cut = (x.reshape(-1, size, *x.shape[2:]) for x in cut)
    inside = attend_packed(*cut, causal=causal, most=MANY).reshape(whole.shape)
    return jnp.where(crosses[..., None, None], whole, inside)


def attend_packed(q, k, v, lo, hi, causal: bool, most: int) -> jax.Array:
    """Attention of q [B T N H] to k, v [B T K H] of its own segment; returns [B T N H].

    lo, hi [B T] int32 as in `attend`: a segment is contiguous and starts at the lo of its tokens, which
    see all of it or, causal, it up to themselves. Other tokens (hi <= lo) give zeros. A row holds at
    most `most` segments; tokens of further ones give NaN.
    """
    return (_packed if most <= FEW else _packed_of_many)(causal, most, lo, hi, q, k, v)


def _packed(causal: bool, most: int, lo, hi, q, k, v) -> jax.Array:
    t = q.shape[1]
    lo, hi, q, k, v = (_even(x) for x in (lo, hi, q, k, v))
    real = (hi > lo)[..., None, None]
    lengths = segment_lengths(lo, hi)
    # cuDNN takes one segment a row for a row that is not packed.
    starts = jax.vmap(lambda x: jnp.nonzero(x, size=max(most, 2), fill_value=-1)[0])(lengths > 0)
    starts = starts.astype(jnp.int32)
    sizes = jnp.where(starts >= 0, jnp.take_along_axis(lengths, starts, axis=1), -1)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    q, k, v = (_masked_slope(x, real) for x in (q, k, v))
    out = _attend(q, k, v, sizes, sizes, starts, starts, causal=causal)
    beyond = jnp.sum(lengths > 0, axis=1) > most
    out = jnp.where(beyond[:, None, None, None], jnp.nan, out)
    return jnp.where(real, out, 0)[:, :t]


# Backward, a segment has an fp32 buffer of a row: many go key head by key head, forward again too.
_packed_of_many = jax.custom_vjp(_packed, nondiff_argnums=(0, 1))


def _many_backward(causal, most, saved, slope):
    lo, hi, *qkv = saved
    heads = qkv[1].shape[2]

    def of_head(x):
        qkv, slope = x
        return jax.vjp(functools.partial(_packed, causal, most, lo, hi), *qkv)[1](slope)

    by_head = jax.tree.map(lambda x: jnp.stack(jnp.split(x, heads, axis=2)), (qkv, slope))
    slopes = jax.lax.map(of_head, by_head)
    return None, None, *(jnp.concatenate(list(x), axis=2) for x in slopes)


_packed_of_many.defvjp(
    lambda *args: (checkpoint_name(_packed(*args), ATTENTION), args[2:]), _many_backward
)


def _even(x: jax.Array) -> jax.Array:
    """x [B T ..] with one token more if T is odd: JAX has no gradient of cuDNN's attention of odd T."""
    return jnp.pad(x, [(0, n % 2 * (axis == 1)) for axis, n in enumerate(x.shape)])


# x, whose gradient is 0 where `mine` is not: cuDNN leaves there what the memory held.
_masked_slope = jax.custom_vjp(lambda x, mine: x)
_masked_slope.defvjp(lambda x, mine: (x, mine), lambda mine, g: (jnp.where(mine, g, 0), None))


def _attend(q, k, v, *segments, causal: bool = False, **options) -> Any:
    """cuDNN's attention. segments: lengths in q and in k, and where rows are packed the starts in both."""
    module = cudnn()
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    mask = module.MaskType.PADDING_CAUSAL if causal else module.MaskType.PADDING
    options |= {"scale": q.shape[-1] ** -0.5, "mask_type": mask}
    return module.dot_product_attention(q, k, v, None, None, *segments, **options)


def segment_lengths(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """The length [B T] int32 of the segment that starts at a token, 0 at every other token."""
    index = jnp.arange(lo.shape[1], dtype=jnp.int32)
    real = hi > lo
    after = jnp.roll(jnp.where(real, lo, -1), -1, axis=1).at[:, -1].set(-1)
    ends = jnp.where(real & (after != lo), index + 1, lo.shape[1])
    end = jax.lax.cummin(ends, axis=1, reverse=True)
    return jnp.where(real & (lo == index), end - index, 0)


def attend_row(q, k, v) -> jax.Array:
    """Causal attention of q [B T N H] to k, v [B T K H], rows of one segment from their first token on."""
    qkv = (_even(x.astype(q.dtype)) for x in (q, k, v))
    out = jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="cudnn")
    return out[:, : q.shape[1]]


def attend_behind_cache(q, k, v, hi) -> jax.Array:
    """Attention of a run of new tokens, written behind what a cache held, to all of it up to themselves.

    q [B T N H], k, v [B S K H], hi [B T] int32: each row's tokens stand one behind another, the first
    that is real sees `start` older keys and itself, the next one more; hi is 0 at padding, which gives
    zeros. Two calls of cuDNN, of the older keys as they lie and of the run itself, joined by their
    logsumexp; for inference, it has no gradient.
    """
    b, t = q.shape[:2]
    real = hi > 0
    count = jnp.sum(real, axis=1, dtype=jnp.int32)
    first = jnp.argmax(real, axis=1).astype(jnp.int32)
    start = jnp.maximum(jnp.max(hi, axis=1) - count, 0).astype(jnp.int32)
    none = jnp.full((b, 2), -1, jnp.int32)
    sizes = jnp.concatenate([count[:, None], none[:, :1]], axis=1)
    # T keys that hold the run's.
    window = jnp.minimum(start, k.shape[1] - t)
    cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, t))
    new = cut(k, window), cut(v, window)
    starts = (jnp.concatenate([x[:, None], none], axis=1) for x in (first, start - window))
    run, run_sum = _attend(q, *new, sizes, sizes, *starts, causal=True, return_residual=True)
    lengths = jnp.full(b, t, jnp.int32), jnp.maximum(start, 1)
    older, older_sum = _attend(q, k, v, *lengths, return_residual=True)
    # cuDNN counts the tokens of a logsumexp [B N T] from the run's first.
    index = jnp.maximum(jnp.arange(t) - first[:, None], 0)[:, None]
    run_sum = jnp.take_along_axis(run_sum[:b], index, axis=2)
    older_sum = jnp.where((start > 0)[:, None, None], older_sum.reshape(b, -1, t), -jnp.inf)
    share = jax.nn.sigmoid(run_sum - older_sum).transpose(0, 2, 1)[..., None]
    out = jnp.where(share < 1, older * (1 - share), 0) + run * share
    return jnp.where(real[..., None, None], out, 0).astype(q.dtype)


def append_and_attend(eps, qkv, q_norm, k_norm, cos, sin, k, v, slot) -> list[jax.Array]:
    """Attention of one token a row to what its cache k, v [B S K H] holds and to itself.

    qkv [B 1 K G+2 H], q_norm, k_norm [H], cos, sin [B 1 1 H/2]: as in text.split_heads, done here. The
    token is written at slot [B 1] int32, behind what is filled, or dropped past the last slot. Returns
    [out [B 1 N H], k, v]. A row's keys are cut into P parts, so that few rows fill a GPU; a second kernel
    joins the parts and the token. Source: Flash-Decoding, Dao et al. 2023.
    """
    from jax.experimental.pallas import triton

    (b, _, heads, both, h), slots, group = qkv.shape, k.shape[1], qkv.shape[3] - 2
    most = max(1, min(STEP_PROGRAMS // (b * heads), slots // STEP_BLOCK))
    # The matrix units take 16 queries.
    parts, tile = 1 << (most.bit_length() - 1), max(16, 1 << (group - 1).bit_length())
    sizes = {"S": slots, "H": h, "P": parts, "T": tile, "E": both, "R": h // 2}
    options: dict[str, Any] = {"interpret": platform() != "gpu"}
    options["compiler_params"] = triton.CompilerParams(num_warps=4, num_stages=3)

    def call(kernel, count, ins, outs, shapes, **more):
        specs = {"in_specs": _specs(ins, sizes), "out_specs": _specs(outs, sizes)}
        bound = functools.partial(kernel, triton, eps)
        return pl.pallas_call(bound, shapes, grid=(b, heads, count), **specs, **options, **more)

    slot, qkv = slot[:, 0].astype(jnp.int32), qkv.reshape(b, heads, both, h)
    cos, sin = (x.reshape(b, h // 2) for x in (cos, sin))
    sums = jax.ShapeDtypeStruct((b, heads, group, parts), jnp.float32)
    shapes = [sums, sums, jax.ShapeDtypeStruct((*sums.shape, h), jnp.float32)]
    ins, outs = "b bkEH H bR bR bSkH bSkH", "bkTp bkTp bkTpH"
    attend_parts = call(functools.partial(_part_kernel, tile), parts, ins, outs, shapes)
    found = attend_parts(jnp.clip(slot, 0, slots), qkv, q_norm, cos, sin, k, v)
    shapes = [jax.ShapeDtypeStruct((b, heads, group, h), qkv.dtype), k, v]
    ins, outs = "b bkEH H H bR bR bkpP bkpP bkpPH bSkH bSkH", "bkpH bSkH bSkH"
    join = call(_join_kernel, group, ins, outs, shapes, input_output_aliases={9: 1, 10: 2})
    out, *caches = join(slot, qkv, q_norm, k_norm, cos, sin, *found, k, v)
    return [out.reshape(b, 1, heads * group, h), *caches]


def _specs(names: str, sizes: dict[str, int]) -> list[Any]:
    """BlockSpecs by the axes of arrays: a program has one of b, k and p, and all of those in `sizes`."""

    def of(axes: str) -> Any:
        def index(*program):
            return tuple(0 if x in sizes else program["bkp".index(x)] for x in axes)

        return pl.BlockSpec(tuple(map(sizes.get, axes)), index)

    return [of(axes) for axes in names.split()]


def _rotated(triton, eps, qkv, rows, norm, cos, sin):
    """Heads `rows` [..] of qkv [G+2 H], normalized and rotated: [.. H] float32."""
    h = qkv.shape[1]
    index = jnp.arange(h)

    def load(index):
        at = (jnp.broadcast_to(x, (*rows.shape, h)) for x in (rows[..., None], index))
        return triton.load(qkv.at[tuple(at)]).astype(jnp.float32), triton.load(norm.at[index])

    (x, scale), (pair, pair_scale) = load(index), load((index + h // 2) % h)
    cos, sin = (triton.load(x.at[index % (h // 2)]).astype(jnp.float32) for x in (cos, sin))
    x_part, pair_part = scale * cos, pair_scale * jnp.where(index < h // 2, -sin, sin)
    size = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * x_part + pair * pair_part) * size


def _part_kernel(tile, triton, eps, filled, qkv, q_norm, cos, sin, k, v, *outs):
    """The softmax (maximum, sum, output) of a key head's queries over one part of a row's keys."""
    group, h, end, heads = qkv.shape[0] - 2, qkv.shape[1], filled[...], jnp.arange(tile)
    # Those past the group are its last one again, and are not stored.
    real, rows = heads < group, jnp.minimum(heads, group - 1)
    queries = _rotated(triton, eps, qkv, rows, q_norm, cos, sin).astype(k.dtype)
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    blocks = pl.cdiv(end, pl.num_programs(2) * STEP_BLOCK)
    first = pl.program_id(2) * blocks * STEP_BLOCK

    def fold(i, carry):
        top, total, out = carry
        start = first + i * STEP_BLOCK
        seen = start + jnp.arange(STEP_BLOCK) < end
        block = (x.at[pl.ds(start, STEP_BLOCK), :] for x in (k, v))
        keys, values = (triton.load(x, mask=seen[:, None], other=0) for x in block)
        scores = jnp.where(seen[None], dot(queries, keys.T) * h**-0.5, -1e30)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        probs, keep = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        out = out * keep[:, None] + dot(probs.astype(values.dtype), values)
        return new_top, total * keep + jnp.sum(probs, axis=1), out

    none = jnp.full(tile, -1e30), jnp.zeros(tile), jnp.zeros((tile, h))
    count = jnp.clip(pl.cdiv(end - first, STEP_BLOCK), 0, blocks)
    for ref, x in zip(outs, jax.lax.fori_loop(0, count, fold, none), strict=True):
        triton.store(ref, x, mask=real[:, None] if x.ndim > 1 else real)


def _join_kernel(triton, eps, slot, qkv, q_norm, k_norm, *others):
    """The parts of one query and the new token in one softmax; the first of a group writes the token."""
    cos, sin, top, total, outs, _, __, out, *caches = others
    group, at = qkv.shape[0] - 2, slot[...]

    def rotated(row, norm):
        return _rotated(triton, eps, qkv, jnp.int32(row), norm, cos, sin).astype(out.dtype)

    query, key, value = rotated(pl.program_id(2), q_norm), rotated(group, k_norm), qkv[group + 1]
    score = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32)) * len(query) ** -0.5
    new_top = jnp.maximum(jnp.max(top[...]), score)
    weights, weight = jnp.exp(top[...] - new_top), jnp.exp(score - new_top)
    added = jnp.sum(outs[...] * weights[:, None], axis=0) + weight * value.astype(jnp.float32)
    out[...] = (added / (jnp.sum(total[...] * weights) + weight)).astype(out.dtype)
    mine = jnp.broadcast_to((pl.program_id(2) == 0) & (at < caches[0].shape[0]), query.shape)
    for cache, x in zip(caches, (key, value), strict=True):
        triton.store(cache.at[at, :], x.astype(cache.dtype), mask=mine)
