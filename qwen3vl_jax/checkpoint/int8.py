"""int8 weights: codes with one float32 scale per output channel, from bf16 or float32 weights.

    code = round(W / scale), scale = max |W| / 127 over the input channels

Experts have a scale per expert and output channel. The decoder's matrices are quantized: embedding,
head, attention, MLP and experts. Norms, biases, the router and the vision tower are not: the tower runs
once per image, where 8 bits save no time.
"""

import math
import threading

import numpy as np

from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, LazyTensor, Leaves
from qwen3vl_jax.checkpoint.name_map import ParamSpec, param_specs
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError

# Weights per strip: only a strip has a float32 copy.
_STRIP = 1 << 22
_INT8, _SCALE = np.dtype(np.int8), np.dtype(np.float32)


def int8_params(cfg: Config) -> dict[TreePath, ParamSpec]:
    """The parameters that int8 quantizes, by path."""
    return {
        param.path: param
        for param in param_specs(cfg)
        if len(param.parts[0].axes) > 1 and param.path[0] != "vision" and param.path[-1] != "router"
    }


def quantize_leaves(cfg: Config, leaves: Leaves) -> dict[TreePath, LazyTensor]:
    """The leaves with values and scale in place of each quantized array; nothing is read yet."""
    wanted = int8_params(cfg)
    out: dict[TreePath, LazyTensor] = {}
    for path, leaf in leaves.items():
        out |= _pair(wanted[path], leaf) if path in wanted else {path: leaf}
    return out


def _pair(param: ParamSpec, leaf: LazyTensor) -> dict[TreePath, LazyTensor]:
    """Values and scale of a parameter; the scale is kept from when the values are made."""
    made: dict[str, np.ndarray] = {}
    # Threads that read ahead ask for both at a time.
    lock = threading.Lock()

    def take(key: str) -> np.ndarray:
        with lock:
            if key not in made:
                made.update(quantize(param, leaf.load()))
            return made.pop(key)

    return {
        (*param.path, VALUES): LazyTensor(param.shape, _INT8, lambda: take(VALUES)),
        (*param.path, SCALE): LazyTensor(param.channels, _SCALE, lambda: take(SCALE)),
    }


def quantize(param: ParamSpec, array: np.ndarray) -> dict[str, np.ndarray]:
    """{values, scale} of a parameter's array. Raises InputError for a weight that is not finite."""
    codes, scale = np.empty(array.shape, np.int8), np.empty(param.channels, np.float32)
    flat, flat_codes, flat_scale = (_flat(param, x) for x in (array, codes, scale))
    step = max(1, _STRIP // math.prod(flat.shape[1:]))
    for start in range(0, len(flat), step):
        strip = slice(start, start + step)
        values = flat[strip].astype(np.float32)
        top = np.max(np.abs(values), axis=1, keepdims=True) / 127
        if not np.isfinite(top).all():
            what = "holds NaN or infinite weights, which int8 cannot hold"
            advice = "fetch the checkpoint again or load it without int8"
            raise InputError(f"{path_str(param.path)}: {what}; {advice}")
        # A channel of zeros has scale 1.
        flat_scale[strip] = np.where(top == 0, 1, top)
        flat_codes[strip] = np.rint(values / flat_scale[strip])
    return {VALUES: codes, SCALE: scale}


def _flat(param: ParamSpec, array: np.ndarray) -> np.ndarray:
    """A view [outer, input channels, inner] of a parameter's array or scales."""
    first, last = param.summed[0], param.summed[-1] + 1
    cut = (array.shape[:first], array.shape[first:last], array.shape[last:])
    return array.reshape([math.prod(axes) for axes in cut])
