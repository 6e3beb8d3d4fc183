"""Noise of libraries is dropped, an abort for a lost process is one line, and all else is shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, os, sys
from qwen3vl_jax.runtime.native_output import tidy_output
tidy_output(lambda words: "error: gone" if "unhealthy" in words else "", 4)
print("out")
print("err", file=sys.stderr)
logging.warning("note")
os.write(1, b"[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected\\nnative out\\n")
os.write(1, b"1[Gloo] Rank 2 is connected to 3 peer ranks\\n is connected to 3 peer ranks. Expected\\n")
stars = b"*" * 32
os.write(2, b"E1128 18:00:02.1 1 slow_operation_alarm.cc:73] \\n" + stars + b"\\n")
os.write(2, b"[Compiling module jit_f] Very slow compile? If you want to file a bug\\n" + stars + b"\\n")
os.write(2, b"W1128 18:00:03.1 1 gemm.cc:1] native\\n")
os.write(2, sys.argv[2].encode())
if sys.argv[1] == "abort":
    os.abort()
"""
LOST = "E1128 18:00:04.1 1 coordination_service.cc:1549] tasks are unhealthy\n1\nThe tasks have crashed\n"
LOST += (
    "F1128 18:00:05.1 1 client.h:80] Terminating process because the JAX distributed service detected "
    "fatal errors. absl::Status: UNAVAILABLE\n\nRPC: /x.CoordinationService\n    @  0x7fa64d440634  x\n"
)
WARNING = "W1128 18:00:03.1 1 gemm.cc:1] native\n"


@pytest.mark.parametrize(
    ("end", "words", "code", "err"),
    [
        ("well", "", 0, f"err\nnote\n{WARNING}"),
        ("well", "last words", 0, f"err\nnote\n{WARNING}last words"),
        ("abort", LOST, 4, "error: gone\n"),
        ("abort", "F1128 18:00:04.1 1 gemm.cc:7] Check failed\n", -6, "Check failed"),
    ],
)
def test_what_passes(end, words, code, err):
    command = [sys.executable, "-c", SCRIPT, end, words]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (code, "out\nnative out\n")
    if end == "well":
        assert found.stderr == err
    else:
        assert err in found.stderr and "oordination" not in found.stderr
