"""--plan: a search, a real program."""

import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import train_files
from rich.console import Console

import infer
import train
from qwen3vl_jax.cli import plan as cli_plan
from qwen3vl_jax.cli import train as cli_train
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model import attention_gpu
from qwen3vl_jax.planning import command, compiling, machines, program, report, search
from qwen3vl_jax.training import recipe
from qwen3vl_jax.training.mesh_preset import preset

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_answers_for_a_hopper_gpu(monkeypatch):
    """While it compiles, whatever this machine has; afterwards, also after an error, JAX asks as before."""
    module = attention_gpu.cudnn()
    asked, seen = module.check_compute_capability, []

    class Asks:
        mesh = make_mesh({}, jax.devices()[:1])
        args = ()

        @staticmethod
        def lower():
            seen.extend(map(module.check_compute_capability, ("9.0", "10.0")))
            raise KeyError("the end")

    Asks.fn = Asks
    with pytest.raises(KeyError):
        compiling.compiled(Asks)
    assert seen == [True, False] and module.check_compute_capability is asked
    monkeypatch.delattr(module, "check_compute_capability")
    with compiling.hopper_attention():
        assert not hasattr(module, "check_compute_capability")


def test_the_compilers_words_become_numbers():
    """Memory is a verdict, anything else an error; warnings name the array."""
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    text += "(34.86G) exceeds available HBM (15.75G)."
    assert compiling.refusal(text) == "HLO temporaries 34.86G of 15.75G HBM"
    used = "RESOURCE_EXHAUSTED: ... memory space hbm. Used 18.2G of 15.75G hbm. Exceeded"
    assert compiling.refusal(used) == "the program 18.2G of 15.75G HBM"
    with pytest.raises(InputError, match="does not compile the program: INTERNAL: no"):
        compiling.refusal("INTERNAL: no")
    line = "W spmd.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot go from a to b "
    line += 'for HLO operation %x = f32[8,4]{1,0} add(%y), metadata={op_name="jit(f)/add"}.\n'
    assert compiling.resharded(2 * line) == {"f32[8,4] jit(f)/add": 2}
    bare = line.replace('op_name="jit(f)/add"', "")
    assert compiling.resharded(bare) == {"f32[8,4] x": 1}


def test_warnings_of_python_and_errors_of_the_compiler_are_shown(capfd):
    """The rest of the compiler's log is read and kept back."""
    with compiling._stderr() as told:
        print("attention runs on XLA", file=sys.stderr)
        os.write(2, b"W0101 spmd.cc:1] moved\nE0101 x.cc:1] broken\n")
    assert capfd.readouterr().err == "attention runs on XLA\n"
    assert told == ["W0101 spmd.cc:1] moved\nE0101 x.cc:1] broken\n"]
    assert compiling.errors(told[0]) == "E0101 x.cc:1] broken\n"


def test_small_runs_have_digits():
    """Chip-hours below one are no zero."""
    assert [report._digits(n) for n in (0.0123, 1.26, 12345)] == ["0.012", "1.3", "12,345"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A recipe for eight devices over a checkpoint without weights."""
    folder = tmp_path_factory.mktemp("plan")
    ckpt = train_files.checkpoint(folder / "ckpt", weights=False)
    data = train_files.conversations(folder / "chats.jsonl")
    return recipe.read_recipe(
        train_files.write_recipe(folder / "recipe.toml", ckpt, data),
        ["mesh.fsdp=4", "mesh.tensor=2", "pack.rows=4", "pack.vision_rows=8"],
    )


def test_a_step_is_compiled_and_told(small, tmp_path, monkeypatch):
    """On eight devices of this machine: bytes are those of real shards, the table has every part.

    The compile cache is not asked: a program from it does not run once it was saved again.
    """
    cfg = program.config_of(small.ckpt)
    mesh = make_mesh(vars(small.mesh), jax.devices())
    text = dataclasses.replace(small, pack=dataclasses.replace(small.pack, vision_rows=0))
    made = program.training_step(text, cfg, mesh)
    with monkeypatch.context() as patch:
        for asked in ("get_executable_and_time", "put_executable_and_time"):
            patch.setattr(jax._src.compilation_cache, asked, lambda *_: pytest.fail("cache"))
        done = compiling.compiled(made)
    stats = done.executable.memory_analysis()
    assert (
        abs(sum(made.held.values()) - stats.argument_size_in_bytes) < 2048
    )  # padding, key and step
    machine = machines.read_machine("v5e:2x4")
    plan = report.plan_of(machine, made, done)
    assert not done.resharded
    assert plan.fits and plan.times.most >= plan.times.least > 0
    kinds = {c.kind for c in plan.moved.collectives}
    assert {"all-gather", "all-reduce"} <= kinds
    out = io.StringIO()
    Console(file=out, width=140).print(report.table(plan, "one step", "pack.rows=8"))
    for part in ("fits", "optimizer (", "peak of a device", "MFU", "chip-hours", "pack.rows=8"):
        assert part in out.getvalue()
    without = plan._replace(done=done._replace(kernels="cuDNN not found."))
    Console(file=out, width=140).print(report.table(without, "one step"))
    assert "XLA blocks" in out.getvalue() and "cuDNN not found." in out.getvalue()
    file = tmp_path / "step.bin"
    assert compiling.save(done, file) == file.stat().st_size
    _, metrics = compiling.load(file)(*jax.tree.map(empty, made.args))
    assert jax.numpy.isfinite(metrics["loss"])
    file.write_bytes(b"no program")
    with pytest.raises(InputError, match="cannot be loaded on 8 x cpu"):
        compiling.load(file)


def empty(like):
    """An array of a ShapeDtypeStruct, where that says."""
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), like.sharding)
    return jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)


def test_a_step_has_the_groups_of_a_run(small):
    """pack.groups, else as many as the mesh cuts rows into."""
    cfg = program.config_of(small.ckpt)
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2}, jax.devices())
    pack = dataclasses.replace(small.pack, groups=4)
    for changed, groups in ((small, 2), (dataclasses.replace(small, pack=pack), 4)):
        made = program.training_step(changed, cfg, mesh)
        assert made.args[2].batch.groups == groups


def test_a_step_without_pictures_needs_room_for_the_tower(small):
    """What it does not read is an argument too: a run holds it."""
    pack = dataclasses.replace(small.pack, vision_rows=0)
    changed, mesh = (
        dataclasses.replace(small, pack=pack),
        make_mesh(vars(small.mesh), jax.devices()),
    )
    made = program.training_step(changed, program.config_of(small.ckpt), mesh)
    with jax.set_mesh(mesh):
        text = made.fn.lower(*made.args).as_text()
    taken = text[text.index("@main(") :].split("->")[0].count("%arg")
    assert taken == len(jax.tree.leaves(made.args))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["pack.rows=6"], "pack.rows is 6, expected a multiple of 4"),
        (["pack.groups=6"], "pack.groups is 6, expected a multiple of 4"),
        (["pack.groups=8"], "pack.rows is 4, expected a multiple of 8: pack.groups"),
        (["pack.vision_length=10"], "pack.vision_length is 10, expected a multiple of 4"),
        (["mesh.fsdp=16"], "needs 32 devices, there are 8"),
        (["mesh.fsdp=1", "mesh.tensor=1", "mesh.expert=8"], "mesh.expert is 8"),
    ],
)
def test_what_does_not_divide_is_refused_before_compiling(small, changes, told):
    """Rows, devices, experts."""
    cfg = program.config_of(small.ckpt)
    changed = dataclasses.replace(small)
    for change in changes:
        key, value = change.split("=")
        table, name = key.split(".")
        part = dataclasses.replace(getattr(changed, table), **{name: int(value)})
        changed = dataclasses.replace(changed, **{table: part})
    if "mesh.expert=8" in changes:
        pack = dataclasses.replace(changed.pack, rows=8)
        changed = dataclasses.replace(changed, pack=pack)
    with pytest.raises(InputError, match=told):
        program.training_step(changed, cfg, make_mesh(vars(changed.mesh), jax.devices()))


def test_a_search_tries_meshes_that_divide(small):
    """All use every device and cut rows evenly; the recipe's own, then each mesh once by its time."""
    cfg, machine = program.config_of(small.ckpt), machines.read_machine("v5e:2x4")
    bare = dataclasses.replace(small, mesh=recipe.Mesh())
    usual = preset(cfg, small.pack, 8)
    for asked in (small, bare):
        found = search.candidates(asked, cfg, machine)
        meshes = {c.recipe.mesh for c in found}
        once, others = found[: len(meshes)], found[len(meshes) :]
        assert usual in meshes and {c.recipe.mesh for c in once} == meshes
        if asked is small:
            assert once.pop(0).recipe.mesh == small.mesh
        assert [c.seconds for c in once] == sorted(c.seconds for c in once)
        assert all(
            c.seconds <= min(o.seconds for o in others if o.recipe.mesh == c.recipe.mesh)
            for c in once
        )
        for each in found:
            mesh = each.recipe.mesh
            assert mesh.data * mesh.fsdp * mesh.expert * mesh.sequence * mesh.tensor == 8
            assert small.pack.rows % (mesh.data * mesh.fsdp * mesh.expert) == 0
        assert {c.recipe.step.remat for c in found} == {"none", "dots", "narrow", "full"}


def test_an_estimate_counts_copies_to_the_host(small):
    """At the rate of a GPU's link; otherwise offload is as fast as dots."""
    cfg, step = program.config_of(small.ckpt), dataclasses.replace(small.step, remat="offload")
    asked = dataclasses.replace(small, step=step)
    found = search.candidates(asked, cfg, machines.read_machine("h100:8"))
    seconds = {c.recipe.step.remat: c.seconds for c in found if c.recipe.mesh == small.mesh}
    assert seconds["offload"] > seconds["dots"]


def test_what_may_not_fit_is_last_and_marked(small, monkeypatch):
    """Remat policies that the estimate finds too large for a chip are below all others."""
    cfg, machine = program.config_of(small.ckpt), machines.read_machine("v5e:2x4")
    sizes = {"none": 1.2, "dots": 0.9, "narrow": 0.7, "full": 0.5}
    monkeypatch.setattr(
        search.memory_estimate,
        "memory",
        lambda r, *_: {"all": machine.chip.hbm * sizes[r.step.remat]},
    )
    found = search.candidates(small, cfg, machine)
    over = [c.recipe.step.remat == "none" for c in found]
    assert over == sorted(over) and 0 < sum(over) < len(over)
    out = io.StringIO()
    Console(file=out, width=140).print(report.likeliest(found[-1:], "last", machine.chip.hbm))
    assert "more than 15.75 GiB" in out.getvalue()


def test_a_mesh_of_other_devices_is_refused_with_one_that_is_not(small):
    """The message names the preset, with what turns the recipe's mesh into it; a search takes others."""
    machine = machines.read_machine("v5e:2x2")
    told = r"for all of them; for v5e:2x2 add mesh.fsdp=4 mesh.tensor=1 to the command"
    with pytest.raises(InputError, match=told):
        search.mesh_of(small, cfg := program.config_of(small.ckpt), machine)
    few = "for v5p:4x4x4 add mesh.fsdp=64 mesh.tensor=1 pack.rows=64 pack.vision_rows=64 to"
    with pytest.raises(InputError, match=few):  # two heads, so that more rows are the way
        search.mesh_of(small, cfg, machines.read_machine("v5p:4x4x4"))
    found = search.candidates(small, cfg, machine)
    assert preset(cfg, small.pack, 4) in [c.recipe.mesh for c in found]


@pytest.mark.parametrize(
    ("machine", "sizes", "used"),
    [("h100:8", {"fsdp": 1}, 1), ("h200:4", {"fsdp": 2}, 2), ("h100:8", {"fsdp": -1}, 8)],
)
def test_a_plan_of_a_smaller_mesh_is_of_the_first_gpus(small, machine, sizes, used):
    """As a run of one process; several hosts need every device."""
    cfg, asked = (
        program.config_of(small.ckpt),
        dataclasses.replace(small, mesh=recipe.Mesh(**sizes)),
    )
    pack = dataclasses.replace(small.pack, rows=8)
    asked = dataclasses.replace(asked, pack=pack)
    found = search.mesh_of(asked, cfg, machines.read_machine(machine))
    assert np.prod(list(vars(found).values())) == used
    if used == 1:
        with pytest.raises(InputError, match="expected sizes that multiply to 16"):
            search.mesh_of(asked, cfg, machines.read_machine("h100:16"))


def test_a_plan_compiles_for_no_more_devices_than_its_mesh(small, monkeypatch):
    """The first of the machine's."""
    monkeypatch.setattr(command, "devices_of", lambda machine: jax.devices())
    asked = dataclasses.replace(small, mesh=recipe.Mesh(fsdp=2))
    made = command.program_of(asked, program.config_of(small.ckpt), machines.read_machine("h100:8"))
    assert list(made.mesh.devices.flat) == jax.devices()[:2]


def test_a_search_goes_on_after_a_mesh_that_does_not_compile(small, monkeypatch, capsys):
    """Each is told as it ends; one that cannot be traced uses up no try, one that XLA refuses does."""
    traced = iter([ValueError("no such\nlayout")])
    compiled = iter([InputError("XLA does not compile it")])
    done = compiling.Compiled(None, "16G of 15G HBM", Counter(), 2.0, 1.0, 0.0)

    def program_of(*_):
        if error := next(traced, None):
            raise error

    def watched(*_):
        if error := next(compiled, None):
            raise error
        return done

    monkeypatch.setattr(command, "program_of", program_of)
    monkeypatch.setattr(command, "watched", watched)
    out = io.StringIO()
    machine = machines.read_machine("v5e:2x4")
    plans = command.search_training(small, machine, 2, Console(file=out, width=140))
    assert [plan.fits for _, plan in plans] == [False]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("--search: meshes in place of mesh.fsdp=4 mesh.tensor=2")
    assert [line.rsplit(": ", 1)[1] for line in told[1:]] == [
        "no such layout",
        "XLA does not compile it",
        "16G of 15G HBM (2 s)",
    ]
    assert told[1].startswith("mesh.fsdp=4") and "does not fit" in out.getvalue()
    assert "compiled at O1" in " ".join(out.getvalue().split())


def test_a_search_ranks_without_the_time_of_memory(small, monkeypatch):
    """A lower level of optimisation moves several times what a run does, by no rule."""
    machine = machines.read_machine("v5e:2x4")
    times = iter([report.Times(2e-3, 1e-3, 1e-3, 0.0), report.Times(1e-3, 9e-3, 1e-3, 0.0)])
    stats = types.SimpleNamespace(peak_memory_in_bytes=1)
    fitting = types.SimpleNamespace(memory_analysis=lambda: stats)
    done = compiling.Compiled(fitting, "", Counter(), 2.0, 1.0, 0.0)
    monkeypatch.setattr(command, "program_of", lambda *_: None)
    monkeypatch.setattr(command, "watched", lambda *_: done)
    monkeypatch.setattr(report, "plan_of", lambda *given: report.Plan(*given, times=next(times)))
    out = io.StringIO()
    plans = command.search_training(small, machine, 2, Console(file=out, width=140))
    assert [plan.times.memory for _, plan in plans] == [9e-3, 1e-3]
    assert "1 ms to 2 ms" in out.getvalue() and "time is left out" in out.getvalue()


def test_a_plan_that_does_not_fit_ends_with_one(monkeypatch):
    """train.py and infer.py: 0 where all fits, 1 where not; of a search one that fits will do."""
    fits, full = types.SimpleNamespace(fits=True), types.SimpleNamespace(fits=False)
    argv = ["--config", str(ROOT / "configs" / "demo.toml"), "--plan", "v5e:2x2"]
    for module in (cli_train.machines, cli_plan):
        monkeypatch.setattr(module, "prepare_environment", lambda machine: None)
    for plan in (fits, full):
        monkeypatch.setattr(command, "plan_training", lambda *_, plan=plan: plan)
        assert train.main(argv) == (not plan.fits)
    for found, code in (([full, fits], 0), ([full], 1), ([], 1)):
        monkeypatch.setattr(
            command, "search_training", lambda *_, found=found: [(None, p) for p in found]
        )
        assert train.main([*argv, "--search"]) == code
    assert train.main([*argv, "--search", "--tries", "0"]) == 0  # an estimate is no verdict
    monkeypatch.setattr(command, "plan_serving", lambda *_: (fits, fits))
    infer.main(["--plan", "v5e:2x2"])
    monkeypatch.setattr(command, "plan_serving", lambda *_: (fits, full))
    with pytest.raises(SystemExit, match=r"^1$"):
        infer.main(["--plan", "v5e:2x2"])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the header says so")
def test_a_tpu_program_of_the_command_line(small, tmp_path):
    """train.py --plan for a v5e:2x4 that nobody has: XLA's verdict, and the program in a file."""
    lines = [f"mesh.{k}={v}" for k, v in vars(small.mesh).items()]
    lines += ["pack.rows=4", "pack.vision_rows=8"]
    config = Path(small.ckpt).parent / "recipe.toml"
    out = tmp_path / "step.bin"
    env = {**os.environ, "XLA_FLAGS": "", "JAX_OPTIMIZATION_LEVEL": "O0"}
    command = [sys.executable, "train.py", "--config", str(config), "--plan", "v5e:2x4"]
    done = subprocess.run(
        [*command, "--tries", "0", "--save", str(out), *lines],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "XLA's own verdict" in done.stdout and "fits" in done.stdout
    assert out.stat().st_size > 10_000
