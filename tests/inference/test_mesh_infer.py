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
from qwen3vl_jax.model import moe
from qwen3vl_jax.model.cache import init_cache
from qwen3vl_jax.model.lora import Adapted, Pair
from qwen3vl_jax.model.quantized import Quantized

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


# Experts lie on every axis but those of tokens; an MLP on "tensor" and "fsdp".
RUNS = [(False, "fsdp"), (False, "context"), (False, "repeated")]
RUNS += [(True, "tensor"), (True, "fsdp"), (True, "expert"), (True, "context")]


@pytest.mark.parametrize(("sparse", "name"), RUNS)
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
            assert old.k[0].is_deleted() and cache.k[0].sharding.spec == P("fsdp", None, "tensor")
        assert cache.k[0].addressable_shards[0].data.shape == (1, 96, 1, 16)
        assert ours.decode_step._cache_size() == known + 1
        lowered = ours.decode_step.lower(params, one.cfg, cache, token)
        held = sum(x.nbytes for x in [*cache.k, *cache.v]) // 8
        assert lowered.compile().memory_analysis().alias_size_in_bytes >= held
    assert logits.sharding.spec == P("fsdp")


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("name", "sparse"), [("tensor", False), ("fsdp", False), ("expert", True), ("fsdp", True)]
)
def test_a_decode_step_moves_no_weight(name, sparse, rows):
    """What a collective sends is of the size of the tokens, whatever axes cut the weights."""
    one, mesh = model(sparse), mesh_of(**MESHES[name])
    with jax.set_mesh(mesh):
        params = on_mesh(one.params, one.cfg, mesh)
        cache = jax.jit(lambda: init_cache(one.cfg, rows, 96, jnp.float32))()
        step = ours.decode_step.lower(params, one.cfg, cache, jnp.zeros(rows, jnp.int32))
        text = step.compile().as_text()
    table = f"{one.cfg.text.vocab_size}x{one.cfg.text.hidden_size}"
    found = re.findall(rf"gather.*\(tensor<{table}xf32>, tensor<(\d+)x(\d+)x1xi32>", step.as_text())
    assert [int(b) * int(t) > 1 for b, t in found] == [True]  # XLA for GPUs moves the table for one
    assert moved(text) and max(moved(text)) <= rows * one.cfg.text.vocab_size


def held_as(kind, key, shape):
    """A matrix of eight experts: plain, of 8 bits with a scale a column or a box, or adapted."""
    values = jax.random.normal(key, shape)
    if kind == "plain":
        return values
    if kind == "adapted":
        a, b = (jax.random.normal(key, (8, *ab)) for ab in ((3, shape[1]), (shape[2], 3)))
        return Adapted(values, {"": Pair(a, b, jnp.full(8, 0.5))})
    boxes = {"column": (8, 1, shape[2]), "box": (8, shape[1] // 4, shape[2] // 4)}[kind]
    scale = jax.random.uniform(key, boxes)
    return Quantized((9 * values).astype(jnp.int8), scale)


HELD = [(kind, "tpu") for kind in ("plain", "column", "box", "adapted")]


@pytest.mark.parametrize(("kind", "backend"), [*HELD, ("box", "cpu"), ("adapted", "cpu")])
def test_the_experts_of_a_step_take_parts_of_the_tokens(monkeypatch, kind, backend):
    """However they are held, where every device has a part of their input."""
    monkeypatch.setattr(moe, "platform", lambda: backend)
    keys = jax.random.split(jax.random.key(0), 5)
    x, share = jax.random.normal(keys[0], (4, 1, 32)), jax.random.uniform(keys[1], (4, 1, 2))
    chosen = jax.random.randint(keys[2], (4, 1, 2), 0, 8)
    weights = held_as(kind, keys[3], (8, 32, 24)), held_as(kind, keys[4], (8, 12, 32))

    def run(*args):
        return moe.moe_apply(*args, act="silu")

    want = jax.jit(run)(x, share, chosen, *weights)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, expert=2)):
        step = jax.jit(run).lower(x, share, chosen, *weights).compile()
        assert ours.worst(step(x, share, chosen, *weights), want) < 1e-5
    assert max(moved(step.as_text())) <= 4 * 2 * 24  # the chosen experts' hidden values


def moved(text):
    """Elements of what each collective of a program gives."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]* (?:{kinds})\(", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found]
