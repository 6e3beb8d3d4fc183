"""What the compiled TPU programs hold, from the compiler alone: no TPU is needed, libtpu is.

    python -m benchmarks.tpu_programs [--only decode,rows,experts,train,vision] [--whole]

Programs are compiled ahead of time for chips that are not here. `decode`: the loop of decode steps, its
memory and what it copies. `rows`: whether one row reaches the matrix unit. `experts`: the arithmetic of
the experts' weight gradient. `train`: the share of an exchange that runs beside the arithmetic.
`vision`: what the ViT's attention steps over. Small numbers of layers stand for all of them; --whole
takes the models as released, several minutes each.
It ends with 1 where a bound is missed.
"""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.scaling_cases import config
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.model import attention_tpu
from qwen3vl_jax.model.attention import attend, host_bound
from qwen3vl_jax.model.moe import ragged_dot_tpu
from qwen3vl_jax.planning import compiling, hlo, program
from qwen3vl_jax.planning.command import program_of
from qwen3vl_jax.planning.machines import read_machine
from qwen3vl_jax.planning.topology import devices_of
from qwen3vl_jax.planning.traffic import traffic
from qwen3vl_jax.training.recipe import read_recipe

# Operations that give the numbers of one array in another order, type or shape.
COPIES = ("copy", "copy-start", "transpose", "reshape", "convert")
CONFIGS = Path(__file__).parent.parent / "configs"
GIB = 2**30


class Row(NamedTuple):
    """One figure of a compiled program, and the bound that it must keep; None: it is reported only."""

    program: str
    what: str
    value: float
    unit: str = ""
    most: float | None = None
    least: float | None = None

    @property
    def fault(self) -> bool:
        over = self.most is not None and self.value > self.most
        return over or (self.least is not None and self.value < self.least)


def mesh_for(machine: str, sizes: dict[str, int]) -> Any:
    devices = devices_of(read_machine(machine))
    return make_mesh(sizes or {"data": 1}, devices if sizes else devices[:1])


def copies(module: hlo.Module, held: Any) -> list[str]:
    """Arrays in main memory that a program writes as copies of what it holds: weights, the cache.

    A copy has as many numbers as an array has on a device, whatever its dims. Those inside of fusions
    are never written.
    """
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(held) if x.ndim > 1
    ]
    large = {size for size in sizes if size > 2**18}
    inside = {
        x.called("calls")
        for lines in module.computations.values()
        for x in lines
        if x.op == "fusion"
    }
    found = []
    for name, lines in module.computations.items():
        for x in lines if name not in inside else ():
            shape = hlo.result(x)
            dims = re.search(r"\[([\d,]+)\]", shape)
            size = math.prod(map(int, dims[1].split(","))) if dims else 0
            main = any(part.main for part in hlo.arrays(shape))
            if main and size in large and _written_by(module, x) in COPIES:
                found.append(f"{x.name} {shape}")
    return found


def _written_by(module: hlo.Module, x: hlo.Instruction) -> str:
    """The operation that writes a result: of a fusion that of its root, bitcasts looked through."""
    if x.op != "fusion":
        return x.op
    called = x.called("calls") or ""
    lines = {line.name: line for line in module.computations[called]}
    root = module.roots[called]
    while root.op == "bitcast":
        root = lines[root.operands[0]]
    return root.op


def decode(layers: int) -> Iterator[Row]:
    """The loop of decode steps of four programs."""
    cases = (
        ("8B", "v5e:1x1", {}, 8, 4096, "int8"),
        ("8B", "v5p:2x2x1", {"tensor": 4}, 32, 2048, None),
        ("30B-A3B", "v5p:2x2x1", {"expert": 2, "tensor": 2}, 32, 2048, None),
        # One expert a device.
        ("30B-A3B", "v5e:8x16", {"expert": 32, "tensor": 4}, 16, 8192, None),
    )
    for size, machine, sizes, rows, slots, weights in cases:
        cfg = config(size, layers)
        asked = program.Serving(rows, slots, None, weights=weights)
        made = program.decoding(cfg, mesh_for(machine, sizes), asked)
        done = compiling.compiled(made)
        name = f"{size} {weights or 'bf16'}, {rows} x {slots:,}, {machine}"
        module = hlo.parse(done.executable.as_text())
        cache = made.args[1].cache
        # On so many devices logits have as many numbers as a part of the embedding: it is only compiled.
        if made.mesh.size < 128:
            found = copies(module, (made.args[0], cache.k, cache.v))
            yield Row(name, "copies of a weight or a cache", len(found), most=0)
        held = done.executable.memory_analysis().argument_size_in_bytes
        yield Row(name, "peak over the arguments", (done.peak - held) / GIB, "GiB")
        if not layers and weights:
            leaves = jax.tree.leaves(made.args[0]["vision"])
            tower = sum(x.size * x.dtype.itemsize for x in leaves)
            yield Row(name, "peak without the vision tower", (done.peak - tower) / GIB, "GiB", 12.9)
        # On two axes weights are split along D too: besides, a layer reduce-scatters and gathers its sums.
        sums = traffic(module, made.mesh.size).collectives
        if 1 < made.mesh.size < 128:
            big = [c for c in sums if c.kind == "all-reduce" and c.moved > 2**14]
            # One more for the embedding.
            each = (len(big) - 1) / cfg.text.num_hidden_layers
            yield Row(name, "all-reduces a layer", each, most=2, least=1)


def rows(layers: int) -> Iterator[Row]:
    """The products of one row on the matrix unit: 4 a layer, and the lm_head; attention is a kernel."""
    for machine in ("v5e:1x1", "v6e:1x1"):
        cfg = config("8B", layers)
        made = program.decoding(
            cfg, mesh_for(machine, {}), program.Serving(1, 4096, None, weights="int8")
        )
        module = hlo.parse(compiling.compiled(made).executable.as_text())
        found = sum(x.op == "convolution" for lines in module.computations.values() for x in lines)
        least = 4 * cfg.text.num_hidden_layers + 1
        yield Row(
            f"8B int8, 1 x 4,096, {machine}", "products on the matrix unit", found, least=least
        )


def experts(_: int) -> Iterator[Row]:
    """The gradient of 16 experts' weights, 98,304 rows: FLOPs against its own arithmetic."""
    count, width, out, held = 98_304, 2048, 1536, 16
    for machine in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        mesh = mesh_for(machine, {})

        def slope(x, w, sizes, d_y):
            return jax.vjp(lambda w: ragged_dot_tpu(x, w, sizes), w)[1](d_y)[0]

        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        shapes = ((count, width), (held, width, out), (held,), (count, out))
        dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16)
        args = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=where)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        with jax.set_mesh(mesh):
            costs: Any = jax.jit(slope).lower(*args).compile().cost_analysis()
        ratio = costs["flops"] / (2 * count * width * out)
        yield Row(f"experts' dW, {machine}", "FLOPs over its arithmetic", ratio, "x", 1.5)


def train(layers: int) -> Iterator[Row]:
    """The 8B over 16 chips: the share of its exchange that runs beside the arithmetic, and its size."""

    def exchanged(machine: str, *changes: str) -> tuple[float, float]:
        """Bytes of the large exchanges of a step, and of those that run beside the arithmetic."""
        changes = ("mesh.fsdp=16", "step.remat=full", *changes)
        recipe = read_recipe(CONFIGS / "sft_8b_full.toml", changes)
        made = program_of(recipe, config("8B", layers), read_machine(machine))
        module = hlo.parse(compiling.compiled(made).executable.as_text())
        large = [c for c in traffic(module, made.mesh.size).collectives if c.moved > 2**20]
        beside = (c.moved * c.times for c in large if c.beside)
        return sum(c.moved * c.times for c in large), sum(beside)

    for machine, least in (("v6e:4x4", 0.9), ("v5p:2x2x4", None)):
        name = f"8B train, {machine}, fsdp 16"
        moved, beside = exchanged(machine)
        yield Row(name, "exchange while it computes", beside / moved, "", None, least)
        short, _ = exchanged(machine, "step.gradients=bfloat16")
        yield Row(name, "exchange with gradients in bf16 over fp32", short / moved, "x", 0.8)


def vision(_: int) -> Iterator[Row]:
    """The ViT's attention: key blocks that are stepped over, of those that some query of a block sees."""
    what = "key blocks stepped over, of those seen"
    for machine in ("v5e:1x1", "v6e:1x1"):
        for size, count in ((4096, 8), (576, 64)):
            first = np.arange(count, dtype=np.int32) * size
            lo, hi = (np.repeat(x, size)[None] for x in (first, first + size))
            blocks = range(0, lo.size, attention_tpu.BLOCK)
            ends = (hi[0, i : i + attention_tpu.BLOCK].max() for i in blocks)
            starts = (lo[0, i] // attention_tpu.BLOCK for i in blocks)
            seen = sum(-(-end // attention_tpu.BLOCK) - start for end, start in zip(ends, starts))
            stepped = _vision_grid(mesh_for(machine, {}), lo, hi)
            name = f"ViT, {count} x {size:,} patches, {machine}"
            yield Row(name, what, stepped / seen, "x", 1.3)


def _vision_grid(mesh: Any, lo: np.ndarray, hi: np.ndarray) -> int:
    """Steps a head of the kernel over the 8B's patches, compiled."""
    c = config("8B").vision
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((*lo.shape, c.num_heads, c.head_dim), jnp.bfloat16, sharding=where)

    def run(q, k, v):
        given = jnp.asarray(lo), jnp.asarray(hi)
        return attend(q, k, v, *given, layout="frames", segments=host_bound(lo, hi, 0))

    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(x, x, x)
        traced.lower().compile()
    _, blocks, steps = re.findall(r"grid=\((\d+), (\d+), (\d+)\)", str(traced.jaxpr))[0]
    return int(blocks) * int(steps)


# Each takes the number of decoder layers, 0 for all.
CASES = {"decode": decode, "rows": rows, "experts": experts, "train": train, "vision": vision}


def table(found: list[Row]) -> Table:
    out = Table("program", "figure", "compiled", "must be", "")
    for row in found:
        ends = {"at least": row.least, "at most": row.most}
        bound = ", ".join(f"{name} {end:g}" for name, end in ends.items() if end is not None)
        verdict = "[red]missed" if row.fault else "[green]yes" if bound else ""
        out.add_row(row.program, row.what, f"{row.value:,.3g} {row.unit}", bound, verdict)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="CASES", default=",".join(CASES))
    parser.add_argument("--whole", action="store_true", help="all layers")
    options = parser.parse_args()
    found = []
    for name in options.only.split(","):
        if name not in CASES:
            parser.error(f"--only: got {name!r}, expected some of {', '.join(CASES)}")
        for row in CASES[name](0 if options.whole else 2):
            found.append(row)
            print(f"{row.program}: {row.what} {row.value:,.3g} {row.unit}", flush=True)
    Console(width=120).print(table(found))
    return int(any(row.fault for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
