"""One GPU against two: decoding by tensor and expert parallelism, FSDP training, the planner's memory.

    python -m benchmarks.scaling [--only decode|moe|train] [--tiny]

Random weights of the released shapes: the 8B and 12 layers of the 30B-A3B (whose expert kernels compile
for a second each) decode 64 steps with a cache of 2,048 tokens a row; the 2B trains as
configs/sft_2b.toml says. Each case is a process of its own. What differs between one device and two is
held against what bf16 costs by itself, that is the distance of one device from float32. The exit code
is 1 where two are further away, or where the compiled program's memory is not within 5 % of the
device's real peak. --tiny runs small shapes anywhere, to see that it runs
(XLA_FLAGS=--xla_force_host_platform_device_count=2 on a CPU).
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.scaling_cases import Case, config, run
from benchmarks.work import step_bytes
from qwen3vl_jax.runtime.chips import CHIPS, peak_flops

TIMES, WITHIN = 1.2, 0.05  # bf16's own error; of the real peak of memory
ROWS, SLOTS, STEPS = (1, 32), 2048, 64


class Done(NamedTuple):
    """A case and what came of it."""

    case: Case
    told: dict[str, Any]
    found: dict[str, np.ndarray]


def cases(only: str | None, tiny: bool) -> list[list[Case]]:
    """Groups of cases, the first of each on one device."""
    dense, moe, small = ("tiny", "tiny-moe", "tiny") if tiny else ("8b", "30b-a3b", "2b")
    slots, steps = (128, 4) if tiny else (SLOTS, STEPS)
    length, rows = (128, 4) if tiny else (4096, 8)

    def decode(model: str, axes: tuple[str, ...], rows: tuple[int, ...], timed: int, layers: int):
        one = Case(
            "decode", model, {}, rows, slots, steps, timed, 3 if tiny else layers, truth=True
        )
        return [one, *(dataclasses.replace(one, sizes={a: 2}, truth=False) for a in axes)]

    one = Case("train", small, {}, (rows,), length, 7, layers=1, truth=True)
    two = dataclasses.replace(one, sizes={"fsdp": 2}, truth=False)
    twice = dataclasses.replace(two, rows=(2 * rows,), layers=0)
    known = {
        "decode": decode(dense, ("tensor",), ROWS, 0, 12),
        "moe": decode(moe, ("expert", "tensor"), ROWS[1:], 0 if tiny else 12, 4),
        "train": [one, two, twice],
    }
    return [known[only]] if only else list(known.values())


def child(case: Case, scratch: Path) -> Done:
    """A case in a process of its own."""
    out = scratch / "found.npz"
    command = [sys.executable, "-m", "benchmarks.scaling", "--case"]
    command += [json.dumps(dataclasses.asdict(case)), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: failed with exit code {done.returncode}")
    with np.load(out) as found:
        return Done(case, json.loads(done.stdout.splitlines()[-1]), dict(found))


def distance(x: np.ndarray, truth: np.ndarray) -> float:
    """|x - truth| / |truth| of the median row: a router's near tie makes a row another one."""
    off, size = (np.linalg.norm(a.astype(np.float64), axis=-1) for a in (x - truth, truth))
    return float(np.median(off / size))


def compared(one: Done, two: Done) -> tuple[str, bool]:
    """What two devices are apart from float32, beside what one is; whether that is as near."""
    truth = one.found["float32"]
    ours, theirs = (distance(d.found["bfloat16"], truth) for d in (two, one))
    return f"{ours:.4f} ({theirs:.4f})", ours <= TIMES * theirs


def mesh_name(case: Case) -> str:
    """Its axes, as --mesh has them."""
    return ",".join(f"{n}={k}" for n, k in case.sizes.items()) or "one device"


def decode_floor(case: Case, rows: int, rate: float) -> float:
    """The least ms of a step, by what it must read."""
    filled = case.length - case.steps / 2
    moved = step_bytes(config(case.model, case.timed), rows, filled)
    return moved / rate / case.devices * 1000


def decode_table(done: list[Done], rate: float | None) -> tuple[Table, bool]:
    """ms a step, the least that memory allows, and the distance from float32."""
    first, good = done[0], True
    out = Table(
        title=f"decode, {first.case.model}, {first.case.length} slots", title_justify="left"
    )
    for name in ("mesh", "rows", "ms a step", "tokens/s", "times one", "floor, ms", "from float32"):
        out.add_column(name, justify="left" if name == "mesh" else "right")
    for each in done:
        told, near = compared(first, each)
        good &= near
        for rows in each.case.rows:
            ms, alone = each.told["ms"][str(rows)], first.told["ms"][str(rows)]
            least = rate and decode_floor(each.case, rows, rate)
            cells = f"{ms:.2f}", f"{rows / ms * 1000:,.0f}", f"{alone / ms:.2f}"
            floor = f"{least:.2f}" if least else ""
            out.add_row(mesh_name(each.case), str(rows), *cells, floor, told)
    return out, good


def train_table(done: list[Done], peak: float | None) -> tuple[Table, bool]:
    """Time, losses, memory, and the distance of gradients from float32."""
    first, good = done[0], True
    out = Table(title=f"training, {first.case.model}", title_justify="left")
    columns = ["mesh", "rows", "ms a step", "tokens/s", "times one", "MFU", "peak, GiB", "planned"]
    columns += ["last loss", "gradients from float32"]
    for name in columns:
        out.add_column(name, justify="left" if name == "mesh" else "right")
    for each in done:
        t, alone = each.told, first.told
        told, near = compared(first, each) if each.found else ("", True)
        off = t["planned"] / t["peak"] - 1 if t["peak"] else 0.0
        good &= near and abs(off) <= WITHIN
        rate = t["tokens"] / t["ms"] * 1000
        mfu = peak and t["flops"] / t["ms"] * 1000 / peak / each.case.devices
        times = f"{rate / (alone['tokens'] / alone['ms'] * 1000):.2f}"
        speed = f"{t['ms']:.0f}", f"{rate:,.0f}", times, f"{mfu:.1%}" if mfu else ""
        memory = f"{t['peak'] / 2**30:.2f}", f"{t['planned'] / 2**30:.2f} ({off:+.1%})"
        name, loss = mesh_name(each.case), f"{t['losses'][-1]:.5f}"
        out.add_row(name, str(each.case.rows[0]), *speed, *memory, loss, told)
    return out, good


def main() -> int:
    """The command; the exit code is 1 if a bound is missed."""
    name, raw = "python -m benchmarks.scaling", argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=("decode", "moe", "train"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        given = json.loads(args.case)
        print(json.dumps(run(Case(**given | {"rows": tuple(given["rows"])}), args.out)))
        return 0
    console, all_good, kind = Console(width=130), True, ""
    with tempfile.TemporaryDirectory() as scratch:
        for group in cases(args.only, args.tiny):
            done = []
            for case in group:
                start = time.perf_counter()
                done.append(child(case, Path(scratch)))
                seconds = f"{time.perf_counter() - start:.0f} s"
                print(
                    case.kind, case.model, mesh_name(case), seconds, done[-1].told, file=sys.stderr
                )
            kind = done[0].told["device"]
            chip = next((c for name, c in CHIPS.items() if name in kind.lower()), None)
            if group[0].kind == "decode":
                table, good = decode_table(done, chip and chip.hbm_rate)
            else:
                table, good = train_table(done, peak_flops(kind))
            console.print(table)
            all_good &= good
    print(f"{kind}; from float32: |x - float32| / |float32|, in brackets that of one device")
    print("all bounds are met" if all_good else "MISSED: see above")
    return int(not all_good)


if __name__ == "__main__":
    sys.exit(main())
