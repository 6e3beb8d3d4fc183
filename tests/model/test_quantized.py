"""8-bit weights in the functions that multiply with them: exact against the weights multiplied out."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ours
import pytest

from qwen3vl_jax.checkpoint.device_load import as_dicts, as_structs
from qwen3vl_jax.config import Config
from qwen3vl_jax.model.layers import linear, linear_fp32
from qwen3vl_jax.model.moe import experts_ragged, experts_scan
from qwen3vl_jax.model.quantized import Quantized, dequantize, embedding_lookup
from qwen3vl_jax.runtime.console import memory_of_batch

BOUND = 1e-5
# Shape of a weight, of its scales, axes that a product sums over.
LINEARS = {
    "channels": ((3, 4, 8, 12), (3, 4, 8, 1), 1),
    "heads": ((6, 4, 8), (6, 1, 1), 2),
    "blocks": ((3, 4, 8, 12), (3, 4, 2, 3), 1),
    "blocks of heads": ((6, 4, 8), (3, 4, 2), 2),
    "blocks of whole rows": ((6, 12), (3, 1), 1),
    "one block": ((6, 12), (1, 1), 1),
}


def quantized(shape, scales, seed=0, kind=np.int8):
    """Random codes and scales."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, shape).astype(np.int8)
    if kind != np.int8:
        values = (values / 8).astype(kind)
    return Quantized(jnp.asarray(values), jnp.asarray(rng.uniform(0.5, 2, scales), jnp.float32))


def by_index(w):
    """The weight in float64: every code times the scale of its box, one by one."""
    out = np.empty(w.shape)
    for place in np.ndindex(*w.shape):
        box = tuple(i * m // n for i, n, m in zip(place, w.shape, w.scale.shape, strict=True))
        out[place] = float(w.values[place]) * float(w.scale[box])
    return out


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("kind", [np.int8, ml_dtypes.float8_e4m3fn])
def test_linear_and_rows(name, kind):
    """Products, rows and the weight itself, for scales outside the sum and inside."""
    shape, scales, in_dims = LINEARS[name]
    w = quantized(shape, scales, kind=kind)
    full = by_index(w)
    np.testing.assert_allclose(dequantize(w, jnp.float32), full, rtol=1e-6)
    inner = shape[len(shape) - in_dims :]
    x = jax.random.normal(jax.random.key(1), (5, *inner))
    flat = full.reshape(*shape[: len(shape) - in_dims], -1)
    want = np.einsum("nd,...d->n...", np.asarray(x, np.float64).reshape(5, -1), flat)
    assert ours.worst(linear_fp32(x, w, in_dims), want) < BOUND
    half = linear(x.astype(jnp.bfloat16), w, in_dims=in_dims)
    assert half.dtype == jnp.bfloat16
    assert ours.worst(half.astype(jnp.float32), want) < 2**-6
    index = np.arange(shape[0])[None, ::-1]
    np.testing.assert_allclose(embedding_lookup(w, index, jnp.float32), full[index], rtol=1e-6)


@pytest.mark.parametrize("name", LINEARS)
def test_sixteen_bits_are_written_only_where_scales_change_inside_the_sum(name):
    """With a scale an output channel no array of the weight's size is made but its conversion."""
    shape, scales, in_dims = LINEARS[name]
    w, x = quantized(shape, scales), jnp.ones((1, *shape[len(shape) - in_dims :]), jnp.bfloat16)
    closed = jax.make_jaxpr(lambda x, w: linear_fp32(x, w, in_dims))(x, w)
    size = int(np.prod(shape))
    made = [
        str(eqn.primitive)
        for eqn in closed.jaxpr.eqns
        if any(out.aval.size == size for out in eqn.outvars)
    ]
    outside = all(n == 1 for n in scales[len(scales) - in_dims :])
    assert ("mul" in made) != outside
    assert "convert_element_type" in made


@pytest.mark.parametrize("kind", [np.int8, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize(
    "scales", [((1, 20), (1, 12)), ((3, 5), (2, 4))], ids=["channels", "blocks"]
)
@pytest.mark.parametrize("run", [experts_scan, experts_ragged])
def test_experts(run, scales, kind):
    """Both ways through the experts are that of the weights multiplied out, also under jit."""
    n, d, m, e = 9, 12, 10, 7
    gate_up = quantized((e, d, 2 * m), (e, *scales[0]), 1, kind)
    down = quantized((e, m, d), (e, *scales[1]), 2, kind)
    x = jax.random.normal(jax.random.key(0), (n, d)) / 100
    chosen = jnp.asarray(
        np.random.default_rng(0).permuted(np.tile(np.arange(e), (n, 1)), axis=1)[:, :3]
    )
    share = jnp.full((n, 3), 1 / 3)
    want = run(
        x, share, chosen, dequantize(gate_up, jnp.float32), dequantize(down, jnp.float32), "silu"
    )
    got = jax.jit(run, static_argnums=5)(x, share, chosen, gate_up, down, "silu")
    assert ours.worst(got, want) < BOUND


def test_trees():
    """Dicts of values and scale become structs and come back; a norm's scale is no weight's."""
    w = quantized((4, 6), (4, 1))
    tree = {
        "layers": [{"o": {"values": w.values, "scale": w.scale}, "ln": {"scale": 1, "bias": 2}}]
    }
    structs = as_structs(tree)
    assert isinstance(structs["layers"][0]["o"], Quantized)
    assert structs["layers"][0]["ln"] == {"scale": 1, "bias": 2}
    assert jax.tree.leaves(structs)[-2] is w.values
    assert as_dicts(structs) == tree


def test_sizes_of_8_bit_weights():
    """infer.py's out-of-memory line counts codes as bytes, and the cache in the dtype it has."""
    w = quantized((8, 4), (8, 1))
    params = {"embed": w, "norm": jnp.ones(4, jnp.bfloat16)}

    class Batch:
        tokens = np.zeros((1, 16))
        vision = None

    cfg = Config.named("2b")
    found = memory_of_batch(params, cfg, Batch)
    assert found["weights"] == 32 + 32 + 8
    assert found["cache (about)"] == 2 * 28 * 8 * 128 * 32 * 2
