"""Losses by themselves: pieces of the vocabulary against the whole, z-loss, attention dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest

from benchmarks import loss_memory
from qwen3vl_jax.config import IGNORE_INDEX
from qwen3vl_jax.model.attention import BLOCK, Dropout, attend, causal_ranges
from qwen3vl_jax.model.layers import linear_fp32
from qwen3vl_jax.model.matmul import gather_rows, product
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.model.structs import Batch
from qwen3vl_jax.model.transformer import full_attention
from qwen3vl_jax.training import losses

N, D, V = 50, 24, 97


@pytest.fixture(scope="module")
def head():
    """(rows, table, labels, weights), some labels -100, one word never a label."""
    rng = np.random.default_rng(0)
    x, table = (rng.normal(size=(n, D)).astype(np.float32) for n in (N, V))
    labels = rng.integers(0, V - 1, N)
    labels[::7] = IGNORE_INDEX
    return x, table, labels, rng.random(N, np.float32)


def of(head, cross_entropy):
    """(loss + 0.1 z, all sums), gradients by rows and table."""
    x, table, labels, weights = head

    def loss(x, table):
        sums = cross_entropy(x, table, labels, weights)
        return sums.loss + 0.1 * sums.z, sums

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, table)


@pytest.mark.parametrize("chunk", [16, 97, 4096])
def test_pieces_of_the_vocabulary_are_the_whole(head, chunk):
    """Sums, and gradients to rounding, whether pieces divide the vocabulary or not."""
    whole = of(head, lambda x, t, *told: loss_memory.token_sums(linear_fp32(x, t), *told))
    pieces = of(head, functools.partial(losses.chunked_cross_entropy, chunk=chunk))
    for got, want in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        assert ours.worst(got, want) < 2e-6
    assert pieces[0][1].tokens == (head[2] >= 0).sum()


def test_a_frozen_or_8_bit_head(head):
    """Only what is trained gets a gradient: the rows alone in front of a table of bytes."""
    x, table, *told = head
    scale = np.abs(table).max(1, keepdims=True) / 127
    eight = Quantized(jnp.asarray(np.round(table / scale), jnp.int8), jnp.asarray(scale))
    plain = np.asarray(eight.values, np.float32) * scale

    def slope(table):
        return jax.grad(lambda x: losses.chunked_cross_entropy(x, table, *told, 16).loss)(x)

    assert ours.worst(slope(eight), slope(plain)) < 2e-6


def test_z_loss_is_its_formula(head):
    """Weighted squares of the logarithm of the sum of exp(logits), in float64."""
    x, table, labels, weights = head
    total = np.log(np.exp(x.astype(np.float64) @ table.T.astype(np.float64)).sum(-1))
    sums = losses.chunked_cross_entropy(*head, 16)
    assert abs(float(sums.z) / np.sum((weights * total**2)[labels >= 0]) - 1) < 1e-6


def test_memory_of_the_loss():
    """At most an eighth of the plain way, value and gradients; benchmarks/loss_memory.py at full size."""
    shape = {"tokens": 512, "vocab": 8192, "hidden": 64, "dtype": "bfloat16"}
    whole = loss_memory.temp_bytes(loss_memory.plain, **shape)
    pieces = functools.partial(loss_memory.chunked, chunk=512)
    assert whole > 512 * 8192 * 4
    assert loss_memory.temp_bytes(pieces, **shape) < whole / 8


def test_gradients_of_bf16_products():
    """A weight's gradient comes in the weight's dtype without a stop in bf16; rows add up in fp32."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((40, 8), (16, 8)))
    for grads, want in zip(
        jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1))(x, w),
        jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w.T)), (0, 1))(x, w),
        strict=True,
    ):
        assert ours.worst(grads, want) < 1e-6
    low = jnp.asarray(x, jnp.bfloat16)
    d_x, d_w = jax.grad(lambda x, w: jnp.sum(product(x, w)), (0, 1))(low, jnp.asarray(w))
    assert (d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.broadcast_to(np.asarray(low, np.float64).sum(0), w.shape)
    assert ours.worst(d_w, exact) < 1e-6
    table = jnp.zeros((4, 2), jnp.bfloat16)
    index = jnp.zeros(1000, jnp.int32)
    total = jax.grad(lambda t: jnp.sum(gather_rows(t, index).astype(jnp.float32)))(table)
    assert float(total[0, 0]) == 1000  # one by one in bf16 it would stop at 256


def test_attention_dropout():
    """Rate 0 is none; a key always drops the same; the mean stays; blocks and layers differ."""
    t = 4 * BLOCK - 100  # four blocks of queries and of keys
    q, k = jnp.zeros((1, t, 2, 4)), jnp.zeros((1, t, 1, 4))
    v = jnp.ones((1, t, 1, 4))
    hi = jnp.full((1, t), t)
    run = jax.jit(lambda key, rate: attend(q, k, v, 0 * hi, hi, Dropout(key, rate)))
    key = jax.random.key(3)
    np.testing.assert_array_equal(run(key, 0.0), attend(q, k, v, 0 * hi, hi))
    out = np.asarray(run(key, 0.25))
    np.testing.assert_array_equal(out, run(key, 0.25))
    assert np.abs(out - np.asarray(run(jax.random.key(4), 0.25))).max() > 0.01
    # Uniform attention over ones: each query's result is its kept share over 0.75.
    share = out[0, :, :, 0]
    deviation = (0.25 / 0.75 / t) ** 0.5
    assert abs(share.mean() - 1) < 4 * deviation / share.size**0.5
    assert 0.9 * deviation < share.std() < 1.1 * deviation
    assert abs(np.corrcoef(share[: t - BLOCK, 0], share[BLOCK:, 0])[0, 1]) < 0.2
    ids = jnp.ones((1, 9), jnp.int32)
    batch = Batch(ids, jnp.zeros((3, 1, 9), jnp.int32), ids, None, jnp.zeros(1))
    mix = full_attention(batch, Dropout(key, 0.5))
    q, k = jax.random.normal(key, (2, 1, 9, 2, 4))
    first, again, second = (np.asarray(mix(i, q, k, k)[0]) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.01
    assert causal_ranges(ids)[1].max() == 9
