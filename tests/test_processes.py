"""Several processes train as one: the losses of one, a lost process ends the others, any number resumes."""

import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import train_files

from qwen3vl_jax import processes
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, enough conversations for eight groups of rows, and a recipe."""
    folder = tmp_path_factory.mktemp("processes")
    ckpt = train_files.checkpoint(folder / "ckpt")
    data = train_files.conversations(folder / "chats.jsonl", 96)
    pack = {"rows": 8, "vision_rows": 8, "groups": 8}
    train_files.write_recipe(
        folder / "recipe.toml", ckpt, data, pack=pack, optimizer={"ema": 0.0}, steps=STEPS
    )
    return folder


def start(files: Path, out: str, count: int, devices: int, *changes: str) -> list[subprocess.Popen]:
    """train.py as `count` processes with some devices each; children share compiled programs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(files / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "train.py", "--config", str(files / "recipe.toml"), *changes]
    command += ["--out", str(files / out)]
    many = [] if count == 1 else ["--coordinator", address, "--processes", str(count)]
    return [
        subprocess.Popen(
            [*command, *many, *(["--process", str(i)] if many else [])], cwd=ROOT,
            env={**os.environ, **cache, "XLA_FLAGS": flags}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen]) -> list[str]:
    """The outputs of processes that end well."""
    said = [process.communicate(timeout=300)[0] for process in started]
    for process, out in zip(started, said):
        assert process.returncode == 0, out[-3000:]
    return said


def losses(files: Path, out: str) -> dict[int, float]:
    rows = read_table(files / out / "metrics.csv")
    found = {int(row["step"]): float(row["loss"]) for row in rows}
    assert len(found) == len(rows)  # each step once
    return found


def test_two_processes_lose_one_and_two_others_resume(files):
    """2 x 4 devices have the losses of one; without one process the other ends; 2 x 2 go on from there."""
    finish(start(files, "one", 1, 1))
    want = losses(files, "one")
    assert list(want) == list(range(1, STEPS + 1))

    both = start(files, "two", 2, 4, "mesh.data=2", "mesh.fsdp=4")
    while both[0].poll() is None:
        rows = read_table(files / "two" / "metrics.csv")
        if rows and int(rows[-1]["step"]) >= 8:
            break
        time.sleep(0.02)
    both[1].send_signal(signal.SIGKILL)
    since = time.perf_counter()
    said = both[0].communicate(timeout=300)[0]
    both[1].communicate()
    # A collective that fails ends it with a line; where it waits for something else, JAX aborts it.
    ends = {processes.LOST: "go on from the last checkpoint", -signal.SIGABRT: "another task died"}
    assert ends[both[0].returncode] in said, said[-3000:]
    assert time.perf_counter() - since < 120
    before = losses(files, "two")
    assert 8 <= len(before) < STEPS

    first, second = finish(start(files, "two", 2, 2, "mesh.fsdp=4"))
    assert "mesh.data was 2, is now 1" in first
    assert "step" not in second  # the first process speaks for all
    for found in (before, losses(files, "two")):
        for step, loss in found.items():
            assert abs(loss - want[step]) < 1e-5 * want[step], step
    assert list(losses(files, "two")) == list(want)


def test_who_the_processes_are():
    """Options before variables before what the cluster says; half an answer is refused."""

    def asked(coordinator="", count=0, index=-1, distributed=False, **environ):
        args = Namespace(
            coordinator=coordinator, processes=count, process=index, distributed=distributed
        )
        return processes.asked_of(args, environ)

    assert asked() is None and asked(SLURM_NTASKS="1") is None
    assert asked("a:1", 2, 0) == ("a:1", 2, 0)
    told = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert asked(**told) == ("b:2", 4, 3) and asked(index=1, **told) == ("b:2", 4, 1)
    assert asked(SLURM_NTASKS="8") == asked(TPU_WORKER_HOSTNAMES="a,b") == ("", 0, -1)
    assert asked(distributed=True) == asked(SLURM_NTASKS="2")
    for half in ({"coordinator": "a:1"}, {"count": 2, "index": 2, "coordinator": "a:1"}):
        with pytest.raises(InputError, match="expected --coordinator HOST:PORT"):
            asked(**half)
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'x', expected a number from 0"):
        asked("a:1", 2, JAX_PROCESS_ID="x")
