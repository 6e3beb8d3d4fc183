"""What the compiler makes of our TPU programs: the first test needs libtpu, and no TPU.

`pip install -e .[tpu,test] && pytest tests/planning` runs it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import tpu_programs
from qwen3vl_jax.planning import hlo

ROOT = Path(__file__).resolve().parents[2]

# libtpu is asked in a process of its own, once for all tests.
COMPILE = """
import json
from benchmarks import tpu_programs
for case in ("decode", "rows", "experts", "vision"):
    for row in tpu_programs.CASES[case](1):
        print(json.dumps(row), flush=True)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the header says so")
def test_no_decode_loop_copies_and_the_experts_gradient_is_grouped():
    """Of one layer each: every figure of benchmarks/tpu_programs.py that has a bound keeps it."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_DEFAULT_MATMUL_PRECISION": "default"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [tpu_programs.Row(*json.loads(line)) for line in done.stdout.splitlines()]
    assert sum("copies" in row.what for row in rows) == 3
    assert sum("stepped over" in row.what for row in rows) == 4
    assert not [row for row in rows if row.fault], rows


FUSED = """%fused_copy (p: s8[512,32,128]) -> s8[512,32,128] {
  %p = s8[512,32,128]{2,1,0} parameter(0)
  ROOT %turned = s8[512,32,128]{2,0,1} copy(%p)
}

ENTRY"""
TEXT = """HloModule loop

%fused_product (q: s8[512,32,128]) -> bf16[8,512] {
  %q = s8[512,32,128]{2,1,0} parameter(0)
  %inside = s8[512,32,128]{2,0,1} copy(%q)
  ROOT %y = bf16[8,512]{1,0} convolution(%inside, %inside)
}

ENTRY %main (w: s8[512,32,128]) -> bf16[8,512] {
  %w = s8[512,32,128]{2,1,0} parameter(0)
  %ahead = s8[512,32,128]{2,1,0:T(8,128)S(1)} copy(%w)
  %other = f32[8,151936]{1,0} copy(%w)
  ROOT %product = bf16[8,512]{1,0} fusion(%w), kind=kOutput, calls=%fused_product
}
"""


def test_a_copy_is_found_where_it_is_written_to_main_memory():
    """Not one inside of a product, one into the chip's own memory, or of another array."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    held = jax.ShapeDtypeStruct((512, 32, 128), "int8", sharding=one)
    assert tpu_programs.copies(hlo.parse(TEXT), held) == []
    line = "  %ahead = "
    alone = TEXT.replace(line, "  %moved = s8[32,512,128]{2,1,0} transpose(%w)\n" + line)
    assert tpu_programs.copies(hlo.parse(alone), held) == ["moved s8[32,512,128]{2,1,0}"]
    fused = "  %again = s8[512,32,128]{2,0,1} fusion(%w), kind=kLoop, calls=%fused_copy\n"
    text = TEXT.replace(line, fused + line).replace("ENTRY", FUSED)
    (found,) = tpu_programs.copies(hlo.parse(text), held)
    assert found.startswith("again")
