"""A plan beside the programs that run: peak within 2 %, bytes over links and FLOPs within 5 %."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
import train_files
from meshes import mesh_of, model, on_mesh

import qwen3vl_jax as q3
import train
from qwen3vl_jax.inference import decode_loop
from qwen3vl_jax.planning import compiling, hlo, program
from qwen3vl_jax.planning.traffic import traffic
from qwen3vl_jax.training import train_model
from qwen3vl_jax.training.recipe import read_recipe
from qwen3vl_jax.training.reporting.memory_estimate import held_bytes


def recorder(fn, calls):
    """fn, which keeps the shapes and shardings of its arguments."""

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    @functools.wraps(fn)
    def call(*args):
        calls.append(jax.tree.map(lambda x: shape(x) if isinstance(x, jax.Array) else x, args))
        return fn(*args)

    return call


def figures(executable, mesh):
    """Bytes at the fullest moment, and bytes over links."""
    moved = traffic(hlo.parse(executable.as_text()), mesh.size).collectives
    links = sum(each.moved * each.times for each in moved)
    return executable.memory_analysis().peak_memory_in_bytes, links


def check(planned, ran, mesh, beside=0):
    """beside: bytes that a run holds and its program does not know."""
    (peak, links), (ran_peak, ran_links) = figures(planned, mesh), figures(ran, mesh)
    print(f"planned {peak:,} {links:,.0f} compiled {ran_peak + beside:,} {ran_links:,.0f}")
    assert peak == pytest.approx(ran_peak + beside, rel=0.02)
    assert links == pytest.approx(ran_links, rel=0.05) and links > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_the_loop_of_decode_steps(sparse, monkeypatch):
    """As the engine calls it; the vision tower lies beside."""
    one, calls = model(sparse), []
    mesh = mesh_of(data=2, expert=2, tensor=2) if sparse else mesh_of(data=2, fsdp=2, tensor=2)
    loop, row = decode_loop.decode_steps, tiny.inputs(one.raw, "text", 0)
    monkeypatch.setattr(decode_loop, "decode_steps", recorder(loop, calls))
    with jax.set_mesh(mesh):
        params = on_mesh(one.params, one.cfg, mesh)
        asked = [q3.Request(i, row, 9) for i in range(16)]
        assert len(list(q3.generate_many(params, one.cfg, asked, stop_ids=(), rows=16))) == 16
        ran = loop.lower(*calls[-1]).compile()
    serving = program.Serving(16, calls[-1][2].cache.slots, None, dtype=jnp.float32)
    planned = compiling.compiled(program.decoding(one.cfg, mesh, serving)).executable
    check(planned, ran, mesh, held_bytes({"": params["vision"]})[""])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and its recipe for eight devices."""
    folder = tmp_path_factory.mktemp("plan_is_the_run")
    ckpt, data = train_files.checkpoint(folder / "ckpt"), folder / "chats.jsonl"
    train_files.write_recipe(folder / "recipe.toml", ckpt, train_files.conversations(data))
    return folder


def test_the_training_step(files, monkeypatch):
    """As train.py calls it."""
    changes = ["mesh.fsdp=4", "mesh.tensor=2", "pack.rows=4", "pack.vision_rows=8", "steps=3"]
    calls, steps, make = [], [], train_model.make_step

    def recorded(*args, **options):
        steps.append(make(*args, **options))
        return recorder(steps[-1], calls)

    monkeypatch.setattr(train_model, "make_step", recorded)
    argv = ["--config", str(files / "recipe.toml"), "--out", str(files / "run"), *changes]
    assert train.main(argv) == 0
    monkeypatch.undo()
    recipe = read_recipe(files / "recipe.toml", changes)
    mesh = mesh_of(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        ran = steps[0].lower(*calls[-1]).compile()
    cfg = program.config_of(recipe.ckpt)
    check(compiling.compiled(program.training_step(recipe, cfg, mesh)).executable, ran, mesh)


def test_the_arithmetic_of_a_training_step(files):
    """Counted from shapes, and by XLA: one layer a tower, as it counts a loop's body once; no mesh.

    Whole steps, and what each remat policy computes again.
    """
    raw = tiny.config_dict("golden", False)
    raw["text_config"] |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1}
    raw["vision_config"] |= {"hidden_size": 512, "intermediate_size": 2048, "out_hidden_size": 1024}
    raw["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0], "num_heads": 4}
    changes = ["pack.rows=2", "pack.length=64", "pack.vision_rows=2", "pack.vision_length=64"]
    changes += ["step.loss_chunk=100000", "step.accumulate=1"]
    counted, by_xla = {}, {}
    for remat in ("none", "dots", "narrow", "full"):
        recipe = read_recipe(files / "recipe.toml", [*changes, f"step.remat={remat}"])
        made = program.training_step(recipe, q3.Config.from_hf(raw), mesh_of(data=1))
        with jax.set_mesh(made.mesh):
            by_xla[remat] = made.fn.lower(*made.args).cost_analysis()["flops"]
        counted[remat] = made.work.again
        print(f"{remat}: planned {counted[remat]:,.0f} by XLA {by_xla[remat]:,.0f}")
        assert counted[remat] == pytest.approx(by_xla[remat], rel=0.05)
    for remat in ("narrow", "full"):
        again = counted[remat] - counted["none"]
        assert again == pytest.approx(by_xla[remat] - by_xla["none"], rel=0.1)
