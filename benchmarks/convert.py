"""Memory and speed of the converter on checkpoints of several GB of random bf16 weights.

    python -m benchmarks.convert [--scratch DIR] [case ...]

Each case is written to the scratch directory, copied (and flushed) by plain means, converted to Orbax
and back in child processes whose anonymous memory is watched, and compared byte for byte. The exit
code is 1 if a bound is missed.
Cases: 2b (the released shapes), small (4 GB, no tensor over 64 MB), moe5 (experts as transformers 5
writes them, which are turned on the way).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen3vl_jax import Config
from qwen3vl_jax.checkpoint.name_map import param_specs

GIB, MB = 2**30, 10**6
# Overrides of the 2B's text config, and top-level ones.
_EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 768}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2b": ({}, {}),
    "small": ({"vocab_size": 15_000, "num_hidden_layers": 34}, {}),
    "moe5": (
        {"vocab_size": 32_000, "num_hidden_layers": 10, **_EXPERTS},
        {"tie_word_embeddings": False, "model_type": "qwen3_vl_moe"},
    ),
}


def write_random(directory: Path, case: str) -> tuple[int, int]:
    """Writes a Hugging Face directory of shards up to 2 GB; (bytes, largest tensor)."""
    text, top = CASES[case]
    raw = Config.named("2b").to_hf()
    raw = {**raw, **top, "text_config": {**raw["text_config"], **text}}
    parts = sorted(
        (p.name, p.hf_shape) for row in param_specs(Config.from_hf(raw)) for p in row.parts
    )
    if case == "moe5":
        parts = [(n, (s[0], s[2], s[1]) if ".experts." in n else s) for n, s in parts]
    block = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02
    values = block.astype(ml_dtypes.bfloat16).view(np.uint8)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = largest = 0
    for name, shape in parts:
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and size + nbytes > 2 * 10**9:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size, total, largest = size + nbytes, total + nbytes, max(largest, nbytes)
    index: dict[str, str] = {}
    for k, held in enumerate(shards, 1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, held, values)
        index |= dict.fromkeys((name for name, _ in held), file)
    text_index = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text_index)
    (directory / "config.json").write_text(json.dumps(raw))
    return total, largest


def _write_shard(path: Path, held: list[tuple[str, tuple[int, ...]]], values: np.ndarray) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in held:
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            piece = min(end, values.nbytes)
            file.write(values[:piece].data)
            end -= piece


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy the files and flush them to the disk, as the converter does."""
    target.mkdir()
    start = time.perf_counter()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def watched(*arguments: str) -> tuple[float, int]:
    """(seconds, peak RssAnon in bytes) of a Python child."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        found = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, int(found[0].split()[1]) * 1024 if found else 0)
        time.sleep(0.005)
    if child.wait():
        raise SystemExit(f"{' '.join(arguments)} failed")
    return time.perf_counter() - start, peak


def run(case: str, scratch: Path) -> bool:
    """Prints the table of one case; whether memory and tensors were as they must be."""
    source, orbax, back = (scratch / name for name in ("hf", "orbax", "back"))
    source.mkdir(parents=True)
    total, largest = write_random(source, case)
    bound = GIB + 2 * largest
    print(f"{case}: {total / MB:,.0f} MB, largest tensor {largest / MB:,.0f} MB", flush=True)
    seconds = plain_copy(source, scratch / "copy")
    print(f"  plain copy      {total / MB / seconds:7,.0f} MB/s", flush=True)
    shutil.rmtree(scratch / "copy")
    shards = ("--max-shard-size", "2GB")
    steps = {
        "to Orbax": ("-m", "convert", str(source), str(orbax)),
        "to Hugging Face": ("-m", "convert", "--to-hf", str(orbax), str(back), *shards),
    }
    good = True
    for name, command in steps.items():
        seconds, peak = watched(*command)
        good &= peak <= bound
        print(
            f"  {name:15s} {total / MB / seconds:7,.0f} MB/s, start to exit {seconds:.1f} s; peak "
            f"RssAnon {peak / 2**20:,.0f} MiB of {bound / 2**20:,.0f} allowed "
            f"({'ok' if peak <= bound else 'TOO MUCH'})",
            flush=True,
        )
    if case != "moe5":  # whose experts come back in the released layout
        equal = tensors_equal(source, back)
        print(f"  every tensor's name, dtype and bytes as before: {equal}")
        good &= equal
    return good


def tensors_equal(left: Path, right: Path) -> bool:
    """Whether two directories hold the same tensors, bytes and all."""
    from qwen3vl_jax.storage.safetensors_files import read_tensors

    sides = [{t.name: t for t in read_tensors(d)} for d in (left, right)]
    a, b = sides
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and np.array_equal(a[n].view().view(np.uint8), b[n].view().view(np.uint8))
        for n in a
    )


def main() -> int:
    """Runs the cases asked for, all by default; the exit code is 1 if a bound is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.convert", description=__doc__)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument(
        "--scratch", type=Path, help="where 15 GB are free; default: a temporary one"
    )
    options = parser.parse_args()
    good = True
    for case in options.cases or CASES:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            good &= run(case, Path(folder) / case)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
