"""Tensors that threads read ahead: order, errors, and the two arrays of an int8 weight."""

import threading
import time

import numpy as np
import pytest
import tiny

from qwen3vl_jax import Config, InputError
from qwen3vl_jax.checkpoint import quantize
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, LazyTensor, read_ahead


def test_in_order_and_only_a_few_ahead():
    """The rest is read as the caller goes on."""
    begun = []

    def read(path):
        begun.append(path)
        return [np.zeros(1)]

    names = [(str(i),) for i in range(12)]
    ahead = read_ahead(read, names)
    assert next(ahead)[0] == ("0",)
    time.sleep(0.1)
    assert len(begun) <= 5
    assert [path for path, _ in ahead] == names[1:] and sorted(begun) == sorted(names)


def test_an_error_does_not_wait_for_reads_that_have_begun():
    """It comes in its turn; what has not begun is never read."""
    go_on, begun = threading.Event(), []

    def read(path):
        begun.append(path)
        if path == ("bad",):
            raise InputError("bad: cannot be read")
        go_on.wait(60)
        return [np.zeros(1)]

    start = time.perf_counter()
    with pytest.raises(InputError, match="bad: cannot be read"):
        list(read_ahead(read, [("bad",), ("slow",), ("slow",), ("slow",), ("late",)]))
    assert time.perf_counter() - start < 30 and ("late",) not in begun
    go_on.set()


def test_values_and_scale_of_an_int8_weight_are_made_once():
    """Also where two threads ask for them at the same moment."""
    loads = []
    cfg = Config.from_hf(tiny.config_dict("base"))
    param = next(iter(quantize.quantized_params(cfg).values()))

    def load():
        loads.append(1)
        time.sleep(0.05)
        return np.ones(param.shape, np.float32)

    leaves = {param.path: LazyTensor(param.shape, np.dtype(np.float32), load)}
    pair = quantize.quantize_leaves(cfg, leaves, "int8")
    found = dict(read_ahead(lambda path: [pair[path].load()], pair))
    assert len(loads) == 1
    assert found[*param.path, VALUES][0].max() == 127
    np.testing.assert_allclose(found[*param.path, SCALE][0], 1 / 127)
