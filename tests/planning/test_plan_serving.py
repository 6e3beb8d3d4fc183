"""infer.py --plan: the arrays and programs of an engine on a machine that is not here."""

import io

import fp8_files
import hf_files
import jax
import pytest
import tiny
from rich.console import Console

from qwen3vl_jax.checkpoint.device_load import Source
from qwen3vl_jax.cli import infer_arguments
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning import command, machines, program


def console(out):
    return Console(file=out, width=140)


def test_prompts_are_taken_in_beside_the_cache_of_all_rows(tmp_path, monkeypatch):
    """16 rows: two prompts at a time, on top of the cache; the decode step is written at once."""
    hf_files.write(
        tmp_path / "ckpt", raw := tiny.config_dict("golden", False), tiny.weights(raw, 0)
    )
    cfg = program.config_of(str(tmp_path / "ckpt"))
    asked = program.Serving(16, 256, None)
    mesh = make_mesh({"data": 4, "tensor": 2}, jax.devices())
    made = program.prefilling(cfg, mesh, asked)
    assert made.args[2].tokens.shape == (2, 256) and made.args[3].shape == (2,)
    assert made.held["cache"] == program.decoding(cfg, mesh, asked).held["cache"]
    written = []

    def compiled(console, program, what):
        written.append(program.work.name)
        return done(program)

    done = command.compiling.compiled
    monkeypatch.setattr(command, "watched", compiled)
    monkeypatch.setattr(command, "devices_of", lambda machine: jax.devices())
    monkeypatch.setattr(command, "saved", lambda *_: written.append("saved"))
    out, machine = io.StringIO(), machines.read_machine("v5e:2x4")
    sizes = {"data": 4, "tensor": 2}
    step, taken = command.plan_serving(
        str(tmp_path / "ckpt"), machine, sizes, asked, None, console(out)
    )
    assert written == ["time of a decode step", "saved", "time of a prefill"]
    stats = taken.done.executable.memory_analysis()
    assert stats.alias_size_in_bytes >= made.held["cache"]  # donated
    assert taken.done.peak > sum(made.held.values()) and step.fits
    assert "2 prompts, 1024 patches in each" in out.getvalue()
    pair, _ = command.plan_serving(
        str(tmp_path / "ckpt"), machine, {"tensor": 2}, asked, None, console(out)
    )
    assert pair.program.mesh.size == 2 and "8 devices, 2 in use" in out.getvalue()


def test_a_decode_step_needs_room_for_the_tower_that_it_does_not_read(tmp_path):
    """The peak is no less than the weights and the cache, all of which a device holds."""
    raw = tiny.config_dict("golden", False)
    hf_files.write(tmp_path, raw, tiny.weights(raw, 0))
    mesh = make_mesh({}, jax.devices()[:1])
    made = program.decoding(program.config_of(str(tmp_path)), mesh, program.Serving(2, 64, None))
    done = command.compiling.compiled(made)
    assert done.peak >= sum(made.held.values())


@pytest.mark.parametrize(
    ("size", "machine", "kind", "want"),
    [
        ("8b", "v5p:2x2x1", None, {}),
        ("8b", "v5e:2x2", None, {"tensor": 4}),
        ("8b", "v5e:2x2", "int8", {}),
        ("30b-a3b", "v5e:4x4", None, {"expert": 4, "tensor": 4}),
    ],
)
def test_without_a_mesh_a_plan_takes_the_devices_that_a_run_takes(size, machine, kind, want):
    """One where the weights have room, else as many as the model is spread over."""
    asked = program.Serving(16, 256, None, weights=kind)
    cfg = program.config_of(size)
    assert command.usual_sizes(cfg, machines.read_machine(machine), asked) == want


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bit_weights_are_planned_as_they_are_held(tmp_path, kind):
    """The arrays of a plan are those that `load` reads: codes, scales, and the rest in its dtype."""
    raw = tiny.config_dict("golden", True)
    tensors = tiny.weights(raw, 0)
    if kind == "fp8":
        block = (128, 128)  # as released
        raw, tensors = fp8_files.config(raw, block), fp8_files.quantised(tensors, block)
    hf_files.write(tmp_path, raw, tensors)
    cfg = program.config_of(str(tmp_path))
    stored = Source(tmp_path, cfg, kind)
    want = {path: (x.shape, x.dtype) for path, x in stored.asked().items()}
    found = program.held_arrays(cfg, "float32", kind)
    assert {path: (x.shape, x.dtype) for path, x in found.items()} == want


def test_an_adapter_is_refused_for_it_would_not_be_counted():
    with pytest.raises(InputError, match="answers nothing, leave --adapter out"):
        infer_arguments.arguments(["--plan", "v5e:2x2", "--adapter", "DIR"])


def test_more_tokens_than_the_model_has_positions_for_are_refused():
    """Before anything is compiled."""
    asked, machine = program.Serving(1, 999_999_999, None), machines.read_machine("v5e:2x2")
    with pytest.raises(InputError, match="--max-len is 999999999, expected at most 262144"):
        command.plan_serving("8b", machine, {}, asked)
