"""A tensor that is not read yet. No jax in here."""

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import ml_dtypes
import numpy as np

from qwen3vl_jax.checkpoint.param_paths import TreePath

_T = TypeVar("_T")
Shape = tuple[int, ...]
Index = tuple[slice, ...]  # a part of an array: one slice without a step for each axis
VALUES, SCALE = "values", "scale"  # the keys at the path of a weight held in 8 bits
# Threads that read tensors early: up to _AHEAD + 2 tensors are in host memory.
_AHEAD = 3


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """Shape and dtype of a tensor; `load()` gives its values, and memory is used only then."""

    shape: Shape
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    # Reads parts without the rest, where the file allows it; see `parts`.
    read: Callable[[Sequence[Index]], list[np.ndarray]] | None = None

    def parts(self, where: Sequence[Index]) -> list[np.ndarray]:
        """Copies of parts of the values; the rest is read only where the file has no parts."""
        if self.read is not None:
            return self.read(where)
        values = self.load()
        return [np.array(values[index]) for index in where]

    @property
    def nbytes(self) -> int:
        """Bytes of the values, on the host."""
        return math.prod(self.shape) * self.dtype.itemsize


def device_bytes(count: int, dtype: np.dtype) -> int:
    """Bytes of so many numbers on a GPU or TPU, where two of 4 bits share one. A CPU gives each a byte."""
    return count // 2 if dtype == ml_dtypes.int4 else count * dtype.itemsize


Leaves = dict[TreePath, LazyTensor]  # the arrays of a parameter tree by path


def eight_bit(paths: Iterable[TreePath]) -> set[TreePath]:
    """The paths that are the values or the scale of a weight held in 8 bits."""
    weights = {path[:-1] for path in paths if path[-1] == VALUES}
    return {(*weight, key) for weight in weights for key in (VALUES, SCALE)}


def read_ahead(
    read: Callable[[TreePath], _T], paths: Iterable[TreePath]
) -> Iterator[tuple[TreePath, _T]]:
    """(path, read(path)) in order; threads read the next few while the caller uses one."""
    pool = ThreadPoolExecutor(_AHEAD)
    futures = ((path, pool.submit(read, path)) for path in paths)
    pending = deque(itertools.islice(futures, _AHEAD))
    try:
        while pending:
            pending.extend(itertools.islice(futures, 1))
            path, future = pending.popleft()
            yield path, future.result()
    finally:
        # After an error or Ctrl-C the caller does not wait for reads that have begun.
        pending.clear()
        pool.shutdown(wait=False, cancel_futures=True)
