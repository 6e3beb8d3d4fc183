"""Weights read straight into their shards: the values of one device, each array where RULES put it."""

import dataclasses
import json

import adapters
import fp8_files
import hf_files as hf
import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tensorstore
import tiny
from jax.sharding import PartitionSpec as P

import qwen3vl_jax as q3
from qwen3vl_jax import device_mesh
from qwen3vl_jax.checkpoint import orbax_io
from qwen3vl_jax.checkpoint.device_load import Source, path_shardings, weights_bytes
from qwen3vl_jax.checkpoint.hf_reader import open_hf
from qwen3vl_jax.checkpoint.param_paths import flatten
from qwen3vl_jax.checkpoint.peft_io import save_adapter
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.training.stacked_load import load_stacked

LAYERS = {"num_hidden_layers": 1}
ONE = {"depth": 1, "deepstack_visual_indexes": [0]}


def mesh():
    return device_mesh.make_mesh({"fsdp": 4, "tensor": 2})


def written(folder, sparse, quantised=False):
    """A Hugging Face directory and its Orbax twin."""
    raw = tiny.config_dict("base", sparse)
    raw["text_config"] |= LAYERS | ({"num_experts": 8} if sparse else {})
    raw["vision_config"] |= ONE
    tensors = hf.mixed(tiny.weights(raw, 0))
    if quantised:
        raw, tensors = fp8_files.config(raw), fp8_files.quantised(tensors)
    source = hf.write(folder / "hf", raw, tensors, 2)
    to_orbax(source, folder / "orbax", weights="fp8" if quantised else None)
    return source, folder / "orbax"


def same(got, want):
    """Equal trees, every array of `got` on all the mesh's devices."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.sharding.mesh.size == 8
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_each_parameter_lies_where_the_rules_put_it(sparse, tmp_path):
    for directory in written(tmp_path, sparse):
        want, cfg = q3.load(directory)
        got, found = q3.load(directory, mesh=mesh())
        assert found == cfg
        same(got, want)
        layer = got["layers"][0]
        assert layer["attn"]["qkv"].sharding.spec == P("tensor", None, None, "fsdp")
        assert got["embed"].sharding.spec == P("tensor", "fsdp")
        assert got["vision"]["blocks"][0]["ln1"]["scale"].sharding.spec == P(None)
        where = P("tensor", "fsdp", None) if sparse else P(None, "tensor", "fsdp")
        assert layer["mlp"]["gate_up"].sharding.spec == where
        shard = layer["attn"]["qkv"].addressable_shards[0].data
        assert shard.nbytes * 8 == layer["attn"]["qkv"].nbytes
        leaves = dict(flatten(got))
        for path, place in path_shardings(mesh(), cfg, leaves).items():
            assert leaves[path].sharding.is_equivalent_to(place, leaves[path].ndim), path
    with jax.set_mesh(mesh()):
        ambient, _ = q3.load(directory)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, ambient, got))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_training_reads_only_its_shards(sparse, tmp_path, monkeypatch):
    """Stacked layers on a mesh: the values of one device, and no tensor is ever read whole."""
    directories = written(tmp_path, sparse)
    want = [load_stacked(directory, lambda name: "float32") for directory in directories]

    def parts_alone(leaf):
        return dataclasses.replace(leaf, load=lambda: pytest.fail("reads the whole tensor"))

    asked = Source.asked
    monkeypatch.setattr(
        Source, "asked", lambda self: {p: parts_alone(x) for p, x in asked(self).items()}
    )
    for directory, one in zip(directories, want, strict=True):
        got = load_stacked(directory, lambda name: "float32", mesh=mesh())
        same(got, one)
        assert got["layers"]["attn"]["qkv"].sharding.spec == P(None, "tensor", None, None, "fsdp")


def test_the_dtype_asked_for(tmp_path):
    """Cast where it lies; what it takes is known before."""
    for directory in written(tmp_path, False):
        want, cfg = q3.load(directory, dtype="float32")
        same(q3.load(directory, mesh=mesh(), dtype="float32")[0], want)
        held = sum(x.nbytes for x in jax.tree.leaves(want))
        assert weights_bytes(Source(directory, cfg), jnp.float32) == held


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_few_bits(sparse, tmp_path):
    """Codes lie as their weight, scales where they divide, rounded to int8 or int4 here or kept as fp8."""
    plain, kept = tmp_path / "plain", tmp_path / "fp8"
    for weights, folder in (("int8", plain), ("int4", tmp_path / "int4"), ("fp8", kept)):
        for directory in written(folder, sparse, weights == "fp8"):
            want, cfg = q3.load(directory, weights=weights)
            got, _ = q3.load(directory, mesh=mesh(), weights=weights)
            same(got, want)
            qkv = got["layers"][0]["attn"]["qkv"]
            assert qkv.values.sharding.spec == P("tensor", None, None, "fsdp")
            assert qkv.scale.sharding.spec[0] == "tensor"
            if weights == "int8":
                assert weights_bytes(Source(directory, cfg, "int8")) == sum(
                    x.nbytes for x in jax.tree.leaves(want)
                )


def test_an_adapter_beside_the_shards(tmp_path):
    """Logits with LoRA on every matrix, experts' too, are those of one device."""
    source, _ = written(tmp_path, True)
    _, cfg = q3.load(source)
    weights, settings = adapters.random(cfg, adapters.EVERYTHING[True])
    save_adapter(tmp_path / "adapter", cfg, weights, settings)
    raw = json.loads((source / "config.json").read_text())
    batch = q3.make_batch(cfg, **tiny.inputs(raw, "short"))
    run = {"dtype": "float32", "adapter": tmp_path / "adapter"}
    want = ours.forward(q3.load(source, **run)[0], cfg, batch)
    with jax.set_mesh(mesh()):
        params, _ = q3.load(source, mesh=mesh(), **run)
        got = ours.forward(params, cfg, batch)
    assert ours.worst(got, want) < 1e-5
    (pair,) = params["layers"][0]["mlp"]["down"].pairs.values()
    assert pair.a.sharding.spec[0] == "tensor"


def test_a_parameter_that_an_axis_does_not_divide_is_named(tmp_path, monkeypatch):
    source, orbax = written(tmp_path, False)
    uneven = device_mesh.make_mesh({"tensor": 7}, jax.devices()[:7])
    for directory in (source, orbax):
        with pytest.raises(q3.InputError, match=r"^\S+ \[.*: tensor = 7 divides none"):
            q3.load(directory, mesh=uneven)
    monkeypatch.setattr(device_mesh, "MAX_REPLICATED", 100)
    with pytest.raises(q3.InputError, match=r"^embed .*tensor = 7 divides none"):
        q3.load(source, mesh=uneven)


def test_stored_pieces_are_read_once_or_not_at_all():
    """Whatever parts are asked for: those of a stored array in pieces that divide nothing."""
    values = np.arange(7 * 9).reshape(7, 9)
    spec = {"driver": "zarr", "kvstore": "memory://", "metadata": {"chunks": [3, 4]}}
    store = tensorstore.open(
        spec, create=True, dtype=tensorstore.int64, shape=values.shape
    ).result()
    store.write(values).result()
    read = []

    class Counting:
        shape, dtype, chunk_layout = store.shape, store.dtype, store.chunk_layout

        def __getitem__(self, index):
            read.append(tuple(s.start for s in index))
            return store[index]

    where = [(slice(2, 4), slice(None)), (slice(0, 7), slice(5, 6)), (slice(4, 4), slice(0, 9))]
    for part, index in zip(orbax_io._read_parts(Counting(), where), where, strict=True):
        np.testing.assert_array_equal(part, values[index])
    assert len(read) == len(set(read)) == 7 and (6, 0) not in read


def test_parts_of_fused_tensors_copy_no_more(tmp_path):
    """A shard of q, k and v in one is made of slices of three memory maps."""
    source, _ = written(tmp_path, False)
    leaf = open_hf(source, q3.Config.from_hf(source))["layers", 0, "attn", "qkv"]
    index = (slice(1, 2), slice(None), slice(None), slice(10, 20))
    np.testing.assert_array_equal(leaf.parts([index])[0], leaf.load()[index])
    across = (slice(None), slice(1, 4), slice(None), slice(None))
    np.testing.assert_array_equal(leaf.parts([across])[0], leaf.load()[across])
