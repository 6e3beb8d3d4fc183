"""Names of machines, v5p:4x8x8 or h100:8, and the options of --plan. No jax."""

import argparse
import dataclasses
import importlib.util
import math
import os
import re

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime.chips import CHIPS, QUIET_LIBTPU, Chip
from qwen3vl_jax.storage.paths import argument, is_remote, kind

GPUS_A_HOST = 8


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
        found = f"{name} has {chip.axes} sizes from 1"
        raise InputError(f"--plan {text!r}: {found}, expected one like {name}:{chip.sizes}")
    if slices < 1:
        raise InputError(f"--slices is {slices}, expected a number from 1")
    if slices > 1 and chip.platform != "tpu":
        raise InputError(f"--slices is {slices}: {name} has none, say how many as {name}:32")
    if chip.platform == "gpu" and shape[0] > GPUS_A_HOST and shape[0] % GPUS_A_HOST:
        expected = f"up to {GPUS_A_HOST} GPUs, or whole hosts of {GPUS_A_HOST}"
        raise InputError(f"--plan {text!r}: expected {expected}")
    return Machine(name, shape, slices)


def check_installed(machine: Machine) -> None:
    """Raises InputError for a compiler that is not installed."""
    tpu = machine.chip.platform == "tpu"
    wanted, extra = ("libtpu", "[tpu]") if tpu else ("jax_cuda12_plugin", "[cuda]")
    if importlib.util.find_spec(wanted) is None:
        missing = f"{wanted} is not installed, which compiles for it (no device is needed)"
        install = f"pip install 'qwen3vl-jax{extra}' (in a clone: pip install '.{extra}')"
        raise InputError(f"--plan {machine}: {missing}: {install}")


def prepare_environment(machine: Machine) -> None:
    """Sets what jax reads at its import: compile for the machine, run nothing. Raises InputError."""
    check_installed(machine)
    for name, value in QUIET_LIBTPU.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if machine.chip.platform == "gpu":
        # There is no GPU to time kernels on.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def add_plan_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of the planner that train.py and infer.py share; gives their group."""
    group = parser.add_argument_group("planning")
    add = group.add_argument
    what = "compile for a machine that is not here, as v5p:4x8x8 or h100:8, for its memory and time"
    needs = "exit code 1 if it does not fit; needs the extra [tpu], or [cuda] for GPUs"
    add("--plan", metavar="MACHINE", help=f"{what}; {needs}")
    slices = "with --plan: number of such TPU slices (default: %(default)s)"
    add("--slices", type=int, default=1, metavar="N", help=slices)
    add("--save", type=argument, metavar="FILE", help="with --plan: write the compiled program")
    return group


def check_plan_arguments(args: argparse.Namespace) -> None:
    """Sets `machine`. Raises InputError for options of --plan without it, or not for one another."""
    defaults = {"slices": 1, "save": None, "search": False}
    for name, default in defaults.items():
        if not args.plan and getattr(args, name, default) != default:
            raise InputError(f"--{name} means something with --plan alone")
    if getattr(args, "tries", 0) < 0:
        raise InputError(f"--tries is {args.tries}, expected a number from 0")
    if args.save and getattr(args, "search", False):
        raise InputError("--save: not with --search, which compiles many")
    args.machine = read_machine(args.plan, args.slices) if args.plan else None
    if args.save and not is_remote(args.save) and not args.save.parent.is_dir():
        raise InputError(f"--save {args.save}: no such directory {args.save.parent}")
    if args.save and kind(args.save) == "folder":
        raise InputError(f"--save {args.save}: is a directory, expected a file")
