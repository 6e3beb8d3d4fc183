"""attend() against softmax over a dense mask, for every kind of range and both loops."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3vl_jax.__main__ import backends
from qwen3vl_jax.inference.scoring import attention_probs
from qwen3vl_jax.model import attention
from qwen3vl_jax.model.attention import BLOCK, attend, causal_ranges, gpu_refusal


def dense(q, k, v, lo, hi):
    _b, _t, n, h = q.shape
    k, v = (np.repeat(np.asarray(x, np.float64), n // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), k) / np.sqrt(h)
    keys = np.arange(k.shape[1])
    seen = (keys >= lo[..., None]) & (keys < hi[..., None])
    weights = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    return np.einsum("bnts,bsnh->btnh", weights, v), weights


def arrays(b, t, n, k, h, s, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def ranges(kind, b, t, s, rng):
    index = np.arange(t)
    if kind == "causal":
        return np.zeros((b, t), int), np.broadcast_to(index + 1, (b, t))
    if kind == "left padded":
        pad = rng.integers(0, t // 2, (b, 1))
        return np.broadcast_to(pad, (b, t)), np.maximum(index + 1, pad)
    if kind == "frames":
        cuts = np.sort(rng.choice(np.arange(1, s), (b, 5)), 1)
        cuts = np.concatenate([np.zeros((b, 1), int), cuts, np.full((b, 1), s)], 1)
        own = np.stack([np.searchsorted(c, index, side="right") - 1 for c in cuts])
        return np.take_along_axis(cuts, own, 1), np.take_along_axis(cuts, own + 1, 1)
    lo = rng.integers(0, s, (b, t))
    return lo, lo + rng.integers(0, s, (b, t)).clip(0, s - lo)  # some empty


KINDS = ["causal", "left padded", "frames", "any"]


def dense_jax(q, k, v, lo, hi):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    s = jnp.arange(k.shape[1])
    seen = ((s >= lo[..., None]) & (s < hi[..., None]))[:, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), -1), 0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def with_slopes(fn):
    """A jitted function of (q, k, v, lo, hi): fn's result, and slopes of q, k and v."""

    def loss(*x):
        out = fn(*x)
        return jnp.sum(jnp.sin(out)), out

    def run(*x):
        slopes, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*x)
        return out, slopes

    return jax.jit(run)


attended, compared = (
    with_slopes(attend),
    with_slopes(dense_jax),
)  # one program a size, for all kinds


# Less than a block, blocks and a part of one more, of every kind; whole blocks of those that skip some.
SMALL_BLOCK = 64
SIZES = [(size, kind) for size in (37, 2 * SMALL_BLOCK + 47) for kind in KINDS]
SIZES += [(4 * SMALL_BLOCK, "causal"), (4 * SMALL_BLOCK, "frames")]


@pytest.mark.parametrize(("size", "kind"), SIZES)
def test_equals_dense_softmax_and_its_gradient(size, kind, monkeypatch):
    """In small blocks; other tests run those of the model."""
    monkeypatch.setattr(attention, "BLOCK", SMALL_BLOCK)
    b, n, k, h = 2, 6, 2, 8
    q, key, v = arrays(b, size, n, k, h, size)
    lo, hi = ranges(kind, b, size, size, np.random.default_rng(size))
    want, probs = dense(q, key, v, lo, hi)
    lo, hi = (jnp.asarray(x, jnp.int32) for x in (lo, hi))
    got, slopes = attended(q, key, v, lo, hi)
    np.testing.assert_allclose(got, want, atol=2e-6)
    if size < 100:
        seen = np.asarray(hi > lo)[:, None, :, None]
        np.testing.assert_allclose(attention_probs(q, key, lo, hi) * seen, probs, atol=1e-6)
    for got, want in zip(slopes, compared(q, key, v, lo, hi)[1], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("slots", [64, 4 * BLOCK])
def test_a_decode_step_sees_just_the_filled_slots(slots):
    q, k, v = arrays(3, 1, 6, 2, 8, slots)
    reach = np.array([[1], [slots // 3], [slots]])
    want, _ = dense(q, k, v, reach * 0, reach)
    got = jax.jit(lambda *x: attend(*x[:3], None, x[3]))(q, k, v, jnp.asarray(reach))
    np.testing.assert_allclose(got, want, atol=2e-6)
    beyond = jnp.arange(slots)[None, :, None, None] >= reach[:, :, None, None]
    junk = [jnp.where(beyond, jnp.nan, x) for x in (k, v)]
    clean = [jnp.where(beyond, 0.0, x) for x in (k, v)]
    assert np.isnan(np.asarray(junk[0])).any()
    same = attend(q, *clean, None, jnp.asarray(reach))
    np.testing.assert_allclose(same, want, atol=2e-6)


def test_empty_ranges_give_zeros():
    q, k, v = arrays(1, 5, 2, 1, 8, 5)
    none = jnp.zeros((1, 5), jnp.int32)
    np.testing.assert_array_equal(attend(q, k, v, none, none), 0)


def test_bf16_sums_in_fp32():
    q, k, v = arrays(1, 600, 4, 2, 16, 600)
    lo, hi = (jnp.asarray(x, jnp.int32) for x in ranges("causal", 1, 600, 600, None))
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    want, _ = dense(*(np.asarray(x, np.float32) for x in half), np.asarray(lo), np.asarray(hi))
    got = attend(*half, lo, hi)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02)


def test_causal_ranges_of_packed_and_padded_rows():
    lo, hi = causal_ranges(jnp.array([[0, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]))
    np.testing.assert_array_equal(lo, [[0, 1, 1, 1, 4, 4], [0, 0, 0, 3, 3, 3]])
    np.testing.assert_array_equal(hi, [[0, 2, 3, 4, 5, 6], [1, 2, 3, 3, 3, 3]])


def test_what_cudnn_cannot_do_is_said_once(caplog):
    gpu_refusal.cache_clear()
    with caplog.at_level(logging.WARNING, "qwen3vl_jax"):
        reasons = {gpu_refusal("bfloat16", 7) for _ in range(3)}
    assert len(caplog.records) == 1 and len(reasons) == 1 and reasons != {""}
    assert "bfloat16" in caplog.text and "H = 7" in caplog.text
    assert "float32" in gpu_refusal("float32", 64)


def test_backends_are_listed():
    names = {name: available for name, available, _ in backends()}
    here = jax.default_backend()
    assert names == {"xla blocks": True, "cudnn": here == "gpu", "splash": here == "tpu"}


@pytest.mark.parametrize("head", [64, 72, 128])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("causal", "prompt"),
        ("causal", "any"),
        ("prefix", "frames"),
        ("right padded", "causal"),
        ("frames", "frames"),
    ],
)
def test_half_precision_on_whatever_kernel_serves_it(kind, layout, head):
    """Causal and prefix rows on whatever serves them: within rounding of fp64."""
    b, t, n, k = 2, 320, 4, 2
    q, key, v = (x.astype(jnp.bfloat16) for x in arrays(b, t, n, k, head, t))
    index = np.broadcast_to(np.arange(t), (b, t))
    length = np.array([[t], [200]])
    if kind == "frames":
        lo, hi = ranges(kind, b, t, t, np.random.default_rng(0))
    else:
        lo, hi = index * 0, index + 1 if kind != "prefix" else np.broadcast_to(length, (b, t))
        if kind != "causal":
            hi = np.where(index < length, hi, lo)
    want, _ = dense(*(np.asarray(x, np.float32) for x in (q, key, v)), lo, hi)
    lo, hi = (jnp.asarray(x, jnp.int32) for x in (lo, hi))
    run = jax.jit(functools.partial(attend, layout=layout))
    got = np.asarray(run(q, key, v, lo, hi), np.float32)
    seen = np.asarray(hi > lo)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[seen], want[seen], atol=0.03)
