"""Several processes train as one: the losses of one, a lost process ends the others, any number resumes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import toy_checkpoint
import train_files
from tokenizers import Tokenizer

import train
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import distributed as processes
from qwen3vl_jax.training.reporting.metrics_table import read_table

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
PACK = {"rows": 8, "vision_rows": 8, "groups": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sparse checkpoint, conversations for eight groups of rows, and a recipe.

    Groups 3 to 7 see no picture: the second of two processes. Nine samples are held out, each more
    than half a row: the last batch of an evaluation has one.
    """
    folder = tmp_path_factory.mktemp("processes")
    ckpt = train_files.checkpoint(folder / "ckpt", moe=True, layers=1)
    data = train_files.conversations(folder / "chats.jsonl", 96, pictured=(8, 3))
    answer = "one " * 20
    tokens = Tokenizer.from_str(toy_checkpoint.tokenizer_json()).encode(answer)
    assert train_files.RECIPE["pack"]["length"] / 2 < len(tokens) < 80
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]
    held_out = folder / "held_out.jsonl"
    held_out.write_text((json.dumps({"messages": turns}) + "\n") * 9)
    asked = {"sources": [{"path": str(held_out)}], "every": STEPS, "generate": 2}
    train_files.write_recipe(
        folder / "recipe.toml",
        ckpt,
        data,
        pack=PACK,
        optimizer={"ema": 0.0},
        steps=STEPS,
        save_every=4,
        evaluate={**asked, "max_new_tokens": 4},
        mesh={"fsdp": 2, "expert": 4},
        data={"sources": [{"path": str(data)}], "shuffle": False},
    )
    return folder


def start(files: Path, out: str, count: int, devices: int, *changes: str) -> list[subprocess.Popen]:
    """train.py as `count` processes with some devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    count_flag = "--xla_force_host_platform_device_count"
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count_flag)]
    env = {**os.environ, "XLA_FLAGS": " ".join([*flags, f"{count_flag}={devices}"])}
    command = [sys.executable, "train.py", "--config", str(files / "recipe.toml"), *changes]
    command += ["--out", str(files / out), "--coordinator", address, "--processes", str(count)]
    return [
        subprocess.Popen(
            [*command, "--process", str(i)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def alone(files: Path, out: str) -> dict[int, float]:
    """The losses of this one process on one device, whose programs compile fastest."""
    changes = ["mesh.fsdp=1", "mesh.expert=1", "--out", str(files / out)]
    assert train.main(["--config", str(files / "recipe.toml"), *changes]) == 0
    found = losses(files, out)
    assert list(found) == list(range(1, STEPS + 1))
    return found


def finish(started: list[subprocess.Popen]) -> list[str]:
    """The outputs of processes that end well."""
    try:
        said = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, out in zip(started, said):
        assert process.returncode == 0, out[-3000:]
    return said


def losses(files: Path, out: str) -> dict[int, float]:
    rows = read_table(files / out / "metrics.csv")
    found = {int(row["step"]): float(row["loss"]) for row in rows}
    assert len(found) == len(rows)  # each step once
    return found


def assert_close(got: dict[int, float], want: dict[int, float]) -> None:
    for step, loss in got.items():
        assert abs(loss - want[step]) < 1e-5 * want[step], step


class Killer(threading.Thread):
    """Kills the second of two processes after five steps; `seconds` later the first has ended."""

    def __init__(self, files: Path, out: str, both: list[subprocess.Popen]) -> None:
        super().__init__()
        self.table, self.both = files / out / "metrics.csv", both
        self.killed, self.seconds = threading.Event(), 0.0
        self.start()

    def run(self) -> None:
        first, second = self.both
        while first.poll() is None:
            rows = read_table(self.table)
            if rows and int(rows[-1]["step"]) >= 5:
                break
            time.sleep(0.02)
        second.send_signal(signal.SIGKILL)
        second.communicate()
        self.killed.set()
        since = time.perf_counter()
        first.wait(timeout=300)
        self.seconds = time.perf_counter() - since


def check_lost(first: subprocess.Popen) -> None:
    """The process that is left has ended by itself, with one line."""
    said = first.communicate()[0]
    # A collective that fails ends it, or JAX that aborts it: with one line either way.
    assert first.returncode == processes.LOST, said[-3000:]
    assert said.count("go on from the last checkpoint") == 1
    assert not re.search(r"Gloo. Rank|^[EWF]\d{4} |Traceback", said, re.M), said[-3000:]


def test_processes_lose_one_and_others_share_experts_and_evaluate(files):
    """The losses, the evaluation and the answers of one device, whoever computes and is lost.

    2 x 4 devices, with fsdp across the two; one is killed. 2 x 2 devices go on, with the experts
    across the two. The second sees text only, and no sample of the evaluation's last batch.
    """
    both = start(files, "lost", 2, 4)
    killer = Killer(files, "lost", both)
    want = alone(files, "one")
    killer.killed.wait()
    # The other process, which still waits for the lost one, has written all that it will.
    shutil.copytree(files / "lost", files / "many")
    others = start(files, "many", 2, 2, "mesh.fsdp=1")
    killer.join()
    assert 0 < killer.seconds < 95
    check_lost(both[0])
    before = losses(files, "lost")
    assert 5 <= len(before) < STEPS
    said = finish(others)
    assert "mesh.fsdp was 2, is now 1" in said[0]
    # The first process speaks for all.
    assert [("step" in out) for out in said] == [True, False]
    assert_close(before, want)
    assert_close(losses(files, "many"), want)
    assert list(losses(files, "many")) == list(want)
    one, many = (read_table(files / out / "evaluation.csv") for out in ("one", "many"))
    assert len(one) == len(many) == 1
    for name in ("loss", "accuracy", "exact"):
        assert abs(float(many[0][name]) - float(one[0][name])) <= 1e-5 * float(one[0][name])
    answers = [
        (files / out / "answers" / f"step_{STEPS}.jsonl").read_text() for out in ("one", "many")
    ]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 2


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
    srun = {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-8]"}
    assert asked(SLURM_NTASKS="8") is None  # a shell of salloc
    assert asked(**srun) == asked(TPU_WORKER_HOSTNAMES="a,b") == ("", 0, -1)
    assert asked(distributed=True) == asked(**srun)
    for half in ({"coordinator": "a:1"}, {"count": 2, "index": 2, "coordinator": "a:1"}):
        with pytest.raises(InputError, match="expected --coordinator HOST:PORT"):
            asked(**half)
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'x', expected a number from 0"):
        asked("a:1", 2, JAX_PROCESS_ID="x")
