"""--plan: machines by name, their devices and memory, options that do not go together."""

import argparse
import importlib.util
import itertools
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning import machines, topology
from qwen3vl_jax.runtime import chips

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5p:4x8x8", 256), ("V5E:16x16", 256), ("tpu7x:4x4x4", 128), ("h100:16", 16)],
)
def test_machines_by_name(name, devices):
    """Their devices as jax counts them."""
    assert machines.read_machine(name).devices == devices


@pytest.mark.parametrize(
    ("name", "slices", "told"),
    [
        ("v5litepod-16", 1, "unknown machine, expected one like v4:2x2x2"),
        ("v5p:4x4", 1, "v5p has 3 sizes"),
        ("h100:12", 1, "whole hosts of 8"),
        ("h100:8", 2, "--slices is 2: h100 has none"),
        ("v5e:4x4", 0, "--slices is 0, expected a number from 1$"),
    ],
)
def test_machines_that_are_none(name, slices, told):
    """The message says which forms there are."""
    with pytest.raises(InputError, match=told):
        machines.read_machine(name, slices)


def test_a_run_takes_the_memory_that_a_plan_reckons_with():
    """Unless the user says how much, by either name of the variable: jax refuses both."""
    environ = {}
    chips.allow_gpu_memory(environ)
    assert environ == {"XLA_CLIENT_MEM_FRACTION": str(chips.GPU_SHARE)}
    assert chips.CHIPS["h100"].hbm == round(79.1 * chips.GPU_SHARE * 2**30)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        environ = {name: "0.5"}
        chips.allow_gpu_memory(environ)
        assert environ == {name: "0.5"}


def test_libtpu_is_quiet_where_no_tpu_is(tmp_path, monkeypatch):
    """Without a TPU, or with a network card alone; not where one may be, nor against the user."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    card = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:00:05.0"
    card.mkdir(parents=True)
    for vendor, device, node, quiet in (
        ("0x10de", "0x2330", "", True),
        ("0x1ae0", "0x0042", "", True),
        ("0x1ae0", "0x006f", "", False),
        ("0x8086", "0x0042", "accel0", False),
    ):
        (card / "vendor").write_text(f"{vendor}\n")
        (card / "device").write_text(f"{device}\n")
        if node:
            (tmp_path / "dev" / node).touch()
        environ = {"TPU_ACCELERATOR_TYPE": "mine"}
        chips.quiet_libtpu(environ, str(tmp_path))
        assert (environ.get("TPU_MIN_LOG_LEVEL") == "3") is quiet, (vendor, device)
        assert environ["TPU_ACCELERATOR_TYPE"] == "mine" and "JAX_PLATFORMS" not in environ
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    environ = {}
    chips.quiet_libtpu(environ, str(tmp_path / "nothing"))
    assert environ == {}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"plan": None, "search": True}, "--search means something with --plan"),
        ({"search": True, "save": Path("x")}, "--save: not with --search"),
        ({"save": Path("/nowhere/x")}, "no such directory /nowhere"),
        ({"save": ROOT}, f"--save {ROOT}: is a directory, expected a file"),
        ({"plan": "v9:2x2"}, "unknown machine"),
    ],
)
def test_options_of_the_planner_are_refused_at_once(given, told):
    """What does not go together, before anything is read."""
    usual = {"plan": "v5e:2x2", "slices": 1, "save": None, "search": False, "tries": 4}
    with pytest.raises(InputError, match=told):
        machines.check_plan_arguments(argparse.Namespace(**usual | given))


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    """libtpu is an extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu is not installed.*qwen3vl-jax\[tpu\]"):
        machines.prepare_environment(machines.read_machine("v5e:2x2"))
    with pytest.raises(InputError, match=r"libtpu is not installed.*qwen3vl-jax\[tpu\]"):
        topology.devices_of(machines.read_machine("v5e:2x2"))


def chips_of(*sizes):
    """Devices of a slice of a TPU, in the compiler's order: the first axis runs fastest."""
    return [
        types.SimpleNamespace(
            platform="tpu",
            coords=at[::-1],
            core_on_chip=0,
            slice_index=0,
            process_index=0,
            device_kind="TPU v5 lite",
            id=number,
        )
        for number, at in enumerate(itertools.product(*map(range, sizes[::-1])))
    ]


@pytest.mark.parametrize(
    ("sizes", "used", "told"),
    [
        ((2, 2, 1), 3, "3 of 4 devices.* a mesh of all 4, or of 1, 2 of them"),
        (
            (2, 4, 1),
            6,
            "6 of 8 devices.* a mesh of all 8, or of 1, 2, 4 of them",
        ),  # a box: libtpu aborts
        ((4, 4, 1), 6, "of 1, 2, 4, 8 of them"),
        ((2, 2, 2), 3, "3 of 8 devices"),
    ],
)
def test_a_part_of_a_tpu_that_is_no_slice_is_refused(sizes, used, told):
    """What is one stays a part; all devices, and GPUs, are taken as they are."""
    from qwen3vl_jax.planning import topology

    devices = chips_of(*sizes)
    with pytest.raises(InputError, match=told):
        topology.first_devices(devices, used)
    for count in (1, 2, 4):
        assert topology.first_devices(devices, count) == devices[:count]
    assert topology.first_devices(devices, len(devices)) == devices
    assert topology.first_devices(devices, 999) == devices  # make_mesh counts them
    for device in devices:
        device.platform = "gpu"
    assert topology.first_devices(devices, 3) == devices[:3]


def test_devices_that_fill_no_box_make_a_mesh_in_their_order():
    """jax has an assertion there, of no use to anybody."""
    from qwen3vl_jax import device_mesh

    devices = chips_of(2, 2, 1)[:3]
    shape = device_mesh.mesh_shape({"tensor": 3}, 3)
    assert list(device_mesh._arrange(shape, devices).flat) == devices


EVERY_TPU = """
from qwen3vl_jax.planning import machines
from qwen3vl_jax.runtime import chips
tpus = [name for name, chip in chips.CHIPS.items() if chip.platform == "tpu"]
all_of_them = [machines.read_machine(f"{name}:{chips.CHIPS[name].sizes}") for name in tpus]
machines.prepare_environment(all_of_them[0])
from qwen3vl_jax.planning.topology import devices_of
from qwen3vl_jax.device_mesh import make_mesh
for machine in all_of_them:
    print(machine, make_mesh({"fsdp": machine.devices}, devices_of(machine)).size == machine.devices)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the header says so")
def test_every_kind_of_tpu_has_the_devices_of_its_entry():
    """libtpu makes as many as CHIPS says, and jax arranges them."""
    done = subprocess.run(
        [sys.executable, "-c", EVERY_TPU], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == [
        "v4:2x2x2 True",
        "v5e:4x4 True",
        "v5p:4x8x8 True",
        "v6e:4x4 True",
        "tpu7x:4x4x4 True",
    ]
