"""Names of machines, v5p:4x8x8 or h100:8, and what their chips can do. No jax."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import MutableMapping
from pathlib import Path

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.paths import argument, is_remote, kind

_GIB = 2**30
# Of a GPU's memory, to programs: jax takes 0.75 by itself; CUDA, cuDNN and NCCL need some GiB beside.
GPU_SHARE = 0.9
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is older


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Rates are those of a jax device, in bytes or floating-point operations a second.

    hbm is what a program may use. link is one direction of one link: of ICI, or of NVLink as a whole;
    network is a device's share of its host's cards; host is one direction of its link to the host's
    memory, 0 where that is not published.
    """

    platform: str  # tpu or gpu
    axes: int  # of its torus; a GPU's is a line
    devices: int  # jax devices a chip
    hbm: int  # bytes
    flops: float  # dense bf16
    hbm_rate: float
    link: float
    network: float
    sizes: str  # an example
    host: float = 0.0


# TPUs: cloud.google.com/tpu/docs/v4 .. v6e, tpu7x: peak bf16 and HBM bandwidth of a chip, its ICI (both
# directions of all ports: 400, 800, 1200 GB/s), the network cards of a host. hbm: what XLA's compiler
# says is available. GPUs: NVIDIA's data sheets of the SXM boards, NVLink 4 at 450 GB/s a direction, one
# 400 Gb/s card a GPU as in DGX, PCIe 5 x16 to the host at 64 GB/s a direction by its specification; hbm:
# the share of CUDA's total that train.py and infer.py let jax take.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 3, 1, round(30.75 * _GIB), 275e12, 1228e9, 50e9, 6.25e9, "2x2x2"),
    "v5e": Chip("tpu", 2, 1, round(15.75 * _GIB), 197e12, 819e9, 50e9, 3.125e9, "4x4"),
    "v5p": Chip("tpu", 3, 1, round(95.74 * _GIB), 459e12, 2765e9, 100e9, 6.25e9, "4x8x8"),
    "v6e": Chip("tpu", 2, 1, round(31.25 * _GIB), 918e12, 1640e9, 100e9, 12.5e9, "4x4"),
    "tpu7x": Chip(
        "tpu", 3, 2, round(94.75 * _GIB), 2307e12 / 2, 7380e9 / 2, 100e9 / 2, 12.5e9, "4x4x4"
    ),
    "h100": Chip(
        "gpu", 1, 1, round(79.1 * GPU_SHARE * _GIB), 989e12, 3352e9, 450e9, 50e9, "8", 64e9
    ),
    "h200": Chip(
        "gpu", 1, 1, round(140.0 * GPU_SHARE * _GIB), 989e12, 4800e9, 450e9, 50e9, "8", 64e9
    ),
}
GPUS_A_HOST = 8
_QUIET = {  # else libtpu asks the cloud's metadata server, and says that it is not there
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at once
    "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings: `compiling` reads them
    "TPU_STDERR_LOG_LEVEL": "1",
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """So many slices of one shape of one chip."""

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """What its chips can do."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """How many chips are paid for."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """How many devices jax sees."""
        return self.chips * self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Of each axis of a slice whether its last chips are linked to its first.

        On v5e and v6e those of 16; on the others all of a slice of whole cubes of 4x4x4.
        """
        if self.chip.axes == 2:
            return tuple(n == 16 for n in self.shape)
        cubes = self.chip.platform == "tpu" and all(n % 4 == 0 for n in self.shape)
        return (cubes,) * len(self.shape)

    def __str__(self) -> str:
        name = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} slices of {name}"


def read_machine(text: str, slices: int = 1) -> Machine:
    """A machine from its name, as v5p:4x8x8 or h100:8. Raises InputError with the known forms."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    known = ", ".join(f"{name}:{chip.sizes}" for name, chip in CHIPS.items())
    if not found or found[1] not in CHIPS:
        raise InputError(f"--plan {text!r}: unknown machine, expected one like {known}")
    name, shape = found[1], tuple(map(int, found[2].split("x")))
    chip = CHIPS[name]
    if len(shape) != chip.axes or min(shape) < 1:
        raise InputError(
            f"--plan {text!r}: {name} has {chip.axes} sizes from 1, expected one like "
            f"{name}:{chip.sizes}"
        )
    if slices < 1:
        raise InputError(f"--slices is {slices}, expected a number from 1")
    if slices > 1 and chip.platform != "tpu":
        raise InputError(f"--slices is {slices}: {name} has none, say how many as {name}:32")
    if chip.platform == "gpu" and shape[0] > GPUS_A_HOST and shape[0] % GPUS_A_HOST:
        raise InputError(
            f"--plan {text!r}: expected up to {GPUS_A_HOST} GPUs, or whole hosts of {GPUS_A_HOST}"
        )
    return Machine(name, shape, slices)


def allow_gpu_memory(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets jax take GPU_SHARE of a GPU, unless a variable says how much; call it before jax is imported."""
    if not any(environ.get(name) for name in _FRACTIONS):
        environ[_FRACTIONS[0]] = str(GPU_SHARE)


def quiet_libtpu(environ: MutableMapping[str, str] = os.environ, root: str = "/") -> None:
    """Keeps libtpu (the extra tpu) from telling its errors where no TPU is; call it before jax is imported.

    root: of the files that show devices. Google's PCI devices other than its network card may be TPUs.
    """
    cards = Path(root, "sys/bus/pci/devices").glob("*")
    found = [[_read_id(card / name) for name in ("vendor", "device")] for card in cards]
    possible = any(vendor == "0x1ae0" and device != "0x0042" for vendor, device in found)
    nodes = (name for kind in ("accel*", "vfio/*") for name in Path(root, "dev").glob(kind))
    if not possible and not any(nodes) and importlib.util.find_spec("libtpu"):
        levels = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
        for name, value in {**_QUIET, **levels}.items():
            if name.startswith("TPU_"):
                environ.setdefault(name, value)


def _read_id(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def check_installed(machine: Machine) -> None:
    """Raises InputError for a compiler that is not installed."""
    if machine.chip.platform == "tpu":
        wanted, install = "libtpu", "pip install 'qwen3vl-jax[tpu]'"
    else:
        wanted, install = "jax_cuda12_plugin", "pip install 'qwen3vl-jax[cuda]'"
    if importlib.util.find_spec(wanted) is None:
        raise InputError(
            f"--plan {machine}: {wanted} is not installed, which compiles for it (no device is "
            f"needed): {install} (in a clone: {install.replace('qwen3vl-jax', '.')})"
        )


def prepare_environment(machine: Machine) -> None:
    """Sets what must be set before jax is imported: compile for the machine, run nothing.

    Raises InputError for a compiler that is not installed.
    """
    check_installed(machine)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if machine.chip.platform == "gpu":
        # There is no GPU to time kernels on.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the planner that train.py and infer.py share."""
    add = parser.add_argument
    add("--plan", metavar="MACHINE", help="compile for a machine that is not here, as v5p:4x8x8 or "
        "h100:8, and print whether it fits (else exit code 1) and how fast it could be")  # fmt: skip
    add("--slices", type=int, default=1, help="with --plan: so many of it, over the network")
    add("--save", type=argument, metavar="FILE", help="with --plan: write the compiled program")


def check_plan_arguments(args: argparse.Namespace) -> None:
    """Raises InputError for an option of --plan without it, and for what does not go together."""
    defaults = {"slices": 1, "save": None, "search": False}
    for name, default in defaults.items():
        if not args.plan and getattr(args, name, default) != default:
            raise InputError(f"--{name} means something with --plan alone")
    if getattr(args, "tries", 0) < 0:
        raise InputError(f"--tries is {args.tries}, expected a number from 0")
    if args.plan and getattr(args, "dry_run", False):
        raise InputError("--plan and --dry-run: give one of them")
    if args.save and getattr(args, "search", False):
        raise InputError("--save: not with --search, which compiles many")
    if args.plan:
        read_machine(args.plan, args.slices)
    if args.save and not is_remote(args.save) and not args.save.parent.is_dir():
        raise InputError(f"--save {args.save}: no such directory {args.save.parent}")
    if args.save and kind(args.save) == "folder":
        raise InputError(f"--save {args.save}: is a directory, expected a file")
