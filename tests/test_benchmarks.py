"""Benchmarks end with 1 when a bound is missed; those of speed run with a small shape."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    batch,
    cases,
    convert,
    inference,
    kills,
    tpu_bundles,
    training,
    training_ours,
)

ROOT = Path(__file__).resolve().parent.parent


def test_the_bounds_of_batch():
    good = {"alone": 10, "ours": 31, "theirs": 15, "busy": 0.86, "differ": 0}
    assert batch.faults(**good) == []
    for name, value in {"alone": 11, "theirs": 16, "busy": 0.84, "differ": 1}.items():
        (fault,) = batch.faults(**{**good, name: value})
        assert "expected" in fault or "1 answers differ" in fault


@pytest.mark.parametrize(
    ("peak", "equal", "code"), [(2**29, True, 0), (2**40, True, 1), (2**29, False, 1)]
)
def test_the_bounds_of_convert(monkeypatch, tmp_path, capsys, peak, equal, code):
    """Memory and bytes, with the conversions themselves left out."""
    monkeypatch.setattr(convert, "write_random", lambda directory, case: (10**9, 10**6))
    monkeypatch.setattr(convert, "watched", lambda *command: (1.0, peak))
    monkeypatch.setattr(convert, "tensors_equal", lambda left, right: np.bool_(equal))
    monkeypatch.setattr(sys, "argv", ["convert", "small", "--scratch", str(tmp_path)])
    assert convert.main() == code
    assert ("TOO MUCH" in capsys.readouterr().out) == (peak == 2**40)


def test_kills_that_come_too_late_do_not_count():
    """The work is over sooner than was measured: the moments move, and all kills are real."""
    moments = []

    def kill(after):
        moments.append(after)
        return after < 4

    assert kills.spread(10.0, 20, kill) == 20
    real = sorted(after for after in moments if after < 4)
    assert len(real) == 20 and real[0] == 0 and real[-1] > 3
    assert max(np.diff(real)) < 0.6
    assert kills.spread(10.0, 20, lambda after: False) == 0


def test_a_torn_answer_is_not_counted_as_kept(tmp_path):
    """What a full disk took of a line is taken back by the journal."""
    (tmp_path / "out.jsonl.partial").write_bytes(b'{"settings": 1}\n{"line": 1}\n{"line": 2')
    assert cases.BATCH.kept(tmp_path) == 1
    (tmp_path / "out.jsonl").write_bytes(b"1\n2\n3\n")
    assert cases.BATCH.kept(tmp_path) == 3


@pytest.mark.parametrize(("module", "only"), [(inference, "vision"), (training, "LoRA")])
def test_speed_beside_transformers_with_a_small_shape(module, only, tmp_path, capsys, monkeypatch):
    """Both sides run, on the same numbers of tokens, and are told in a table and in JSON."""
    monkeypatch.chdir(ROOT)
    json_file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["x", "--tiny", "--only", only, "--json", str(json_file)])
    assert module.main() == 0
    (found,) = json.loads(json_file.read_text())
    ours, peer = found["ours"][1:], found["peer"][1:]
    assert len(ours) == len(peer) == 1
    for line in (*ours, *peer):
        assert not line.get("error") and np.all(np.array(line["seconds"]) > 0)
    told = capsys.readouterr().out
    assert "times" in told and "of the" in told


def test_random_weights_of_few_bits():
    """The arrays of a QLoRA step by their shapes: codes, scales that are no zeros, and 16 bits beside."""
    shape = jax.ShapeDtypeStruct
    like = {
        "layers.o.values": shape((2, 8, 64), jnp.int4),
        "layers.o.scale": shape((2, 8, 1), jnp.float32),
        "norm": shape((8,), jnp.bfloat16),
        "embed": shape((16, 8), jnp.bfloat16),
    }
    found = training_ours.random_arrays(like)
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (x.shape, x.dtype) for n, x in like.items()
    }
    assert (found["layers.o.scale"] > 0).all() and (found["norm"] == 1).all()
    assert len(np.unique(np.asarray(found["layers.o.values"], np.int8))) > 10


def test_the_bundles_of_a_product(tmp_path):
    """Of the loop's body, by the files of a fusion with an int8 weight; a size without files ends it."""
    text = """
%called.1 (param_0: s8[2,1024,1024], param_1: bf16[8,1024]) -> bf16[8,2048] {
  %fusion.3 = bf16[8,2048]{1,0} fusion(%a, %b), kind=kOutput, calls=%called.1, metadata={}
  %fusion.4 = bf16[8,2048]{1,0} fusion(%c, %d), kind=kOutput, calls=%called.1, metadata={}
"""
    told = "total scheduled bundles: 9\n\tnon empty scheduled bundles: 1500\n"
    (tmp_path / "7-fusion.3-70-schedule-analysis_final_bundles.txt").write_text(told)
    code = "{ %p1 = scmp.ge.s32.totalorder %s1, 18 /* loop exit test */ }"
    (tmp_path / "7-fusion.3-71-final_bundles.txt").write_text(code)
    (one,) = tpu_bundles.products(text, tmp_path)
    assert one == ("fusion.3", 2 << 20, 1500, 18)
    assert one.share("v5e", 2e9) == pytest.approx(1500 * 18 / 1.5e9 / ((2 << 20) / 2e9))
    with pytest.raises(SystemExit, match="no bundles of the products"):
        tpu_bundles.products(text, tmp_path / "none")
