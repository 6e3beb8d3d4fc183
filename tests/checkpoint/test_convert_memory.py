"""Anonymous memory while 320 MB go through the converter: a few tensors' worth, not the checkpoint's.

The 4 GB versions are `python -m benchmarks.convert`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen3vl_jax import Config
from qwen3vl_jax.checkpoint.name_map import param_specs

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
CHILD = """
import ctypes, gc, json, sys, threading, time
from pathlib import Path
import jax, orbax.checkpoint
from qwen3vl_jax.convert.to_hf import to_hf
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.loading import load

def anonymous():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch(step):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the step before has freed is no start for this one
    start, peak, going = anonymous(), 0, True
    def look():
        nonlocal peak
        while going:
            peak = max(peak, anonymous() - start)
            time.sleep(0.002)
    thread = threading.Thread(target=look)
    thread.start()
    step()
    going = False
    thread.join()
    return peak

source, orbax, back = map(Path, sys.argv[1:])
steps = {
    "to_orbax": lambda: to_orbax(source, orbax),
    "to_hf": lambda: to_hf(orbax, back, shard_size=10**8),
    "load_hf": lambda: load(source),
    "load_orbax": lambda: load(orbax),
    "to_int8": lambda: to_orbax(source, back.with_name("int8"), weights="int8"),
}
print(json.dumps({name: watch(step) for name, step in steps.items()}))
"""


def test_memory_is_bounded(tmp_path):
    """Peaks above the start: both directions a group (64 MiB) and two tensors, loads also the weights."""
    raw = Config.named("2b").to_hf()
    raw["text_config"] |= {"vocab_size": 8_000, "hidden_size": 1024, "num_hidden_layers": 6}
    raw["text_config"] |= {"intermediate_size": 3072, "num_attention_heads": 8}
    raw["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0], "out_hidden_size": 1024}
    source = tmp_path / "hf"
    source.mkdir()
    parts = [part for row in param_specs(Config.from_hf(raw)) for part in row.parts]
    sizes = {part.name: 2 * int(np.prod(part.hf_shape)) for part in parts}
    header, end = {}, 0
    for part in parts:
        start, end = end, end + sizes[part.name]
        header[part.name] = {"dtype": "BF16", "shape": part.hf_shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    values = np.random.default_rng(0).standard_normal(max(sizes.values()) // 2, np.float32)
    block = values.astype(ml_dtypes.bfloat16).tobytes()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes.values():
            file.write(block[:size])
    (source / "config.json").write_text(json.dumps(raw))
    del values, block
    total, largest = sum(sizes.values()), max(sizes.values())
    assert 300 * 10**6 < total < 330 * 10**6
    assert largest < 40 * 10**6
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, source, tmp_path / "o", tmp_path / "b"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout)
    print({name: f"{peak / MIB:.0f} MiB" for name, peak in peaks.items()})
    bound = 2 * largest + 128 * MIB
    assert peaks["to_orbax"] < bound
    assert peaks["to_hf"] < bound
    assert peaks["to_int8"] < bound + 128 * MIB
    # On a CPU the device's memory is the host's, so the weights themselves count.
    assert peaks["load_hf"] < total + bound
    assert peaks["load_orbax"] < total + bound
