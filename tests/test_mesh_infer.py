"""Eight devices answer as one does: prefill, decode, extend, generate, the engine, and loading."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, model, on_mesh

import qwen3vl_jax as q3
from qwen3vl_jax.cache import init_cache

MESHES = {
    "tensor": {"tensor": 2},
    "fsdp": {"fsdp": 4, "tensor": 2},
    "expert": {"expert": 4, "tensor": 2},
    "context": {"data": 2, "sequence": 2, "tensor": 2},
    "repeated": {"tensor": 8},  # more than the two key/value heads, as one host has the 8B
}


@functools.partial(jax.jit, static_argnames="cfg")
def everything(params, cfg, batch, more):
    """Logits of whole rows, of eight greedy steps with their tokens, and after a picture more."""
    cache, logits = q3.prefill(params, cfg, batch, 96)

    def step(carry, _):
        cache, logits = carry
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return q3.decode_step(params, cfg, cache, token), (token, logits)

    (cache, _), (tokens, steps) = jax.lax.scan(step, (cache, logits), length=8)
    return q3.forward(params, cfg, batch), tokens, steps, q3.extend(params, cfg, cache, more)[1]


@functools.cache
def case_of(sparse):
    """(model, four rows with pictures and a clip, a picture for each, what one device answers)."""
    one = model(sparse)
    batch, more = one.batch("short", "text", "clip", "one_picture"), one.batch(*["short"] * 4)
    return one, batch, more, everything(one.params, one.cfg, batch, more)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_forward_decode_and_extend_equal_one_device(sparse, name):
    one, batch, more, want = case_of(sparse)
    mesh = mesh_of(**MESHES[name])
    with jax.set_mesh(mesh):
        got = everything(on_mesh(one.params, one.cfg, mesh), one.cfg, batch, more)
    real = np.asarray(batch.segment_ids) > 0
    assert ours.worst(np.asarray(got[0])[real], np.asarray(want[0])[real]) < 1e-5
    np.testing.assert_array_equal(got[1], want[1])
    assert len(np.unique(got[1])) > 4
    assert ours.worst(got[2], want[2]) < 1e-5
    assert ours.worst(got[3], want[3]) < 1e-5


def test_steps_keep_their_program_and_their_memory():
    """The cache is cut by rows and heads, given on in place, and no step is compiled twice."""
    one, mesh = model(False), mesh_of(fsdp=4, tensor=2)
    batch = one.batch("short", "text", "clip", "one_picture")
    with jax.set_mesh(mesh):
        params = on_mesh(one.params, one.cfg, mesh)
        cache, logits = ours.prefill(params, one.cfg, batch, 96)
        known, token = ours.decode_step._cache_size(), jnp.zeros(4, jnp.int32)
        for _ in range(3):
            old = cache
            cache, logits = ours.decode_step(params, one.cfg, cache, token)
            assert old.k[0].is_deleted() and cache.k[0].sharding.spec == P("fsdp", "tensor")
        assert cache.k[0].addressable_shards[0].data.shape == (1, 1, 96, 16)
        assert ours.decode_step._cache_size() == known + 1
        lowered = ours.decode_step.lower(params, one.cfg, cache, token)
        held = sum(x.nbytes for x in [*cache.k, *cache.v]) // 8
        assert lowered.compile().memory_analysis().alias_size_in_bytes >= held
    assert logits.sharding.spec == P("fsdp")


@pytest.mark.parametrize(("name", "sparse"), [("tensor", False), ("fsdp", False), ("expert", True)])
def test_a_decode_step_moves_no_weight(name, sparse):
    """What a collective sends is of the size of the tokens, whatever axes cut the weights."""
    one, mesh = model(sparse), mesh_of(**MESHES[name])
    with jax.set_mesh(mesh):
        params = on_mesh(one.params, one.cfg, mesh)
        cache = jax.jit(lambda: init_cache(one.cfg, 4, 96, jnp.float32))()
        step = ours.decode_step.lower(params, one.cfg, cache, jnp.zeros(4, jnp.int32))
        text = step.compile().as_text()
    assert moved(text) and max(moved(text)) <= 4 * one.cfg.text.vocab_size


def moved(text):
    """Elements of what each collective of a program gives."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]* (?:{kinds})\(", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found]
