"""The GPU's attention: on a GPU cuDNN itself, elsewhere a stand-in that follows its documented tables."""

import enum
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import arrays, dense_jax
from tiny import config_dict

from qwen3vl_jax.config import Config
from qwen3vl_jax.model import attention, attention_gpu
from qwen3vl_jax.model.text import split_heads
from qwen3vl_jax.processing.batch import make_vision

ON_GPU = jax.default_backend() == "gpu"
Mask = enum.Enum("Mask", "PADDING PADDING_CAUSAL")


@jax.custom_vjp
def junk_outside(x, inside):
    """x, with NaN in its gradient outside: cuDNN writes no gradient there."""
    return x


junk_outside.defvjp(
    lambda x, inside: (x, inside), lambda inside, g: (jnp.where(inside, g, jnp.nan), None)
)


def stand_in(
    q,
    k,
    v,
    bias,
    mask,
    q_size,
    k_size,
    q_start=None,
    k_start=None,
    *,
    scale,
    mask_type,
    return_residual=False,
):
    """What cuDNN computes, segment by segment; NaN for tokens of none, in values and gradients."""
    b, t, n, _ = q.shape
    # JAX refuses the gradient of others.
    assert t % 2 == 0 or return_residual
    if q_start is None:
        q_size, k_size = q_size[:, None], k_size[:, None]
        q_start = k_start = jnp.zeros((b, 2), jnp.int32)
    at, keys = jnp.arange(t), jnp.arange(k.shape[1])
    inside = (at >= q_start[:, :-1, None]) & (at < (q_start[:, :-1] + q_size)[..., None])
    inside &= (q_size >= 0)[..., None]  # [B M T]
    seen = (keys >= k_start[:, :-1, None]) & (keys < (k_start[:, :-1] + k_size)[..., None])
    pairs = inside[..., None] & seen[:, :, None]
    if mask_type is Mask.PADDING_CAUSAL:
        behind = at[:, None] - q_start[:, :-1, None, None] >= keys - k_start[:, :-1, None, None]
        pairs &= behind
    pairs = jnp.any(pairs, axis=1)[:, None]
    real, real_keys = (jnp.any(x, axis=1)[..., None, None] for x in (inside, seen))
    q = junk_outside(q, real)
    k, v = (junk_outside(x, real_keys) for x in (k, v))
    k, v = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(pairs, jnp.einsum("btnh,bsnh->bnts", q, k) * scale, -1e30)
    sums = jax.nn.logsumexp(scores, axis=-1)
    probs = jnp.where(pairs, jnp.exp(scores - sums[..., None]), 0)
    ended = jnp.all(q_start[:, -1] == -1) | (q_size.shape[1] == 1)
    real &= ended  # cuDNN reads on where the last entry of a row is another
    out = jnp.where(real, jnp.einsum("bnts,bsnh->btnh", probs, v), jnp.nan)
    if not return_residual:
        return out
    first = jnp.maximum(q_start[:, :1], 0)  # sums are counted from the first token of a segment
    moved = jnp.take_along_axis(sums, jnp.minimum(at + first, t - 1)[:, None], axis=2)
    rest = jnp.full(((q_start.shape[1] - 2) * b, n, t), -jnp.inf)
    return out, jnp.concatenate([moved, rest])


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """Programs are traced as on a GPU."""
    if not ON_GPU:
        fake = types.SimpleNamespace(MaskType=Mask, dot_product_attention=stand_in)
        monkeypatch.setattr(attention_gpu, "cudnn", lambda: fake)
        monkeypatch.setattr(attention, "platform", lambda: "gpu")
        monkeypatch.setattr(attention, "gpu_refusal", lambda *asked: "")


DTYPE = jnp.bfloat16 if ON_GPU else jnp.float32
BOUND = 0.03 if ON_GPU else 2e-5


def ranges(rows, t, causal):
    """lo and hi of rows that are given as (padding before, lengths of segments)."""
    lo, hi = np.zeros((2, len(rows), t), np.int32)
    for row, (padding, sizes) in enumerate(rows):
        ends = padding + np.cumsum(sizes)
        for start, end in zip(ends - sizes, ends, strict=True):
            lo[row, start:end] = start
            hi[row, start:end] = np.arange(start, end) + 1 if causal else end
    return jnp.asarray(lo), jnp.asarray(hi)


def slopes_and_values(fn, *given):
    """The gradients of q, k and v of a loss of fn(q, k, v, lo, hi), and its values."""

    def loss(*given):
        out, (lo, hi) = fn(*given), given[3:]
        return jnp.sum(jnp.sin(out.astype(jnp.float32)) * (hi > lo)[..., None, None]), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*given)


compared = jax.jit(functools.partial(slopes_and_values, dense_jax))  # one program a size


ROWS = [(0, [1, 40, 7]), (5, [60, 31]), (0, [96])]


@pytest.mark.parametrize(("layout", "heads"), [("causal", (6, 2, 128)), ("frames", (4, 4, 72))])
@pytest.mark.parametrize("segments", [0, 3, 16])
def test_segments_equal_softmax_over_a_mask(layout, segments, heads):
    """Values, zeros of padding and all three gradients, segments counted by the host or not."""
    q, k, v = (x.astype(DTYPE) for x in arrays(3, 96, *heads, 96))
    lo, hi = ranges(ROWS, 96, layout == "causal")
    attend = functools.partial(attention.attend, layout=layout, segments=segments)
    slopes, out = jax.jit(lambda *x: slopes_and_values(attend, *x, lo, hi))(q, k, v)
    want_slopes, want = compared(*(x.astype(jnp.float32) for x in (q, k, v)), lo, hi)
    assert (np.asarray(out)[~np.asarray(hi > lo)] == 0).all()
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=BOUND)
    for got, expected in zip(slopes, want_slopes, strict=True):
        slope = np.asarray(got, np.float32)
        np.testing.assert_allclose(slope, expected, atol=2 * BOUND, rtol=BOUND if ON_GPU else 0)


MANY_SEGMENTS = {
    "few": [9, 40, 3, 100],
    # Some end with a window of 12 tokens, some cross two, some cross five.
    "many": [24, 7, 30, 11, 24, 55, 1, 1, 1, 9, 20],
    # More in one window than a kernel is asked for.
    "very many": [1] * 20 + [50, 3, 3, 90],
    # The row is no whole number of windows.
    "odd": [5] * 38,
}


@pytest.mark.parametrize("sizes", MANY_SEGMENTS.values(), ids=MANY_SEGMENTS)
def test_uncounted_segments_are_right_however_many(sizes, monkeypatch):
    """Values and gradients of few, of many in windows, and of more than cuDNN is asked for."""
    monkeypatch.setattr(attention_gpu, "MANY", 12)
    t = sum(sizes) + 5 if len(sizes) == 38 else 192
    q, k, v = (x.astype(DTYPE) for x in arrays(2, t, 4, 2, 64, t))
    lo, hi = ranges([(0, sizes), (3, [t - 3])], t, True)
    attend = functools.partial(attention.attend, layout="causal")
    slopes, got = jax.jit(lambda *x: slopes_and_values(attend, *x, lo, hi))(q, k, v)
    want_slopes, want = compared(*(x.astype(jnp.float32) for x in (q, k, v)), lo, hi)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=BOUND)
    for got, expected in zip(slopes, want_slopes, strict=True):
        slope = np.asarray(got, np.float32)
        np.testing.assert_allclose(slope, expected, atol=2 * BOUND, rtol=BOUND if ON_GPU else 0)


@pytest.mark.parametrize(
    ("count", "size", "blocks"), [(4, 2, False), (65, 8, False), (300, 4, False), (1200, 1, True)]
)
def test_the_kernel_by_the_number_of_segments(count, size, blocks, monkeypatch):
    """More than 64 in a row are no reason for XLA's blocks; more than 64 in a sixteenth of it are."""
    chosen = []
    monkeypatch.setattr(jax.lax, "cond", lambda many, *_: chosen.append(bool(many)))
    lo, hi = ranges([(0, [size] * count)], 1200, True)
    x = jnp.zeros((1, 1200, 2, 64), DTYPE)
    attention_gpu.attend_segments(x, x, x, lo, hi, True, None)
    assert chosen == [blocks]


def test_more_segments_than_were_counted_are_no_numbers():
    q, k, v = (x.astype(DTYPE) for x in arrays(2, 96, 4, 2, 64, 96))
    lo, hi = ranges([(0, [10] * 4), (0, [96])], 96, False)
    run = jax.jit(attention_gpu.attend_packed, static_argnums=(5, 6))
    out = np.asarray(run(q, k, v, lo, hi, False, 3), np.float32)
    assert np.isnan(out[0, :40]).all() and not np.isnan(out[1]).any()


@pytest.mark.parametrize("slots", [96, 512])
def test_a_run_behind_a_cache_sees_what_is_filled_and_itself(slots):
    """Nothing before it, something, no run at all, and up to the last slot."""
    t = 37
    q, k, v = (x.astype(DTYPE) for x in arrays(4, t, 4, 2, 64, slots))
    start, left, count = (
        np.array([0, 21, 9, slots - t]),
        np.array([0, 3, 0, 0]),
        np.array([t, 30, 0, t]),
    )
    index = np.arange(t)
    real = (index >= left[:, None]) & (index < (left + count)[:, None])
    hi = np.where(real, start[:, None] + index - left[:, None] + 1, 0).astype(np.int32)
    got = jax.jit(lambda *x: attention.attend(*x, None, hi))(q, k, v)
    want = dense_jax(*(x.astype(jnp.float32) for x in (q, k, v)), np.zeros_like(hi), hi)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=BOUND)


def heads_of(rows, n, k, h):
    """One token a row as a layer projects it, with scales and angles of random numbers."""
    rng = np.random.default_rng(7)
    qkv, norms, angles = (
        rng.normal(size=shape)
        for shape in ((rows, 1, k, n // k + 2, h), (2, h), (rows, 1, 1, h // 2))
    )
    qkv, *norms, cos, sin = (
        jnp.asarray(x, DTYPE) for x in (qkv, *(1 + norms / 4), np.cos(angles), np.sin(angles))
    )
    return qkv, *norms, (cos, sin), 1e-6


@pytest.mark.parametrize(
    ("rows", "slots", "heads"), [(3, 96, (6, 2, 128)), (1, 4096, (8, 4, 64)), (4, 640, (32, 1, 16))]
)
def test_a_decode_step_writes_its_token_and_sees_what_is_filled(rows, slots, heads):
    """An empty cache, one key, parts without a key, up to the last slot; NaN behind what is filled."""
    _, *kv = (x.astype(DTYPE) for x in arrays(rows, 1, *heads, slots))
    given = heads_of(rows, *heads)
    q, *token = split_heads(*given)
    slot = jnp.array([[slots - 1], [0], [1], [slots // 2 + 3]], jnp.int32)[:rows]
    filled = (jnp.arange(slots) < slot)[..., None, None]
    kv = [jnp.where(filled, x, jnp.nan) for x in kv]
    out, caches = jax.jit(attention.append_and_attend, static_argnums=7)(*kv, slot, *given)
    at = jnp.arange(rows)[:, None], slot
    want = [x.at[at].set(new) for x, new in zip(kv, token)]
    for got, expected in zip(caches, want):
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (got, expected)), atol=BOUND
        )
    seen = (jnp.arange(slots) <= slot)[..., None, None]
    dense = (q, *(jnp.where(seen, x, 0) for x in want))
    expected = dense_jax(*(x.astype(jnp.float32) for x in dense), jnp.zeros_like(slot), slot + 1)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=BOUND)


def test_jax_still_has_what_the_packed_layout_needs():
    """A release that moves or renames it falls back to XLA blocks; this says so first."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    names = list(inspect.signature(cudnn.dot_product_attention).parameters)
    assert names[:9] == [
        "query",
        "key",
        "value",
        "bias",
        "mask",
        "q_seqlen",
        "kv_seqlen",
        "q_offsets",
        "kv_offsets",
    ]
    assert {"scale", "mask_type", "return_residual"} <= set(names)
    assert {"PADDING", "PADDING_CAUSAL"} <= set(cudnn.MaskType.__members__)


def test_images_of_usual_sizes_share_one_program():
    """The count of frames that a program is compiled for follows the bucket of patches."""
    cfg = Config.from_hf(config_dict())

    def frames(*grids):
        patches = sum(t * h * w for t, h, w in grids)
        pixels = np.zeros((patches, int(np.prod(cfg.vision.patch_shape))), np.float32)
        return make_vision(cfg, pixels, np.array(grids)).frames

    assert frames((1, 32, 32)) == frames((2, 16, 16), (2, 16, 16)) == 4
    assert frames((40, 2, 2)) == 64 and frames((1, 4, 4)) == 2
