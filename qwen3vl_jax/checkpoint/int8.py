"""int8 weights: codes with one float32 scale an output channel, made from bf16 or float32 ones.

    code = round(W / scale), scale = max |W| / 127 over what a product sums (the input channels)

Experts have a scale for each expert and output channel, q, k and v for each head and row.
Quantised are the decoder's matrices: the embedding and the head, attention, MLP and experts. Norms,
biases, the router and the vision tower are not: the tower runs once a picture, where 8 bits save no
time, and tokens alone (`logit_error`) would not show what its rounding changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, LazyTensor
from qwen3vl_jax.checkpoint.name_map import ParamSpec, param_specs
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError

_STRIP = 1 << 22  # weights looked at together, so that their float32 copy is small
_INT8, _SCALE = np.dtype(np.int8), np.dtype(np.float32)


def int8_params(cfg: Config) -> dict[TreePath, ParamSpec]:
    """The arrays that int8 is for, by path."""
    return {
        param.path: param
        for param in param_specs(cfg)
        if len(param.parts[0].axes) > 1 and param.path[0] != "vision" and param.path[-1] != "router"
    }


def quantised(cfg: Config, leaves: Mapping[TreePath, LazyTensor]) -> dict[TreePath, LazyTensor]:
    """The leaves with codes and scales in place of each array that int8 is for; nothing is read yet."""
    wanted = int8_params(cfg)
    out: dict[TreePath, LazyTensor] = {}
    for path, leaf in leaves.items():
        if path in wanted:
            out |= _pair(wanted[path], leaf)
        else:
            out[path] = leaf
    return out


def _pair(param: ParamSpec, leaf: LazyTensor) -> dict[TreePath, LazyTensor]:
    def values() -> np.ndarray:
        return quantise(param, leaf.load())[VALUES]

    def scale() -> np.ndarray:
        return scales_of(param, leaf.load())

    return {
        (*param.path, VALUES): LazyTensor(param.shape, _INT8, values),
        (*param.path, SCALE): LazyTensor(param.channels, _SCALE, scale),
    }


def quantise(param: ParamSpec, array: np.ndarray) -> dict[str, np.ndarray]:
    """Codes and scales of a tree's array; raises InputError for a weight that is not finite."""
    scale = scales_of(param, array)
    codes = np.empty(array.shape, np.int8)
    flat, flat_scale = _flat(param, codes), _flat(param, scale)
    for strip, values in _strips(_flat(param, array)):
        flat[strip] = np.rint(values / flat_scale[strip])
    return {VALUES: codes, SCALE: scale}


def scales_of(param: ParamSpec, array: np.ndarray) -> np.ndarray:
    """The scales alone; a channel of zeros has 1."""
    scale = np.empty(param.channels, np.float32)
    flat = _flat(param, scale)
    for strip, values in _strips(_flat(param, array)):
        top = np.max(np.abs(values), axis=1, keepdims=True) / 127
        flat[strip] = np.where(top == 0, 1, top)
    if not np.isfinite(scale).all():
        raise InputError(
            f"{path_str(param.path)}: holds infinite weights or not-a-numbers, which int8 cannot hold; "
            f"fetch the checkpoint again or load it without int8"
        )
    return scale


def _flat(param: ParamSpec, array: np.ndarray) -> np.ndarray:
    """A view [before, summed, after] of a tree's array or of its scales."""
    first, last = param.summed[0], param.summed[-1] + 1
    cut = (array.shape[:first], array.shape[first:last], array.shape[last:])
    return array.reshape([math.prod(axes) for axes in cut])


def _strips(flat: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(where, float32 values) of strips along the first axis."""
    step = max(1, _STRIP // math.prod(flat.shape[1:]))
    for start in range(0, len(flat), step):
        strip = slice(start, start + step)
        yield strip, flat[strip].astype(np.float32)
