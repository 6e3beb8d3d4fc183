"""A tensor that is not read yet. No jax in here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from qwen3vl_jax.checkpoint.param_paths import TreePath

# A part of an array: one slice without a step for each axis.
Index = tuple[slice, ...]
# The keys at the path of a weight held in 8 bits.
VALUES, SCALE = "values", "scale"


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """Shape and dtype of a tensor; `load()` gives its values, and memory is used only then."""

    shape: tuple[int, ...]
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
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_memory(array: np.ndarray) -> LazyTensor:
    """Wraps an in-memory array as a LazyTensor."""
    return LazyTensor(array.shape, array.dtype, lambda: array)


def eight_bit(paths: Iterable[TreePath]) -> set[TreePath]:
    """The paths that are the values or the scale of a weight held in 8 bits."""
    weights = {path[:-1] for path in paths if path[-1] == VALUES}
    return {(*weight, key) for weight in weights for key in (VALUES, SCALE)}
