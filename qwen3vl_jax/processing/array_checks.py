"""The arrays that a user gives, checked: token ids, masks, labels, grids."""

from typing import Any

import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX
from qwen3vl_jax.errors import InputError, unexpected


def host_array(x: Any) -> np.ndarray:
    """Any library's array as numpy; torch's bfloat16, which numpy has not, as float32."""
    try:
        return np.asarray(x)
    except TypeError:
        return np.asarray(x.float())


def integers(name: str, given: Any, as_floats: bool = False) -> np.ndarray:
    """An argument as int64 with rows of one length; as_floats: whole floats will do. Raises InputError."""
    try:
        found = host_array(given)
    except ValueError as e:
        raise InputError(f"{name}: expected rows of one length, found: {e}") from e
    is_float = as_floats and found.dtype.kind == "f"
    wrong = found[found != np.rint(found)] if is_float else []
    if found.dtype.kind in "iu" or not found.size or (is_float and not len(wrong)):
        return found.astype(np.int64)
    first = wrong[0] if len(wrong) else f"an array of {found.dtype}"
    raise InputError(f"{name}: expected integers, found {first}")


def check_shape(name: str, found: np.ndarray, wanted: tuple[int, ...], text: str = "") -> None:
    """Raises InputError for an array of another shape; text describes the wanted one."""
    if found.shape != wanted:
        raise InputError(f"{name}: shape {found.shape}, expected {text or wanted}")


def ids_and_mask(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """input_ids as int32 [B T], attention_mask as bool [B T] (all True without one). Raises InputError."""
    ids = integers("input_ids", input_ids)
    if ids.ndim != 2:
        raise InputError(f"input_ids: shape {ids.shape}, expected [B T]")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    check_shape("attention_mask", mask, ids.shape, f"that of input_ids {ids.shape}")
    # A larger number would become another token.
    return np.clip(ids, -1, 2**31 - 1).astype(np.int32), mask


def check_ids(name: str, given: Any, size: int) -> np.ndarray:
    """Token ids as int32. Raises InputError for one outside an embedding of `size` rows."""
    ids = integers(name, given)
    if (wrong := ids[(ids < 0) | (ids >= size)]).size:
        raise InputError(f"{name}: token {wrong[0]} is outside the vocabulary of {size}")
    return ids.astype(np.int32)


def check_labels(name: str, given: Any, size: int) -> np.ndarray:
    """Labels as int32 of the same shape. Raises InputError for one that is neither a token nor -100."""
    labels = integers(name, given, as_floats=True)
    if (wrong := labels[(labels >= size) | ((labels < 0) & (labels != IGNORE_INDEX))]).size:
        raise InputError(f"{name}: {wrong[0]} is neither -100 nor a token of {size}")
    return labels.astype(np.int32)


def grid_array(name: str, grid: Any, merge: int) -> np.ndarray:
    """A grid argument as int64 [n 3], sides multiples of `merge`; None is no grid. Raises InputError."""
    grid = integers(name, [] if grid is None else grid)
    grid = grid if grid.size else np.zeros((0, 3), np.int64)
    if grid.ndim != 2 or grid.shape[1] != 3 or (grid < 1).any():
        raise unexpected(name, grid.tolist(), "rows (t, h, w) of positive numbers")
    if (grid[:, 1:] % merge).any():
        raise InputError(f"{name}: sides must be multiples of {merge}, found {grid.tolist()}")
    return grid
