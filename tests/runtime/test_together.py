"""How processes that run as one begin and end, without starting any."""

import os
import subprocess
import sys
import time
from argparse import Namespace

import jax
import pytest

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import distributed


def test_none_ends_before_the_slowest(monkeypatch):
    """JAX aborts a process that has ended more than the heartbeat before another."""
    done = []
    monkeypatch.setattr(distributed, "wait_for_all", done.append)
    assert distributed.end_together(lambda: done.append("run") or 3) == 3
    assert done == ["run", "end"]
    with pytest.raises(ZeroDivisionError):
        distributed.end_together(lambda: 1 // 0)
    assert done == ["run", "end"]


def asked(coordinator="", **environ):
    many = Namespace(coordinator=coordinator, processes=2, process=0, distributed=False)
    none = Namespace(coordinator="", processes=0, process=-1, distributed=False)
    return distributed.asked_of(many if coordinator else none, environ)


@pytest.mark.parametrize("place", ["foo", "foo:", ":80", "foo:99999", "foo:0", "foo:http"])
def test_what_is_no_address_is_refused(place):
    """JAX has an IndexError for the one, and is silent for minutes at the other."""
    with pytest.raises(
        InputError, match=f"coordinator '{place}'.*expected --coordinator HOST:PORT"
    ):
        asked(place)


def test_addresses():
    for address in ("foo:80", "[::1]:65535"):
        assert asked(address) == (address, 2, 0)


def test_a_shell_of_slurm_is_one_process():
    """Only srun starts several; salloc and sbatch have the count too."""
    assert asked(SLURM_NTASKS="8") is None
    assert asked(SLURM_NTASKS="8", SLURM_STEP_NODELIST="n[1-8]") == distributed.Asked()
    assert asked(SLURM_NTASKS="1", SLURM_STEP_NODELIST="n1") is None


def test_a_process_that_waits_says_so(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "PATIENCE", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.3))
    distributed.start(distributed.Asked("foo:80", 2, 1))
    said = capsys.readouterr().err
    assert said == "process 1 of 2: waiting for the other processes at foo:80\n"


def test_no_cluster_is_told_what_to_give(monkeypatch):
    """--distributed where jax finds none."""

    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    told = (
        "should be defined.; jax finds no cluster by itself here: expected --coordinator HOST:PORT"
    )
    with pytest.raises(InputError, match=told):
        distributed.start(distributed.Asked())


GONE = "error: process 0: another process of this run is gone"
ENDS = [
    (
        jax.errors.JaxRuntimeError("INTERNAL: Gloo: [..] Connection closed by peer [127.0.0.1]:7"),
        4,
        GONE,
    ),
    (jax.errors.JaxRuntimeError("INTERNAL: Barrier failed: Task 1 heartbeat timeout."), 4, GONE),
    (
        jax.errors.JaxRuntimeError("UNAVAILABLE: " + "word " * 99),
        4,
        "word word ..); start all of them",
    ),
    (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Gloo context initialization"), 4, GONE),
    (
        jax.errors.JaxRuntimeError("INTERNAL: NCCL: remote process exited or there was a .."),
        4,
        GONE,
    ),
    (
        jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile"),
        1,
        "Mosaic failed to compile",
    ),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "RESOURCE_EXHAUSTED"),
    (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), 4, GONE),
    (ValueError("cannot connect these dots"), 1, "ValueError: cannot connect"),
    (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
    (InputError("pack.rows is 3"), 2, "error: pack.rows is 3"),
    (FileNotFoundError(2, "No such file", "a.jsonl"), 2, "error: a.jsonl: No such file"),
    (KeyboardInterrupt(), 130, "interrupted: the same command goes on from the last checkpoint"),
    (SystemExit(130), 130, ""),
]


@pytest.mark.parametrize(("error", "code", "told"), ENDS, ids=lambda x: str(x)[:40])
def test_why_a_process_ends(monkeypatch, capsys, error, code, told):
    """Only what speaks of another process is told as a lost one; it ends at once."""

    def run():
        raise error

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(distributed, "_barrier", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        distributed.end_together(run)
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert told in said and (GONE in said) == (code == distributed.LOST)


SEEN = """
import socket, jax
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from qwen3vl_jax.runtime import distributed as processes

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
processes.start(processes.Asked(address, 1, 0))
print(CUDA_VISIBLE_DEVICES.value)
"""
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "4"}
SRUN |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(("tasks", "cards"), [("1(x4)", "all"), ("2,1(x2)", "0")])
def test_one_process_of_a_node_has_all_its_cards(tasks, cards):
    """JAX takes one card for each task of SLURM, which is right where there are as many tasks."""
    env = {**os.environ, **SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks}
    said = subprocess.run([sys.executable, "-c", SEEN], env=env, capture_output=True, text=True)
    assert said.stdout.split() == [cards], said.stderr
