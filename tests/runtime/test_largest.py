"""Small numbers that processes agree on without their devices."""

import socket
import subprocess
import sys
from pathlib import Path

from qwen3vl_jax.runtime import distributed

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import jax
from qwen3vl_jax.runtime import distributed
me = int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, me)
found = [distributed.largest([n * (me + 1), 5 - me]) for n in range(3)]
assert found == [[0, 5], [2, 5], [4, 5]], found
print("agreed", flush=True)
"""


def test_one_process_has_its_own():
    assert distributed.largest([3, 1]) == [3, 1]


def test_two_processes_have_the_largest_of_each():
    """Several times: each round has keys of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, port, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["agreed"] * 2
