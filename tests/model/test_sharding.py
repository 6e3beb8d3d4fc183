"""The table of rules: which mesh axes cut what, what is refused, and that only one file knows."""

import ast
import contextlib
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_files

import qwen3vl_jax as q3
from qwen3vl_jax import device_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model import sharding
from qwen3vl_jax.planning.program import check_batch
from qwen3vl_jax.training import run_dir, run_setup, state_sharding, train_model
from qwen3vl_jax.training.mesh_preset import preset
from qwen3vl_jax.training.recipe import Mesh, Pack, Recipe

ROOT = Path(__file__).resolve().parents[2]


LAYS_OUT = {
    "model/sharding.py",
    "device_mesh.py",
    "training/stacked_load.py",
}  # the last takes the layers' axis from a layout
# What makes meshes: their names, presets, the recipe's table of them, and the planner that tries them.
NAMES_AXES = {
    "model/sharding.py",
    "checkpoint/auto_mesh.py",
    "config.py",
    "training/recipe.py",
    "training/reporting/memory_estimate.py",
    "planning/search.py",
    "planning/program.py",
}


def test_modules_know_logical_names_only():
    """No module reads the mesh, lays an array out by mesh axes or names one, but what makes meshes."""
    package = ROOT / "qwen3vl_jax"
    laid, named = set(), set()
    for path in package.rglob("*.py"):
        text, name = path.read_text(), path.relative_to(package).as_posix()
        if re.search(r"get_abstract_mesh|PartitionSpec\(|with_sharding_constraint", text):
            laid.add(name)
        if any(map(names_an_axis, ast.walk(ast.parse(text)))):
            named.add(name)
    assert laid == LAYS_OUT
    assert named <= NAMES_AXES and named > {
        "model/sharding.py",
        "checkpoint/auto_mesh.py",
        "config.py",
    }


def names_an_axis(node):
    """Whether code spells a mesh axis: its string, mesh.AXIS or mesh.shape["AXIS"].

    "data" and "expert" alone are other things too: a table of the recipe, a logical axis.
    """
    if isinstance(node, ast.Constant):
        return node.value in {"fsdp", "sequence", "tensor"}
    if isinstance(node, ast.Attribute):
        return node.attr in sharding.AXES and ast.unparse(node.value).endswith("mesh")
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return node.slice.value in sharding.AXES and ast.unparse(node.value).endswith("mesh.shape")
    return False


def test_an_axis_takes_the_largest_set_that_divides_it():
    def axes(*named, **sizes):
        return sharding.mesh_axes_for(*named, sizes=sizes)

    assert axes(("embed", 4096), fsdp=32, expert=8) == {"embed": ("fsdp", "expert")}
    assert axes(("embed", 1152), fsdp=32, expert=8) == {"embed": ("fsdp",)}  # 1152 = 9 x 128
    assert axes(("embed", 24), fsdp=4, expert=8) == {"embed": ("expert",)}
    found = axes(("kv_heads", 8), ("embed", 4096), fsdp=4, tensor=2)
    assert found == {"kv_heads": ("tensor",), "embed": ("fsdp",)}
    found = axes(("kv_heads", 4), ("embed", 4096), fsdp=4, tensor=8)  # no head for each device
    assert found == {"kv_heads": (), "embed": ("fsdp", "tensor")}
    assert axes(("heads", 32), ("heads", 4), tensor=8) == {"heads": ()}
    assert axes(("batch", 1), ("residual", 64), data=4, sequence=2, tensor=2) == {
        "batch": (),
        "residual": ("sequence", "tensor"),
    }


def test_every_parameter_of_every_size_has_a_place():
    """Logical names for each parameter, and no large one stays whole on presets as large as recipes'."""
    counts = {"2b": 8, "8b": 16, "32b": 8, "30b-a3b": 64, "235b-a22b": 256}
    for name, count in counts.items():
        cfg = q3.Config.named(name)
        shapes, sizes = (
            train_model.shapes(cfg),
            vars(preset(cfg, Pack(rows=count, vision_rows=count), count)),
        )
        found = state_sharding.params_shardings(device_mesh.layout_mesh(sizes), cfg, shapes)
        held = {n: where.shard_shape(shapes[n].shape) for n, where in found.items()}
        large = [n for n, x in shapes.items() if x.size > 10**7]
        assert len(large) > 5
        assert not [n for n in large if held[n] == shapes[n].shape], name
        total = sum(x.size for x in shapes.values())
        assert sum(map(np.prod, held.values())) < 1.1 * total / count, name


@pytest.mark.parametrize(
    ("name", "count", "slices", "rows", "want"),
    [
        ("8b", 8, 1, 16, Mesh(fsdp=8)),  # as in configs/sft_8b_full.toml
        ("30b-a3b", 16, 1, 32, Mesh(fsdp=4, expert=4)),  # sft_30b_a3b
        ("235b-a22b", 256, 1, 256, Mesh(fsdp=32, expert=8)),  # sft_235b_pod
        ("235b-a22b", 512, 2, 512, Mesh(data=2, fsdp=32, expert=8)),
        ("8b", 4096, 1, 4096, Mesh(data=32, fsdp=128)),
        ("2b", 8, 1, 4, Mesh(fsdp=4, tensor=2)),  # fewer rows than devices
        ("30b-a3b", 8, 1, 6, Mesh(fsdp=2, tensor=4)),
        ("2b", 64, 1, 2, Mesh(fsdp=2, tensor=16, sequence=2)),  # 16 heads
        ("8b", 256, 1, 4, Mesh(fsdp=4, tensor=32, sequence=2)),
        ("2b", 1, 1, 8, Mesh(fsdp=1)),
    ],
)
def test_presets(name, count, slices, rows, want):
    """Sizes by kind of model, devices, slices and rows."""
    pack = Pack(rows=rows, vision_rows=2 * rows)
    cfg = q3.Config.named(name)
    found = preset(cfg, pack, count, slices)
    assert found == want
    assert device_mesh.mesh_shape(vars(found), count)
    check_batch(Recipe("x", 1, pack=pack, mesh=found), cfg, vars(found))


@pytest.mark.parametrize(
    ("count", "slices", "pack", "told"),
    [
        (4096, 1, Pack(rows=16, vision_rows=16), "take pack.rows=4096 pack.vision_rows=4096, or"),
        (
            1024,
            1,
            Pack(rows=4, vision_rows=0),
            "pack.rows is 4, which no .* take pack.rows=1024, or",
        ),
        (8, 2, Pack(rows=1, vision_rows=2), "of 8 devices in 2 slices .* take pack.rows=8"),
        (
            3,
            1,
            Pack(rows=4, vision_rows=6, length=1024),
            "pack.rows is 4, which no .* pack.rows=6, or",
        ),
        (512, 1, Pack(rows=512, vision_rows=512, groups=2), "take pack.groups=512, or"),
    ],
)
def test_no_preset_for_too_few_rows(count, slices, pack, told):
    """The message says which rows would do, and they do."""
    cfg = q3.Config.named("8b")
    with pytest.raises(InputError, match=told) as caught:
        preset(cfg, pack, count, slices)
    taken = {k: int(n) for k, n in re.findall(r"pack\.(\w+)=(\d+)", str(caught.value))}
    more = dataclasses.replace(pack, **taken)
    sizes = vars(preset(cfg, more, count, slices))
    check_batch(Recipe("x", 1, pack=more), cfg, sizes)


def test_refusals_name_the_parameter_and_the_axis():
    x = {"layers.mlp.down": jax.ShapeDtypeStruct((31, 1157, 1003), jnp.float32)}
    mesh = device_mesh.make_mesh({"fsdp": 8})
    with pytest.raises(InputError, match=r"layers\.mlp\.down .*fsdp = 8 divides none"):
        device_mesh.shardings(mesh, x, {"layers.mlp.down": (None, "embed", "mlp")})


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("8b", {"fsdp": 3, "tensor": 2}, r"gate_up .*: fsdp = 3 divides none"),
        ("8b", {"fsdp": 7, "tensor": 8}, r"gate_up .*: fsdp = 7 divides none"),
        ("30b-a3b", {"expert": 6, "tensor": 8}, r"gate_up .*: expert = 6 divides none"),
        ("2b", {"data": 2, "sequence": 3}, r"gate_up .*: sequence = 3 divides none"),
        ("235b-a22b", {"fsdp": 16, "expert": 8, "sequence": 2}, ""),  # the tower: by 128 of the 256
        ("8b", {"tensor": 16}, ""),  # eight key/value heads: embed is cut in their place
        ("2b", {"data": 3, "fsdp": 512}, ""),  # and the rules divide the tower too
    ],
)
def test_an_axis_that_divides_little_of_a_model_is_refused(name, sizes, told):
    """Also where another axis cuts each of its parameters."""
    cfg, mesh = q3.Config.named(name), device_mesh.layout_mesh(sizes)
    with pytest.raises(InputError, match=told) if told else contextlib.nullcontext():
        state_sharding.check_mesh(mesh, cfg, train_model.shapes(cfg))


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"tensor": 3, "fsdp": -1}, "fsdp -1 x tensor 3, expected sizes that multiply to 8"),
        ({"data": -1, "fsdp": -1}, "expected sizes that multiply to 8"),
        ({"fsdp": 16}, "fsdp 16 needs 16 devices, there are 8"),
        ({"xp": 2}, r"mesh\.xp: unknown axis"),
        ({"tp": 2, "tensor": 2}, "an axis stands there twice"),
        ({"tensor": 0}, r"mesh\.tensor is 0, expected a number from 1"),
    ],
)
def test_meshes_that_cannot_be(sizes, told):
    with pytest.raises(InputError, match=told):
        device_mesh.make_mesh(sizes)


def test_a_smaller_mesh_takes_the_first_devices(monkeypatch):
    """With names long or short; of several processes each needs a part, so that is refused there."""
    for sizes in ({"tensor": 2, "data": 1}, {"tp": 2}):
        assert list(device_mesh.make_mesh(sizes).devices.flat) == jax.devices()[:2]
    assert (
        list(device_mesh.make_mesh({"fsdp": 3}, jax.devices()[4:]).devices.flat)
        == jax.devices()[4:7]
    )
    assert device_mesh.make_mesh({"fsdp": -1, "tp": 2}).devices.shape == (1, 4, 1, 1, 2)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:4])
    with pytest.raises(InputError, match="tensor 2, expected sizes that multiply to 8"):
        device_mesh.make_mesh({"tensor": 2})


def test_slices_are_told_apart_by_the_data_axis():
    """Two slices of four devices each: data is the outer axis, and 3 parts of data are refused."""

    class Chip:
        platform, device_kind, process_index = "cpu", "cpu", 0

        def __init__(self, i):
            self.id, self.slice_index = i, i // 4

    chips = [Chip(i) for i in range(8)]
    mesh = device_mesh.make_mesh({"data": 2, "fsdp": 4}, chips)
    assert [[c.slice_index for c in row.ravel()] for row in mesh.devices] == [[0] * 4, [1] * 4]
    with pytest.raises(InputError, match="multiple of the 2 slices"):
        device_mesh.make_mesh({"data": 1, "fsdp": 8}, chips)


def test_a_recipe_without_a_mesh_takes_all_devices(tmp_path):
    """As many parts as rows, or the groups that a run began with, divide; one that asks is left alone."""
    ckpt = train_files.checkpoint(tmp_path / "ckpt", weights=False)
    settings = Recipe(str(ckpt), 1, pack=Pack(rows=8, vision_rows=8))
    assert run_setup.with_mesh(settings, tmp_path / "new").mesh == Mesh(fsdp=8)
    saved = tmp_path / "run" / run_dir.CHECKPOINTS / "5" / run_dir.META
    saved.mkdir(parents=True)
    (saved / "metadata").write_text('{"data": {"groups": [{}, {}]}}')
    assert run_setup.with_mesh(settings, tmp_path / "run").mesh == Mesh(
        fsdp=2, tensor=2, sequence=2
    )
    asked = Recipe(str(ckpt), 1, mesh=Mesh(fsdp=1))
    assert run_setup.with_mesh(asked, tmp_path / "new") is asked


def test_a_program_of_its_own_compiles_while_another_is_traced():
    """As attention asks whether cuDNN serves it, outside of shards and inside."""
    asked = jax.ShapeDtypeStruct((3,), jnp.float32)

    def traced(x):
        sharding.compile_replicated(lambda y: (jnp.sin(y), y), asked)
        return 2 * x

    def over_shards(x):
        heads = sharding.spec(("heads",), sharding.mesh_axes_for(("heads", len(x))))
        return sharding.on_shards(traced, (heads,), heads, traced(x))

    assert jax.jit(over_shards)(jnp.ones(4)).tolist() == [4.0] * 4
    with jax.set_mesh(device_mesh.make_mesh({"tensor": 2})):
        assert jax.jit(over_shards)(jnp.ones(4)).tolist() == [4.0] * 4
