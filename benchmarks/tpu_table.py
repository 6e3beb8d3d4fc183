"""The six sizes on TPU slices: what fits, and the floors of a training step and of a decode step.

    python -m benchmarks.tpu_table [--only 8B,v5p] [--keep FILE]

Every program is compiled ahead of time (libtpu, no TPU), about two hours for all on two cores. Training is
full fine-tuning, one row of 8,192 tokens and 16,384 patches a device, on the preset's mesh; decoding is
16 rows of 8,192 slots in bf16, spread over the slice as infer.py spreads a model larger than a chip. A
floor is the longest of arithmetic, main memory and links at the makers' peak rates: a lower bound of the
time. --keep writes each finished row to a file, and the next start with it and the same compiler goes on
from there.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks.tpu_programs import CONFIGS, GIB, mesh_for
from qwen3vl_jax.checkpoint.auto_mesh import auto_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning import compiling, program, report
from qwen3vl_jax.planning.command import program_of
from qwen3vl_jax.planning.machines import read_machine
from qwen3vl_jax.training.recipe import Mesh, read_recipe

ROWS, SLOTS = 16, 8192
# Slices that have room for the training step, one of each chip.
SLICES = {
    "2B": ("v5e:2x4", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"),
    "4B": ("v5e:4x4", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1"),
    "8B": ("v5e:4x4", "v6e:4x4", "v5p:2x2x2", "tpu7x:2x2x1"),
    "32B": ("v5e:8x16", "v6e:8x8", "v5p:2x4x4", "tpu7x:2x2x4"),
    "30B-A3B": ("v5e:8x16", "v6e:8x8", "v5p:2x4x4", "tpu7x:2x2x4"),
    "235B-A22B": ("v5e:16x16", "v6e:16x16", "v5p:4x8x8", "tpu7x:4x4x8"),
}
RECIPES = {"30B-A3B": "sft_30b_a3b.toml", "235B-A22B": "sft_235b_pod.toml"}
HEAD = (
    "model, slice",
    "training mesh",
    "peak, GiB",
    "TFLOPs",
    "links, GiB",
    "beside",
    "step, s",
    "decode mesh",
    "peak, GiB",
    "memory, GiB",
    "step, ms",
)


def of_training(size: str, name: str) -> list[str]:
    """mesh, peak, FLOPs and received bytes of a device, their share beside the arithmetic, the floor."""
    machine = read_machine(name)
    count = machine.devices
    changes = [f"ckpt=Qwen/Qwen3-VL-{size}-Instruct", f"pack.rows={count}"]
    changes.append(f"pack.vision_rows={count}")
    recipe = read_recipe(CONFIGS / RECIPES.get(size, "sft_8b_full.toml"), changes)
    recipe = dataclasses.replace(recipe, mesh=Mesh())
    made = program_of(recipe, program.config_of(recipe.ckpt), machine)
    plan = report.plan_of(machine, made, compiling.compiled(made))
    if plan.moved is None or plan.times is None:
        return [mesh_of(made), f"does not fit: {plan.cause}", "", "", "", ""]
    moved = [(c.moved * c.times, c.beside) for c in plan.moved.collectives]
    total = sum(size for size, _ in moved)
    beside = sum(size for size, beside in moved if beside) / total if total else 0.0
    flops = made.work.again / count / 1e12
    peak = f"{plan.done.peak / GIB:.1f} of {machine.chip.hbm / GIB:.1f}"
    return [
        mesh_of(made),
        peak,
        f"{flops:,.0f}",
        f"{total / GIB:,.1f}",
        f"{beside:.0%}",
        f"{plan.times.least:.2f}",
    ]


def of_decode(size: str, name: str) -> list[str]:
    """mesh, peak and bytes of a device, the floor of a step with the cache full."""
    machine = read_machine(name)
    cfg, asked = program.config_of(f"Qwen3-VL-{size}"), program.Serving(ROWS, SLOTS, None)
    made = program.decoding(cfg, mesh_for(name, auto_mesh(cfg.text, machine.devices)), asked)
    plan = report.plan_of(machine, made, compiling.compiled(made))
    if plan.moved is None or plan.times is None:
        return [mesh_of(made), f"does not fit: {plan.cause}", "", ""]
    peak, moved = plan.done.peak / GIB, plan.moved.memory / GIB
    return [mesh_of(made), f"{peak:.1f}", f"{moved:.1f}", f"{1e3 * plan.times.least:.1f}"]


def attempt(of: Callable[[str, str], list[str]], size: str, name: str) -> list[str]:
    """The cells of one program; in the first of them what the compiler says, where it fails."""
    width = 6 if of is of_training else 4
    try:
        return of(size, name)
    except InputError as error:
        return [f"not compiled: {str(error)[:90]}", *[""] * (width - 1)]


def mesh_of(made: program.Program) -> str:
    """A mesh in words, as fsdp 8 x expert 2."""
    return " x ".join(f"{k} {n}" for k, n in made.mesh.shape.items() if n > 1) or "one device"


def markdown(rows: dict[str, list[str]]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *([key, *row] for key, row in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def chosen(names: str) -> list[tuple[str, str]]:
    """The sizes and slices that --only names: sizes, chips, or both. Raises SystemExit for others."""
    sizes, chips = set(SLICES), {name.partition(":")[0] for row in SLICES.values() for name in row}
    given = set(filter(None, names.split(",")))
    if unknown := given - sizes - chips:
        known = ", ".join(sorted(sizes | chips))
        raise SystemExit(f"error: --only: got {min(unknown)!r}, expected some of {known}")
    sizes, chips = given & sizes or sizes, given & chips or chips
    every = ((size, name) for size, row in SLICES.items() for name in row)
    return [(s, name) for s, name in every if s in sizes and name.partition(":")[0] in chips]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", default="", help="sizes, chips, or both")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="lines of what is done")
    options = parser.parse_args()
    versions = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    done: dict[str, list[str]] = {}
    if options.keep and options.keep.exists():
        lines = map(json.loads, options.keep.read_text().splitlines())
        done = {key: row for made_by, key, row in lines if made_by == versions}
    rows = {}
    for size, name in chosen(options.only):
        key = f"{size}, {name}"
        if key not in done:
            print(key, flush=True, file=sys.stderr)
            done[key] = [*attempt(of_training, size, name), *attempt(of_decode, size, name)]
            jax.clear_caches()
            if options.keep:
                with options.keep.open("a") as file:
                    file.write(json.dumps([versions, key, done[key]]) + "\n")
        rows[key] = done[key]
    print(versions, end="\n\n")
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
