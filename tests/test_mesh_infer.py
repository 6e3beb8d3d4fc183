"""Eight devices answer as one does: prefill, decode, extend, generate, the engine, and loading."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tiny
from jax.sharding import PartitionSpec as P

import qwen3vl_jax as q3
from qwen3vl_jax import sharding
from qwen3vl_jax.cache import init_cache
from qwen3vl_jax.loading import path_shardings
from qwen3vl_jax.tensors import flatten, nest

MESHES = {
    "tensor": {"tensor": 2},
    "fsdp": {"fsdp": 4, "tensor": 2},
    "expert": {"expert": 4, "tensor": 2},
    "context": {"data": 2, "sequence": 2, "tensor": 2},
    "repeated": {"tensor": 4},  # more than the two key/value heads
}
CONFIG = {"num_attention_heads": 8, "num_hidden_layers": 1, "intermediate_size": 112}


def mesh_of(name):
    sizes = MESHES[name]
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def on_mesh(params, cfg, mesh):
    leaves = dict(flatten(params))
    where = path_shardings(mesh, cfg, leaves)
    return nest((path, jax.device_put(x, where[path])) for path, x in leaves.items())


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


class Case:
    """A tiny model, four rows with pictures and a clip, and what one device answers."""

    def __init__(self, sparse: bool):
        self.raw = tiny.config_dict("golden", sparse)
        self.raw["text_config"] |= CONFIG | ({"num_experts": 8} if sparse else {})
        self.raw["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
        ref = SimpleNamespace(config=self.raw, weights=tiny.weights(self.raw, 0))
        self.params, self.cfg = ours.build(ref)
        names = ("short", "text", "clip", "one_picture")
        rows = [tiny.inputs(self.raw, name, seed) for seed, name in enumerate(names)]
        more = [tiny.inputs(self.raw, "short", seed) for seed in range(4)]
        self.batch = q3.make_batch(self.cfg, **tiny.pad_batch(rows, "left"))
        self.more = q3.make_batch(self.cfg, **tiny.pad_batch(more, "left"))
        self.want = everything(self.params, self.cfg, self.batch, self.more)


@functools.cache
def case_of(sparse):
    return Case(sparse)


KINDS = [(name, False) for name in MESHES] + [(n, True) for n in ("fsdp", "expert", "context")]


@pytest.mark.parametrize(("name", "sparse"), KINDS)
def test_forward_decode_and_extend_equal_one_device(name, sparse):
    case, mesh = case_of(sparse), mesh_of(name)
    with jax.set_mesh(mesh):
        params = on_mesh(case.params, case.cfg, mesh)
        got = everything(params, case.cfg, case.batch, case.more)
    real = np.asarray(case.batch.segment_ids) > 0
    assert ours.worst(np.asarray(got[0])[real], np.asarray(case.want[0])[real]) < 1e-5
    np.testing.assert_array_equal(got[1], case.want[1])
    assert len(np.unique(got[1])) > 4
    assert ours.worst(got[2], case.want[2]) < 1e-5
    assert ours.worst(got[3], case.want[3]) < 1e-5


def test_steps_keep_their_program_and_their_memory():
    """The cache is cut by rows and heads, given on in place, and no step is compiled twice."""
    case, mesh = case_of(False), mesh_of("fsdp")
    with jax.set_mesh(mesh):
        params = on_mesh(case.params, case.cfg, mesh)
        cache, logits = ours.prefill(params, case.cfg, case.batch, 96)
        known, token = ours.decode_step._cache_size(), jnp.zeros(4, jnp.int32)
        for _ in range(3):
            old = cache
            cache, logits = ours.decode_step(params, case.cfg, cache, token)
            assert old.k[0].is_deleted() and cache.k[0].sharding.spec == P("fsdp", "tensor")
        assert cache.k[0].addressable_shards[0].data.shape == (1, 1, 96, 16)
        assert ours.decode_step._cache_size() == known + 1
        lowered = ours.decode_step.lower(params, case.cfg, cache, token)
        held = sum(x.nbytes for x in [*cache.k, *cache.v]) // 8
        assert lowered.compile().memory_analysis().alias_size_in_bytes >= held
    assert logits.sharding.spec == P("fsdp")


@pytest.mark.parametrize(("name", "sparse"), [("tensor", False), ("fsdp", False), ("expert", True)])
def test_a_decode_step_moves_no_weight(name, sparse):
    """What a collective sends is of the size of the tokens, whatever axes cut the weights."""
    case, mesh = case_of(sparse), mesh_of(name)
    with jax.set_mesh(mesh):
        params = on_mesh(case.params, case.cfg, mesh)
        cache = jax.jit(lambda: init_cache(case.cfg, 4, 96, jnp.float32))()
        step = ours.decode_step.lower(params, case.cfg, cache, jnp.zeros(4, jnp.int32))
        text = step.compile().as_text()
    assert moved(text) and max(moved(text)) <= 4 * case.cfg.text.vocab_size


def moved(text):
    """Elements of what each collective of a program gives."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]* (?:{kinds})\(", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found]
