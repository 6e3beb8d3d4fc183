"""What the policies of jax.checkpoint save: the kernels of attention run forward once, but for "full"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from qwen3vl_jax.model import attention, attention_tpu, layers

LO, HI = (np.zeros((1, 128), np.int32), np.arange(1, 129, dtype=np.int32)[None])


def primitives(jaxpr, name):
    """How often a primitive stands in a jaxpr, inner ones included, calls without a result left out."""
    used = [e for e in jaxpr.eqns if e.outvars]
    inner = (y for e in used for x in e.params.values() for y in jax.tree.leaves(x, is_leaf=_holds))
    found = sum(primitives(getattr(x, "jaxpr", x), name) for x in inner if _holds(x))
    return found + sum(e.primitive.name == name for e in used)


def _holds(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def of_gradient(name, remat, segments):
    """The count of a primitive in the gradient of two layers of attention."""

    def body(x, w, i):
        q = layers.linear(x, w).reshape(1, 128, 2, 64)
        out = attention.attend(q, q, q, LO, HI, layout="causal", segments=segments)
        return layers.linear(out.reshape(x.shape), w), None

    def loss(w, x):
        return jnp.sum(layers.run_layers(body, x, w, remat)[0].astype(jnp.float32))

    shapes = ((2, 128, 128), (1, 128, 128))
    args = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return primitives(jax.make_jaxpr(jax.grad(loss))(*args).jaxpr, name)


TIMES = [("full", 2), ("narrow", 1), ("dots", 1), ("none", 1)]


@pytest.mark.parametrize(("remat", "times"), TIMES)
@pytest.mark.parametrize(("segments", "calls", "again"), [(4, 1, 0), (20, 1, 1), (0, 2, 1)])
def test_cudnn(remat, times, segments, calls, again, monkeypatch):
    """Many segments are computed again key head by key head; uncounted ones in two calls."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_400)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "gpu_refusal", lambda *_: "")
    count = functools.partial(of_gradient, remat=remat, segments=segments)
    assert count(layers.CUDNN) == calls * (times + again)
    assert count(layers.CUDNN.replace("fwd", "bwd")) == calls


@pytest.mark.parametrize(("remat", "times"), TIMES)
def test_splash(remat, times, monkeypatch):
    """Of its three kernels two are those of the backward pass."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention_tpu, "platform", lambda: "tpu")
    assert of_gradient("pallas_call", remat, 4) == times + 2
