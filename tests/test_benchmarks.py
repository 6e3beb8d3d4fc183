"""Benchmarks end with 1 when a bound is missed."""

import sys

import numpy as np
import pytest

from benchmarks import batch, convert


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
