"""Forward mode (jax.jvp, jacfwd) of the model: against differences, reverse mode, and one on the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.model import layers, matmul
from qwen3vl_jax.model.matmul import gather_rows


def model(moe):
    params, cfg = ours.tiny_model("shallow", moe)
    row = tiny.inputs(tiny.config_dict("shallow", moe), "one_picture")
    return q3.stack_layers(params), cfg, q3.make_batch(cfg, **row, pad=False)


def random_like(tree, seed):
    """Directions of the size of what they change."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) * np.std(np.asarray(x))).astype(x.dtype), tree
    )


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(
        sum(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs)
    )


@pytest.mark.parametrize("moe", [False, True])
def test_of_logits_by_weights_and_pixels(moe):
    """The directional difference, and <u, J v> = <J^T u, v>; the tower and the experts too."""
    params, cfg, batch = model(moe)

    @jax.jit
    def logits(params, pixels):
        seen = batch.replace(vision=batch.vision.replace(pixels=pixels))
        return q3.forward(params, cfg, seen)

    at = (params, jnp.asarray(batch.vision.pixels))
    way = (random_like(params, 1), random_like(at[1], 2))
    out, change = jax.jit(lambda at, way: jax.jvp(logits, at, way))(at, way)
    u = jax.random.normal(jax.random.key(3), out.shape)
    back = jax.jit(lambda at, u: jax.vjp(logits, *at)[1](u))(at, u)
    assert abs(dot(u, change) - dot(back, way)) < 1e-4 * np.sqrt(dot(u, u) * dot(change, change))
    size = 3e-5 if moe else 1e-3  # a router's choice must not change
    at, way = jax.tree.map(np.asarray, (at, way))
    ends = [
        logits(*jax.tree.map(lambda x, d, s=s: x + np.float32(s * size) * d, at, way))
        for s in (1, -1)
    ]
    assert ours.worst(change, (ends[0] - ends[1]) / (2 * size)) < (2e-2 if moe else 5e-3)


def test_jacobians_and_second_derivatives():
    """jacfwd equals jacrev; a Hessian's product with a vector the same by forward over reverse."""
    params, cfg, batch = model(False)
    batch = batch.replace(labels=batch.tokens)

    def loss(norm):
        return q3.loss_fn({**params, "norm": norm}, cfg, batch)[0]

    norm = params["norm"]
    gradient = jax.jit(jax.grad(loss))(norm)
    assert ours.worst(jax.jit(jax.jacfwd(loss))(norm), gradient) < 1e-4
    way = random_like(jnp.arange(norm.size, dtype=jnp.float32), 0) / norm.size
    curved = jax.jit(lambda at: jax.jvp(jax.grad(loss), (at,), (way,))[1])(norm)
    again = jax.jit(jax.grad(lambda at: jnp.vdot(jax.grad(loss)(at), way)))(norm)
    assert ours.worst(curved, again) < 1e-4


@pytest.mark.parametrize("rounded", [jnp.float32, jnp.bfloat16])
def test_16_bit_products_and_lookups(rounded):
    """<u, J v> = <J^T u, v>, each rounded as its dtype is; no product for a frozen weight."""
    product = functools.partial(matmul.product, dtype=rounded)
    rng = np.random.default_rng(0)
    x, w, u, d_x, d_w = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16)
        for s in ((64, 48), (40, 48), (64, 40), (64, 48), (40, 48))
    )
    out, change = jax.jvp(product, (x, w), (d_x, d_w))
    back = jax.vjp(product, x, w)[1](u.astype(rounded))
    assert (out.dtype, change.dtype, back[1].dtype) == (rounded, rounded, jnp.bfloat16)
    both = dot(u, change), dot(back, (d_x, d_w))
    assert abs(both[0] - both[1]) < 2**-7 * np.sqrt(dot(u, u) * dot(change, change))
    jaxpr = str(jax.make_jaxpr(lambda x: jax.jvp(lambda x: product(x, w), (x,), (x,)))(x))
    assert jaxpr.count("dot_general") == 2
    found, change = jax.jvp(lambda table: gather_rows(table, jnp.array([3, 3, 0])), (w,), (d_w,))
    np.testing.assert_array_equal(change, d_w[jnp.array([3, 3, 0])])
    np.testing.assert_array_equal(found, w[jnp.array([3, 3, 0])])


@pytest.mark.parametrize(
    ("rows", "dtype", "written"),
    [
        (256, jnp.bfloat16, "bf16"),
        (255, jnp.bfloat16, "f32"),
        (256, jnp.float32, "f32"),
    ],
)
def test_a_gpu_writes_products_of_many_rows_in_16_bits(monkeypatch, rows, dtype, written):
    """Values and gradients, weights in fp32 as in training, are those of fp32 products, rounded once."""
    rng = np.random.default_rng(0)
    x, w, bias, slope = (
        jnp.asarray(rng.normal(size=s), t)
        for s, t in (
            ((rows, 48), dtype),
            ((40, 48), jnp.float32),
            ((40,), jnp.float32),
            ((rows, 40), dtype),
        )
    )

    def run(*given):
        out, back = jax.vjp(layers.linear, *given)
        return out, *back(slope)

    want = run(x, w, bias)
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    for got, expected in zip(run(x, w, bias), want, strict=True):
        assert got.dtype == expected.dtype
        error = jnp.abs(got.astype(jnp.float32) - expected.astype(jnp.float32)).max()
        assert error <= 2**-7 * jnp.abs(expected.astype(jnp.float32)).max()
    (first, *_) = str(jax.make_jaxpr(layers.linear)(x, w)).split("dot_general")
    assert f":{written}[{rows},40]" in first.splitlines()[-1]
