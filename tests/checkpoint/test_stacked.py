"""Checkpoints read into stacked layers: the same arrays as `load` and `stack_layers` give."""

import jax
import numpy as np
import pytest
import train_files

import qwen3vl_jax as q3
from qwen3vl_jax.checkpoint.param_paths import flatten
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.training import param_groups, state_sharding, train_model
from qwen3vl_jax.training.stacked_load import layers_of, load_stacked, paths_of


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_stacked_arrays_are_those_of_load(tmp_path, moe):
    """Hugging Face files and ours, plain and int8; names, shapes and places as training has them."""
    train_files.checkpoint(tmp_path / "hf", moe)
    params, cfg = q3.load(tmp_path / "hf", dtype="float32")
    q3.save_params(tmp_path / "orbax", params, files_from=tmp_path / "hf")
    for ckpt in (tmp_path / "hf", tmp_path / "orbax"):
        for weights in (None, "int8"):
            want = q3.stack_layers(q3.load(ckpt, dtype="float32", weights=weights)[0])
            got = load_stacked(ckpt, lambda name: "float32", weights)
            assert jax.tree.structure(got) == jax.tree.structure(want)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
                assert a.dtype == b.dtype and np.array_equal(a, b)
    flat = param_groups.flatten(load_stacked(tmp_path / "hf", lambda name: "float32"))[0]
    shapes = train_model.shapes(cfg)
    assert [(n, x.shape) for n, x in flat.items()] == [(n, x.shape) for n, x in shapes.items()]
    left = dict(flatten(params))
    for name, stack in flat.items():
        for (path, layer), place in zip(
            layers_of(name, np.asarray(stack)), paths_of(name, stack.shape)
        ):
            assert path == place and np.array_equal(layer, left.pop(path))
    assert not left


def test_each_parameter_has_the_dtype_it_is_held_in(tmp_path):
    """dtype_of decides by name while tensors are read, so no second copy is made later."""
    train_files.checkpoint(tmp_path / "hf")
    found = load_stacked(
        tmp_path / "hf", lambda name: "bfloat16" if name.startswith("vision") else "float32"
    )
    for name, x in param_groups.flatten(found)[0].items():
        assert x.dtype == ("bfloat16" if name.startswith("vision") else "float32"), name


def test_a_mesh_gets_the_same_arrays_in_its_shards(tmp_path):
    """The mesh decides where each stack lies, and nothing else changes."""
    train_files.checkpoint(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    cfg = q3.Config.from_hf(tmp_path / "hf")
    where = state_sharding.params_shardings(mesh, cfg, train_model.shapes(cfg))
    assert len({x.spec for x in where.values()}) > 3
    want = load_stacked(tmp_path / "hf", lambda name: "float32")
    for form in ("hf", "orbax"):
        got = load_stacked(tmp_path / form, lambda name: "float32", mesh=mesh)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        others = param_groups.flatten(want)[0]
        for name, a in param_groups.flatten(got)[0].items():
            assert a.sharding.is_equivalent_to(where[name], a.ndim), name
            assert np.array_equal(a, others[name])
