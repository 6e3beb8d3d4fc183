"""Inference beside transformers on this machine: ViT, prefill, decode, first token, mixed requests.

    python -m benchmarks.inference [SIZE ..] [--only vision,prefill,decode,first,requests] [--tiny]

Random bf16 weights of released sizes (8b by default). Ours and transformers each run in a process of
their own, one after the other, on the same numbers. The floor is the arithmetic at the rate of a bf16
product measured here, for a decode step the bytes at the rate of reading memory measured here. Written:
a table, and with --json FILE all figures. On a CPU: the prompts and steps that a CPU can do.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.scaling_cases import config
from benchmarks.work import CPU_WORKS, WORKS, Figure, Work, floor_seconds
from qwen3vl_jax.runtime.compile_cache import VARIABLE

KINDS = ("vision", "prefill", "decode", "first", "requests")
REQUESTS, ROWS = 96, 32
PEER_FILLED = 32_768  # transformers prefills a longer cache for each answer, which takes minutes
LIMIT = 1800  # seconds that a process may take


def child(module: str, asked: dict[str, Any], cache: str = "") -> list[dict[str, Any]]:
    """The lines that a process prints; `cache`: a folder for its compiled programs."""
    env = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env |= {VARIABLE: cache} if cache else {}
    if not cache:
        env.pop(VARIABLE, None)
    asked = {**asked, "began": time.time()}
    command = [sys.executable, "-m", module, json.dumps(asked)]
    found, since = [], time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            found.append(json.loads(line))
            print(
                f"{time.perf_counter() - since:6.0f} s {module} {line.strip()[:160]}",
                file=sys.stderr,
            )
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with exit code {process.returncode}")
    return found


def works_of(size: str, kinds: set[str], on_cpu: bool) -> list[Work]:
    """The works of these kinds that a machine like this can do."""
    found = CPU_WORKS if on_cpu and size != "tiny" else WORKS[size]
    return [work for work in found if work.kind in kinds]


def figures(lines: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures of a child by the name of the work."""
    return {line["work"]: Figure(**line) for line in lines if "work" in line}


def compare(size: str, works: list[Work], with_peer: bool) -> tuple[Table, dict[str, Any]]:
    """The table of one size, and everything that was found."""
    asked = {"what": "works", "size": size, "works": [dataclasses.asdict(work) for work in works]}
    ours = child("benchmarks.inference_ours", asked)
    peer_works = [dataclasses.asdict(work) for work in works if work.filled <= PEER_FILLED]
    peer_works = [work for work in peer_works if not work["weights"]]
    peer = child("tests.inference_peer", {**asked, "works": peer_works}) if with_peer else []
    rates, mine, theirs = ours[0]["ceilings"], figures(ours), figures(peer)
    head = f"{size}, {ours[0]['device']}, {ours[0]['versions']}"
    head += f"; {peer[0]['versions']}" if peer else ""
    table = Table(title=head, title_justify="left")
    columns = ["work", "ours, ms", "lowest to highest", "floor", "of the floor", "transformers"]
    columns += ["times", "first call, s", "peak, GiB"]
    for name in columns:
        table.add_column(name, justify="left" if name == "work" else "right")
    cfg = config(size)
    for work in works:
        floor = floor_seconds(cfg, work, rates["matmul"], rates["read"])
        table.add_row(*_cells(mine[work.name], theirs.get(work.name), floor))
    return table, {"size": size, "ours": ours, "peer": peer}


def _cells(mine: Figure, theirs: Figure | None, floor: float) -> list[str]:
    """A row of the table."""
    if mine.error:
        return [mine.work, mine.error]
    low, middle, high = (1e3 * x for x in (min(mine.seconds), mine.median, max(mine.seconds)))
    known = theirs if theirs is not None and not theirs.error else None
    return [
        mine.work,
        f"{middle:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{floor * 1e3:.2f}",
        f"{floor * 1e3 / middle:.0%}",
        f"{known.median * 1e3:.1f}" if known else "failed" if theirs else "",
        f"{known.median * 1e3 / middle:.2f}" if known else "",
        f"{mine.first:.1f}",
        f"{mine.peak / 2**30:.1f}",
    ]


def cold_and_cached(asked: dict[str, Any], peer: str) -> dict[str, Any]:
    """A process with an empty compile cache, the same again, and the peer's where it is named."""
    with tempfile.TemporaryDirectory() as cache:
        found = {
            name: child("benchmarks.inference_ours", asked, cache)[-1]
            for name in ("cold", "cached")
        }
    return found | ({"transformers": child(peer, asked)[-1]} if peer else {})


def process_table(title: str, found: dict[str, dict[str, Any]]) -> Table:
    """Whole processes: seconds by what was cached."""
    names = list(dict.fromkeys(name for row in found.values() for name in row if name != "work"))
    table = Table("process", *names, title=title, title_justify="left")
    for name, row in found.items():
        cells = (row.get(key, "") for key in names)
        table.add_row(name, *(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells))
    return table


def main() -> int:
    """The command; the exit code is 1 if a work of ours failed."""
    name, raw = "python -m benchmarks.inference", argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=raw)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--only", default=",".join(KINDS), metavar="KINDS")
    parser.add_argument("--cpu", action="store_true", help="the works of a CPU")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="mixed requests")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    sizes = ["tiny"] if args.tiny else args.sizes or ["8b"]
    kinds = set(args.only.split(","))
    if unknown := [*(set(sizes) - set(WORKS)), *(kinds - set(KINDS))]:
        parser.error(f"got {', '.join(unknown)}, expected sizes of {list(WORKS)}, kinds of {KINDS}")
    console, kept = Console(width=150), []
    for size in sizes:
        if works := works_of(size, kinds, args.cpu):
            table, found = compare(size, works, not args.no_peer)
            console.print(table)
            kept.append(found)
        if "first" in kinds:
            prompt = next(work for work in works_of(size, {"prefill"}, args.cpu) if work.grids)
            found = cold_and_cached(
                {"what": "first", "size": size, "work": dataclasses.asdict(prompt)}, ""
            )
            console.print(
                process_table(f"{size}, {prompt.name}: seconds to the first token", found)
            )
            kept.append({"size": size, "first": found})
        if "requests" in kinds:
            asked = {"what": "requests", "size": size, "count": args.requests, "rows": ROWS}
            found = cold_and_cached(asked, "" if args.no_peer else "tests.inference_peer")
            console.print(process_table(f"{size}, {args.requests} mixed requests", found))
            kept.append({"size": size, "requests": found})
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return int(any(line.get("error") for part in kept for line in part.get("ours", ())))


if __name__ == "__main__":
    sys.exit(main())
