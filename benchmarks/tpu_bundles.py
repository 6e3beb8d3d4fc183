"""The instructions of a TPU's products for one row, beside the time of their weights' bytes.

    python -m benchmarks.tpu_bundles [MACHINE ..]      # v5e:1x1 and v6e:1x1; needs .[tpu], no TPU

A decode step of the 8B with int8 weights. A loop's body is scheduled into bundles of instructions, one a
cycle: bundles times iterations over the clock is the product's least time without waits for memory. libtpu
writes them where LIBTPU_INIT_ARGS says, so each machine is a process of its own. The exit code is 1 if a
product's bundles take more than MOST times what its bytes take.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9}  # cycles a second
MOST, LAYERS = 1.1, 2
SMALLEST = 1 << 20  # bytes of a weight
_FUSION = re.compile(
    r"^ *(?:ROOT )?%(fusion\.\d+) = [^=]*? fusion\(.*?kind=kOutput.*?calls=%([\w.\-]+)", re.M
)


class Product(NamedTuple):
    """One product of the program."""

    name: str
    weight: int  # bytes
    bundles: int  # of the loop's body, all that are not empty
    iterations: int

    def share(self, chip: str, rate: float) -> float:
        """The time of its bundles in that of its weight's bytes, at `rate` bytes a second."""
        return self.bundles * self.iterations / CLOCKS[chip] / (self.weight / rate)


def products(text: str, folder: Path) -> list[Product]:
    """The products with int8 weights of a compiled program's text and of libtpu's files about it.

    A product that is another's again has no files. Raises SystemExit if no product of a size has any.
    """
    found, sizes = [], set[int]()
    for name, called in _FUSION.findall(text):
        head = re.search(rf"^%{re.escape(called)} \((.*?)\) ->", text, re.M)
        shapes = re.findall(r"s8\[([\d,]+)\]", head[1]) if head else []
        weight = max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)
        if weight < SMALLEST:
            continue
        sizes.add(weight)
        told = next(folder.glob(f"*-{name}-*-schedule-analysis_final_bundles.txt"), None)
        code = next(folder.glob(f"*-{name}-[0-9]*-final_bundles.txt"), None)
        if told is None or code is None:
            continue
        (count,) = re.findall(r"non empty scheduled bundles: (\d+)", told.read_text())
        ends = re.findall(r"totalorder [^,]*, (\d+) /\* loop exit test", code.read_text())
        found.append(Product(name, weight, int(count), max(map(int, ends), default=1)))
    if left := sizes - {one.weight for one in found}:
        raise SystemExit(f"libtpu wrote no bundles of the products of weights of {left} bytes")
    return found


def of_machine(machine: str) -> list[Product]:
    """The products of a machine's program, compiled in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--xla_jf_dump_to={folder}/llo --xla_jf_dump_llo_text=true"
        env = {**os.environ, "LIBTPU_INIT_ARGS": options}
        command = [sys.executable, "-m", "benchmarks.tpu_bundles", "--write", machine, folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return products((Path(folder) / "program.txt").read_text(), Path(folder) / "llo")


def write(machine: str, folder: str) -> None:
    """Compiles the decode step and writes its text."""
    from benchmarks.tpu_programs import config, mesh_for
    from qwen3vl_jax.planning import compiling, program

    asked = program.Serving(1, 4096, None, weights="int8")
    made = program.decoding(config("8B", LAYERS), mesh_for(machine, {}), asked)
    text = compiling.compiled(made).executable.as_text()
    (Path(folder) / "program.txt").write_text(text)


def main() -> int:
    """The command."""
    from qwen3vl_jax.planning.machines import read_machine

    given = sys.argv[1:]
    if given[:1] == ["--write"]:
        write(*given[1:])
        return 0
    table = Table("machine", "product", title="one row, int8", title_justify="left")
    for name in ("weight, MB", "bundles", "iterations", "of the bytes' time"):
        table.add_column(name, justify="right")
    worst = 0.0
    for machine in given or [f"{chip}:1x1" for chip in CLOCKS]:
        known = read_machine(machine)
        if known.name not in CLOCKS:
            raise SystemExit(f"machine: got {machine}, expected one of {', '.join(CLOCKS)}")
        found = of_machine(machine)
        if not found:
            raise SystemExit(f"{machine}: libtpu wrote no bundles of a product")
        for one in found:
            share = one.share(known.name, known.chip.hbm_rate)
            worst = max(worst, share)
            cells = one.weight / 1e6, one.bundles, one.iterations
            table.add_row(machine, one.name, *(f"{x:,.0f}" for x in cells), f"{share:.2f}")
    Console().print(table)
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
