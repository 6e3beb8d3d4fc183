"""The two ways through the experts are one function; the kernels of a GPU and a TPU."""

import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest

from qwen3vl_jax.model import moe
from qwen3vl_jax.model.moe import experts_ragged, experts_scan, route

N, D, M, E, A = 23, 12, 10, 7, 3


def weights():
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = ((N, D), (E, D), (E, D, 2 * M), (E, M, D))
    return [jax.random.normal(k, s) * s[-1] ** -0.5 for k, s in zip(keys, shapes, strict=True)]


def naive(x, share, chosen, gate_up, down):
    out = np.zeros((N, D))
    x, share, gate_up, down = (np.asarray(a, np.float64) for a in (x, share, gate_up, down))
    for n in range(N):
        for a in range(chosen.shape[1]):
            hidden = x[n] @ gate_up[chosen[n, a]]
            gate, up = hidden[:M], hidden[M:]
            out[n] += share[n, a] * ((gate / (1 + np.exp(-gate)) * up) @ down[chosen[n, a]])
    return out


@pytest.mark.parametrize("run", [experts_scan, experts_ragged])
def test_experts_and_their_gradients(run):
    x, router, gate_up, down = weights()
    share, (_, chosen) = route(x, router, A)
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-6)
    want = naive(x, share, np.asarray(chosen), gate_up, down)
    np.testing.assert_allclose(
        run(x, share, chosen, gate_up, down, "silu"), want, rtol=1e-4, atol=1e-4
    )

    def loss(fn):
        def of(x, gate_up, down, router):
            share, (_, chosen) = route(x, router, A)
            return jnp.sum(jnp.sin(fn(x, share, chosen, gate_up, down, "silu")))

        return jax.jit(jax.grad(of, argnums=(0, 1, 2, 3)))(x, gate_up, down, router)

    for a, b in zip(loss(run), loss(experts_scan), strict=True):
        assert ours.worst(a, b) < 1e-5


@pytest.mark.parametrize("run", [experts_scan, experts_ragged])
def test_all_tokens_to_one_expert(run):
    x, _, gate_up, down = weights()
    chosen = jnp.full((N, 1), 5)
    want = naive(x, np.ones((N, 1)), np.asarray(chosen), gate_up, down)
    got = run(x, jnp.ones((N, 1)), chosen, gate_up, down, "silu")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_gpu_kernel_is_lowered_once_for_all_layers(monkeypatch):
    """Layers of the same shape share one function: tokamax's kernels take seconds each to lower."""
    traced = []

    def ragged_dot(x, w, sizes):
        traced.append(x.shape)
        return jax.lax.ragged_dot(x, w, sizes)

    monkeypatch.setattr(moe, "platform", lambda: "gpu")
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(ragged_dot=ragged_dot))
    moe._tokamax_kernel.cache_clear()
    x, sizes = jnp.ones((6, 5)), jnp.array([2, 4], jnp.int32)
    w = jax.random.normal(jax.random.key(0), (3, 2, 5, 5))

    def layers(x):
        for layer in w:
            x = moe.ragged_dot(x, layer, sizes)
        return x

    lowered = jax.jit(layers).lower(x)
    assert traced == [(6, 5)]
    want = x
    for layer in w:
        want = jax.lax.ragged_dot(want, layer, sizes)
    np.testing.assert_allclose(lowered.compile()(x), want, rtol=1e-5)
    assert lowered.as_text().count("func.func private @ragged_dot") == 1


def test_one_expert_of_a_device_is_a_plain_product():
    """libtpu refuses a grouped product of one group; rows after the run are zeros."""
    x = np.zeros((6, 8), np.float32)
    x[:4] = np.random.default_rng(0).normal(size=(4, 8))
    w = np.random.default_rng(1).normal(size=(1, 8, 5)).astype(np.float32)
    sizes = jnp.array([4], jnp.int32)
    primitives = [e.primitive.name for e in jax.make_jaxpr(moe.ragged_dot)(x, w, sizes).eqns]
    assert primitives[-1] == "dot_general"
    want = jax.lax.ragged_dot(x, w, sizes)
    np.testing.assert_allclose(moe.ragged_dot(x, w, sizes), want, atol=1e-6)


def test_a_gpu_without_the_kernel_is_told_once(monkeypatch, caplog):
    """The extra `moe` is not installed: XLA's product serves, and one line names the extra."""
    monkeypatch.setattr(moe, "platform", lambda: "gpu")
    monkeypatch.setitem(sys.modules, "tokamax", None)
    moe._tokamax_kernel.cache_clear()
    x, w, sizes = jnp.ones((3, 5)), jnp.ones((2, 5, 4)), jnp.array([1, 2], jnp.int32)
    for _ in range(2):
        np.testing.assert_allclose(moe.ragged_dot(x, w, sizes), 5)
    assert [record.message for record in caplog.records] == [
        "experts run dense on this GPU: qwen3vl-jax[moe] has a grouped kernel"
    ]


@functools.partial(jax.jit, static_argnums=0)
def grouped_slopes(fn, x, w, sizes, slope):
    """The gradients of x and w of a grouped product; one program a dtype."""
    return jax.vjp(lambda x, w: fn(x, w, sizes), x, w)[1](slope)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 1e-3)])
@pytest.mark.parametrize(
    "sizes", [(100, 0, 300, 113), (0, 0, 0, 700), (1, 2, 3, 4), (0,) * 4, (512, 128, 60, 0)]
)
def test_the_gradient_of_a_grouped_product_on_a_tpu(sizes, dtype, bound):
    """XLA's, which is dense: uneven and empty groups, one expert alone, rows of no expert."""
    rows, key = 700, jax.random.split(jax.random.key(2), 3)
    shapes = ((rows, 130), (4, 130, 256), (rows, 256))
    x, w, slope = (jax.random.normal(k, s, dtype) for k, s in zip(key, shapes, strict=True))
    sizes = jnp.array(sizes, jnp.int32)
    slope = jnp.where(jnp.arange(rows)[:, None] < sizes.sum(), slope, 0)

    given = (x, w, sizes, slope)
    pairs = zip(
        grouped_slopes(moe.ragged_dot_tpu, *given), grouped_slopes(jax.lax.ragged_dot, *given)
    )
    for got, want in pairs:
        assert got.dtype == want.dtype
        wide = np.asarray(want, np.float32)
        np.testing.assert_allclose(
            np.asarray(got, np.float32), wide, atol=bound * np.abs(wide).max()
        )
