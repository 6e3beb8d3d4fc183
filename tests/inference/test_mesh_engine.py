"""What is built on prefill and decode runs on a mesh as on one device: streams, the engine, scores."""

import json

import jax
import numpy as np
import ours
import pytest
import tiny
from meshes import mesh_of, model, on_mesh

import infer
import qwen3vl_jax as q3
from qwen3vl_jax import device_mesh
from qwen3vl_jax.checkpoint import auto_mesh
from qwen3vl_jax.checkpoint.config_files import PARAMS
from qwen3vl_jax.checkpoint.device_load import Source, path_shardings
from qwen3vl_jax.checkpoint.name_map import param_specs
from qwen3vl_jax.cli import common
from qwen3vl_jax.cli.infer_arguments import mesh_sizes
from qwen3vl_jax.config import Config
from qwen3vl_jax.inference import decode_loop


def test_streams_keep_one_program(monkeypatch):
    """Two answers a prompt, sampled, over several dispatches and a cache that grows."""
    one, mesh = model(False), mesh_of(data=2, tensor=2)
    batch = one.batch("short", "text")
    hot = q3.Sampling(temperature=1.5, top_k=9, repetition_penalty=1.2)
    ask = {"max_new_tokens": 40, "sampling": hot, "stop_ids": (), "copies": 2}
    want = q3.generate(one.params, one.cfg, batch, **ask)
    monkeypatch.setattr(decode_loop, "SMALLEST_CACHE", 32)
    with jax.set_mesh(mesh):
        known = decode_loop.decode_steps._cache_size()
        got = q3.generate(on_mesh(one.params, one.cfg, mesh), one.cfg, batch, **ask)
        programs = decode_loop.decode_steps._cache_size() - known
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert programs == 2  # one a size of the cache


def requests(one):
    names = ("short", "text", "short", "text", "text", "short")
    for i, name in enumerate(names):
        arrays = tiny.inputs(one.raw, name, i // 2)
        yield q3.Request(i, arrays, 5 + 2 * i, q3.Sampling(temperature=float(i % 2)), seed=i)


def test_the_engine_answers_as_on_one_device():
    one, mesh = model(False), mesh_of(fsdp=2, tensor=2)

    def answers(params):
        found = q3.generate_many(params, one.cfg, requests(one), stop_ids=(), rows=2)
        return {f.key: (f.tokens, np.asarray(f.logprobs)) for f in found}

    want = answers(one.params)
    with jax.set_mesh(mesh):
        got = answers(on_mesh(one.params, one.cfg, mesh))
    assert got.keys() == want.keys() == set(range(6))
    for key, (tokens, logprobs) in want.items():
        assert got[key][0] == tokens
        np.testing.assert_allclose(got[key][1], logprobs, atol=1e-4)


def test_scores_and_vectors():
    one, mesh = model(False), mesh_of(fsdp=2, tensor=2)
    batch = one.batch("short", "text")
    labels = np.where(np.arange(batch.tokens.shape[1]) % 3, -100, batch.tokens)
    batch = batch.replace(labels=labels.astype(np.int32))

    @jax.jit
    def run(params):
        embedded = q3.embed(params, one.cfg, batch, dims=8)
        return q3.score(params, one.cfg, batch), embedded, q3.rerank(params, one.cfg, batch, (7, 9))

    want = run(one.params)
    with jax.set_mesh(mesh):
        got = run(on_mesh(one.params, one.cfg, mesh))
    for a, b in zip(got, want, strict=True):
        assert ours.worst(a, b) < 1e-5


def test_the_command_line_takes_a_mesh(capsys):
    ask = ["--embed", "--prompt", "one two"]
    infer.main(ask)
    want = json.loads(capsys.readouterr().out)
    infer.main([*ask, "--mesh", "tp=2,dp=1"])
    assert ours.worst(json.loads(capsys.readouterr().out), want) < 1e-5
    assert jax.sharding.get_abstract_mesh().empty


def test_mesh_flags():
    assert mesh_sizes("tp=2, expert=-1") == {"tensor": 2, "expert": -1}
    assert mesh_sizes(None) is None


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("tp", "'tp', expected AXIS=N; axes: data, fsdp, expert, sequence, tensor, dp (data)"),
        ("xp=2", "'xp=2', expected AXIS=N"),
        ("tp=0", "tp is '0', expected a number from 1, or -1"),
        ("tp=two", "tp is 'two'"),
        ("tp=2,tensor=2", "duplicate axis tensor"),
        ("tp=-1,ep=-1", "only one axis may be -1"),
        ("tp=16", "mesh: tensor 16 needs 16 devices, there are 8"),
        ("tp=3,dp=-1", "expected sizes that multiply to 8"),
    ],
)
def test_meshes_that_cannot_be(capsys, flag, told):
    with pytest.raises(SystemExit) as end:
        infer.main(["--mesh", flag])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and told in line


class Device:
    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return self.limit and {"bytes_limit": self.limit}


def test_a_model_larger_than_a_device_is_spread(capsys):
    """The demo on devices of a few hundred kB; what fits, or cannot be known, stays on one."""
    source = Source(common.DEMO, Config.from_hf(common.DEMO))
    assert not (common.DEMO / PARAMS).exists()
    held = auto_mesh.weights_bytes(source, "float32")
    for limit, count in ((2 * held, 8), (None, 8), (held, 1)):
        assert auto_mesh.chosen(source, "float32", [Device(limit)] * count) == {}
    assert not capsys.readouterr().err
    assert auto_mesh.chosen(source, "float32", [Device(held // 2)] * 8) == {"fsdp": 4, "tensor": 2}
    assert "spread over 8 devices, --mesh fsdp=4,tensor=2" in capsys.readouterr().err
    with pytest.raises(q3.InputError, match="this host has 8: too few, 8 of them would hold"):
        auto_mesh.chosen(source, "float32", [Device(held // 10)] * 8)
    mesh = device_mesh.layout_mesh({"fsdp": 4, "tensor": 2})
    uneven = auto_mesh.weights_bytes(source, "float32", mesh)
    assert held / 8 < 0.99 * uneven  # small ones lie whole on each
    with pytest.raises(q3.InputError, match="too few"):
        auto_mesh.chosen(source, "float32", [Device(0.99 * uneven / auto_mesh.ROOM)] * 8)
    few = [Device(1.01 * uneven / auto_mesh.ROOM)] * 8
    assert auto_mesh.chosen(source, "float32", few) == {"fsdp": 4, "tensor": 2}


def test_how_released_sizes_are_spread():
    """Every device that is used has an even share: also where the count does not divide a size."""
    want = {
        ("8b", 8): {"tensor": 8},
        ("8b", 12): {"tensor": 8},
        ("8b", 3): {"tensor": 2},
        ("8b", 16): {"fsdp": 2, "tensor": 8},
        ("32b", 6): {"tensor": 4},
        ("30b-a3b", 6): {"tensor": 4},
        ("235b-a22b", 8): {"expert": 2, "tensor": 4},
    }
    for (name, count), sizes in want.items():
        cfg = Config.named(name)
        assert auto_mesh.auto_mesh(cfg.text, count) == sizes
        leaves = {
            tuple(row.path): jax.ShapeDtypeStruct(row.shape, np.float32) for row in param_specs(cfg)
        }
        where = path_shardings(device_mesh.layout_mesh(sizes), cfg, leaves)
        held = sum(np.prod(s.shard_shape(leaves[path].shape)) for path, s in where.items() if s)
        total = sum(np.prod(x.shape) for x in leaves.values())
        assert held < 1.15 * total / np.prod(list(sizes.values())), (name, count)
