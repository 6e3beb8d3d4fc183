"""Memory of each process when a released 2B is read straight into shards, of both forms of files.

    python -m benchmarks.sharded_load [--scratch DIR] [--mesh fsdp=4,tp=2]

Two processes of four CPU devices read a checkpoint of the released shapes (random bf16 weights, 4.3 GB)
over one mesh of eight; their anonymous memory is watched. The exit code is 1 where one took more than
its share of the weights and 1.5 GiB.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.convert import write_random
from qwen3vl_jax.checkpoint.hf_reader import open_hf
from qwen3vl_jax.checkpoint.param_paths import flatten
from qwen3vl_jax.cli.infer_arguments import mesh_sizes
from qwen3vl_jax.convert.to_orbax import to_orbax

PROCESSES, DEVICES, ALLOWED = 2, 4, 3 << 29  # bytes beside the share


def read(directory: Path, source: Path, mesh: str, port: int, index: int) -> None:
    """One process: loads, and prints seconds, the bytes that its devices hold, and if they are right."""
    import jax

    from qwen3vl_jax import Config, load
    from qwen3vl_jax.device_mesh import make_mesh
    from qwen3vl_jax.runtime.distributed import Asked, start

    start(Asked(f"127.0.0.1:{port}", PROCESSES, index))
    begun = time.perf_counter()
    params, _ = load(directory, mesh=make_mesh(mesh_sizes(mesh) or {}))
    seconds, leaves = time.perf_counter() - begun, jax.tree.leaves(params)
    held = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
    files, arrays = open_hf(source, Config.from_hf(source)), dict(flatten(params))
    shards = ((files[path], x.addressable_shards[-1]) for path, x in arrays.items())
    equal = all(np.array_equal(leaf.parts([s.index])[0], np.asarray(s.data)) for leaf, s in shards)
    print(json.dumps({"seconds": seconds, "held": held, "equal": equal}), flush=True)


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def watched(directory: Path, source: Path, mesh: str) -> list[tuple[int, dict[str, Any]]]:
    """(peak RssAnon, what `read` prints) of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "benchmarks.sharded_load", "--mesh", mesh]
    command += ["--read", directory, "--source", source]
    children = [
        subprocess.Popen(
            [*command, f"--port={port}", f"--index={i}"], env=env, stdout=subprocess.PIPE, text=True
        )
        for i in range(PROCESSES)
    ]
    peaks = [0] * PROCESSES
    while any(child.poll() is None for child in children):
        peaks = [max(peak, anonymous(c.pid)) for peak, c in zip(peaks, children, strict=True)]
        time.sleep(0.005)
    found = []
    for peak, child in zip(peaks, children, strict=True):
        told, _ = child.communicate()
        if child.returncode:
            raise SystemExit(f"a process failed with exit code {child.returncode}")
        found.append((peak, json.loads(told.splitlines()[-1])))
    return found


def measure(scratch: Path, mesh: str) -> bool:
    """Prints a line for each process and form; whether all stayed in bounds."""
    source, orbax = scratch / "hf", scratch / "orbax"
    source.mkdir()
    total, _ = write_random(source, "2b")
    bound = total // PROCESSES + ALLOWED
    to_orbax(source, orbax)
    good = True
    for name, directory in (("Hugging Face", source), ("Orbax", orbax)):
        for i, (peak, told) in enumerate(watched(directory, source, mesh)):
            good &= peak <= bound and told["equal"]
            print(
                f"{name:12s} process {i}: {told['held'] / 2**20:,.0f} MiB held of "
                f"{total / 2**20:,.0f}, equal {told['equal']}, {told['seconds']:.1f} s, peak RssAnon "
                f"{peak / 2**20:,.0f} MiB of {bound / 2**20:,.0f} allowed "
                f"({'ok' if peak <= bound else 'TOO MUCH'})",
                flush=True,
            )
    return good


def main() -> int:
    """The command; the exit code is 1 if a bound is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.sharded_load", description=__doc__)
    parser.add_argument(
        "--scratch", type=Path, help="where 9 GB are free; default: a temporary one"
    )
    parser.add_argument(
        "--mesh", default="fsdp=4,tp=2", help="of eight devices, as infer.py has it"
    )
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read, options.source, options.mesh, options.port, options.index)
        return 0
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        return int(not measure(Path(folder), options.mesh))


if __name__ == "__main__":
    sys.exit(main())
