"""The six sizes on TPU slices: what fits, and the floors of a training step and of a decode step.

    python -m benchmarks.tpu_table [--only 8B,v5p] [--out docs/tpu_table.md]

Every program is compiled ahead of time (libtpu, no TPU), about an hour for all on two cores. Training is
full fine-tuning, one row of 8,192 tokens and 16,384 patches a device, on the preset's mesh; decoding is
16 rows of 8,192 slots in bf16, on the mesh that infer.py takes. A floor is the longest of arithmetic,
main memory and links at the makers' peak rates: a lower bound of the time. FILE.jsonl beside the table
keeps what is done, and the next start goes on from there.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks.tpu_programs import CONFIGS, GIB
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.planning import compiling, program, report
from qwen3vl_jax.planning.command import program_of, usual_sizes
from qwen3vl_jax.planning.machines import read_machine
from qwen3vl_jax.planning.topology import devices_of
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
    sizes = usual_sizes(cfg, machine, asked)
    devices = devices_of(machine)
    made = program.decoding(
        cfg, make_mesh(sizes or {"data": 1}, devices if sizes else devices[:1]), asked
    )
    plan = report.plan_of(machine, made, compiling.compiled(made))
    if plan.moved is None or plan.times is None:
        return [mesh_of(made), f"does not fit: {plan.cause}", "", ""]
    floor = f"{1e3 * plan.times.least:.1f} to {1e3 * plan.times.most:.1f}"
    return [mesh_of(made), f"{plan.done.peak / GIB:.1f}", f"{plan.moved.memory / GIB:.1f}", floor]


def mesh_of(made: program.Program) -> str:
    """A mesh in words, as fsdp 8 x expert 2."""
    return " x ".join(f"{k} {n}" for k, n in made.mesh.shape.items() if n > 1) or "one device"


def markdown(rows: dict[str, list[str]]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *([key, *row] for key, row in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", default="", help="sizes and chips")
    parser.add_argument("--out", metavar="FILE", default="tpu_table.md")
    options = parser.parse_args()
    only, out = set(filter(None, options.only.split(","))), Path(options.out)
    kept, done = out.with_name(out.name + ".jsonl"), {}
    if kept.exists():
        done = dict(json.loads(line) for line in kept.read_text().splitlines())
    rows: dict[str, Any] = {}
    for size, slices in SLICES.items():
        for name in slices:
            key = f"{size}, {name}"
            if only and not only & {size, name.partition(":")[0]}:
                continue
            if key not in done:
                done[key] = of_training(size, name) + of_decode(size, name)
                jax.clear_caches()
                with kept.open("a") as file:
                    file.write(json.dumps([key, done[key]]) + "\n")
            rows[key] = done[key]
            print(key, *rows[key], sep=" | ", flush=True)
    out.write_text(markdown(rows))


if __name__ == "__main__":
    main()
