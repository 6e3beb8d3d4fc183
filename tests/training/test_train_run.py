"""train.py: a killed run goes on bit for bit; what it writes, keeps, refuses and exports."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import train_files

import train
from qwen3vl_jax.training.reporting.metrics_table import read_table
from qwen3vl_jax.training.run_dir import saved_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = train_files.RECIPE["steps"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a checkpoint, conversations and a recipe."""
    folder = tmp_path_factory.mktemp("train")
    ckpt = train_files.checkpoint(folder / "ckpt", layers=1)
    data = train_files.conversations(folder / "chats.jsonl")
    # What each step drops is drawn from a key of the checkpoint.
    random = {"attention_dropout": 0.1, "remat": "auto"}
    train_files.write_recipe(folder / "recipe.toml", ckpt, data, step=random)
    return folder


def command(files: Path, out: str) -> list[str]:
    return ["--config", str(files / "recipe.toml"), "--out", str(files / out)]


def start(files: Path, out: str) -> subprocess.Popen:
    """train.py in a process of its own; children share compiled programs."""
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "train.py", *command(files, out)],
        cwd=ROOT,
        env={**os.environ, **cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """The output of a process that ends well."""
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out[-3000:]
    return out


def at_step(process: subprocess.Popen, out: Path, step: int) -> int:
    """Waits until a run has written a step down; the last one it wrote."""
    while process.poll() is None:
        rows = read_table(out / "metrics.csv")
        if rows and int(rows[-1]["step"]) >= step:
            return int(rows[-1]["step"])
        time.sleep(0.002)
    raise AssertionError(process.communicate()[0][-3000:])


@pytest.fixture(scope="module")
def whole(files):
    """An uninterrupted run, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main(command(files, "whole")) == 0
    return said.getvalue(), files / "whole"


@pytest.fixture(scope="module")
def broken(files, whole):
    """The same run, killed -9 at two moments, once asked to end by SIGTERM, its last step damaged."""
    out, chance = files / "broken", random.Random()
    moments = [*sorted(chance.sample(range(1, STEPS - 9), 2)), STEPS - 9 + chance.randrange(6)]
    print(f"killed at {moments}")
    said = []
    for sent, moment in zip([signal.SIGKILL] * 2 + [signal.SIGTERM], moments):
        process = start(files, "broken")
        at_step(process, out, moment)
        time.sleep(chance.random() * 0.03)
        process.send_signal(sent)
        said.append(process.communicate(timeout=300)[0])
        assert process.returncode == (-9 if sent == signal.SIGKILL else 0), said[-1][-3000:]
    last = out / "checkpoints" / str(saved_steps(out)[-1])
    largest = max(last.glob("*/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return [*said, finish(start(files, "broken"))], out


def leaves(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a saved step, by item and place."""
    from qwen3vl_jax.checkpoint.orbax_io import open_tree

    found = {}
    for item in ("weights", "average", "state"):
        opened = open_tree(folder / item)
        found |= {(item, *path): leaf.load() for path, leaf in opened.items()}
    return found


def test_a_killed_run_goes_on_bit_for_bit(whole, broken):
    """Two kills, a SIGTERM and a damaged step later: every loss and norm, all of the state."""
    want, got = (read_table(out / "metrics.csv") for _, out in (whole, broken))
    assert [int(row["step"]) for row in got] == list(range(1, STEPS + 1))
    same = [
        name
        for name in want[0]
        if name not in ("tokens_per_s", "tflops", "mfu", "mfu_padded", "memory_gib")
        and not name.endswith("seconds")
    ]
    assert {"loss", "grad_norm", "lr", "tokens", "fill", "samples"} <= set(same)
    for a, b in zip(want, got):
        assert {n: a[n] for n in same} == {n: b[n] for n in same}
    states = [leaves(out / "checkpoints" / str(STEPS)) for _, out in (whole, broken)]
    assert states[0].keys() == states[1].keys()
    for place, x in states[0].items():
        assert x.tobytes() == states[1][place].tobytes(), place
    assert float(want[-1]["loss"]) < 0.9 * float(want[0]["loss"])


def test_sigterm_saves_the_step_it_came_in(broken):
    """The run that SIGTERM ended says so, and its step is kept aside: a file of it was cut afterwards.

    The next run names it and goes on from the step before.
    """
    (asked, last), out = broken[0][2:], broken[1]
    assert "stopped by SIGTERM, saved" in asked
    step = int(asked.rsplit(": step ", 1)[1].split()[0])
    first = int(
        next(line for line in last.splitlines() if line.startswith("step ")).split("/")[0][5:]
    )
    assert first == max(n for n in range(0, step, 5)) + 1
    assert f"checkpoints/{step}/" in last and "damaged: " in last
    assert (out / "damaged" / str(step)).is_dir()


def test_what_a_run_directory_holds(whole):
    """Two steps are kept; plain lines; the curves; the whole config; and a finished run stays so."""
    said, out = whole
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["20", str(STEPS)]
    assert f"step {STEPS}/{STEPS} loss " in said and "tokens/s, fill" in said
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "step.remat=auto: full" in said
    assert 'remat = "auto"' in (out / "config.toml").read_text()
    assert "new_tokens = []" in (out / "config.toml").read_text()
    row = read_table(out / "metrics.csv")[0]
    assert float(row["lr"]) == 0 and int(row["tokens"]) > 0 and float(row["tokens_per_s"]) > 0
    later = read_table(out / "metrics.csv")[1:]
    assert float(row["compiling_seconds"]) > max(float(x["compiling_seconds"]) for x in later)
    assert max(float(x["saving_seconds"]) for x in later) > 0 < float(row["data_seconds"])
    assert re.search(
        r"^time: steps \d+\.\d%, data \d+\.\d%, compiling .* of \d+ s$", said, re.MULTILINE
    )
    assert json.loads((out / "checkpoints" / "20" / "meta" / "metadata").read_text())["data"]
