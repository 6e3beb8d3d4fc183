"""int8 and int4 weights: codes and float32 scales, from bf16 or float32 weights.

    code = round(W / scale), scale = max |W| / 127 over the input channels (int8)
    code = round(W / scale), scale = max |W| / 7 over groups of 64 input channels (int4, of the layers)

Experts have scales of their own. The decoder's matrices are quantized: embedding, head, attention, MLP
and experts; int4 leaves embedding and head in int8. Norms, biases, the router and the vision tower are
not: the tower runs once per image, where few bits save no time.
"""

import math
import threading

import ml_dtypes
import numpy as np

from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, LazyTensor, Leaves
from qwen3vl_jax.checkpoint.name_map import ParamSpec, param_specs
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError

GROUP = 64  # input channels that share a scale in int4
# Weights of which there is a float32 copy at a time.
_STRIP = 1 << 22
# The dtype of codes, and the largest.
CODES = {"int8": (np.dtype(np.int8), 127), "int4": (np.dtype(ml_dtypes.int4), 7)}


def quantized_params(cfg: Config) -> dict[TreePath, ParamSpec]:
    """The parameters that int8 and int4 quantize, by path."""
    return {
        param.path: param
        for param in param_specs(cfg)
        if len(param.parts[0].axes) > 1 and param.path[0] != "vision" and param.path[-1] != "router"
    }


def kind_of(param: ParamSpec, kind: str) -> str:
    """The kind, int8 or int4, of a parameter of a model that is quantized to `kind`."""
    return kind if param.path[0] == "layers" else "int8"


def scale_shape(param: ParamSpec, kind: str) -> tuple[int, ...]:
    """The shape of the scales: one per output channel, or one per group of input channels."""
    if kind_of(param, kind) == "int8":
        return param.channels
    shape, axis = param.shape, param.summed[-1]
    return *shape[:axis], shape[axis] // math.gcd(shape[axis], GROUP), *shape[axis + 1 :]


def quantize_leaves(cfg: Config, leaves: Leaves, kind: str) -> dict[TreePath, LazyTensor]:
    """The leaves with values and scale in place of each quantized array; nothing is read yet."""
    wanted = quantized_params(cfg)
    out: dict[TreePath, LazyTensor] = {}
    for path, leaf in leaves.items():
        out |= _pair(wanted[path], leaf, kind) if path in wanted else {path: leaf}
    return out


def _pair(param: ParamSpec, leaf: LazyTensor, kind: str) -> dict[TreePath, LazyTensor]:
    """Values and scale of a parameter; the scale is kept from when the values are made."""
    made: dict[str, np.ndarray] = {}
    # Threads that read ahead ask for both at a time.
    lock = threading.Lock()

    def take(key: str) -> np.ndarray:
        with lock:
            if key not in made:
                made.update(quantize(param, leaf.load(), kind))
            return made.pop(key)

    codes = LazyTensor(param.shape, CODES[kind_of(param, kind)][0], lambda: take(VALUES))
    shape, dtype = scale_shape(param, kind), np.dtype(np.float32)
    scale = LazyTensor(shape, dtype, lambda: take(SCALE))
    return {(*param.path, VALUES): codes, (*param.path, SCALE): scale}


def quantize(param: ParamSpec, array: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """{values, scale} of a parameter's array. Raises InputError for a weight that is not finite."""
    dtype, largest = CODES[kind_of(param, kind)]
    codes, scale = np.empty(array.shape, dtype), np.empty(scale_shape(param, kind), np.float32)
    # [boxes before, box, boxes behind]: a box shares a scale.
    last = param.summed[-1]
    behind = math.prod(array.shape[last + 1 :])
    flat_scale = scale.reshape(-1, 1, behind)
    flat, flat_codes = (x.reshape(len(flat_scale), -1, behind) for x in (array, codes))
    step = max(1, _STRIP // math.prod(flat.shape[1:]))
    for start in range(0, len(flat), step):
        strip = slice(start, start + step)
        values = flat[strip].astype(np.float32)
        top = np.max(np.abs(values), axis=1, keepdims=True) / largest
        if not np.isfinite(top).all():
            what = f"holds NaN or infinite weights, which {kind} cannot hold"
            advice = f"fetch the checkpoint again or load it without {kind}"
            raise InputError(f"{path_str(param.path)}: {what}; {advice}")
        # A box of zeros has scale 1.
        flat_scale[strip] = np.where(top == 0, 1, top)
        flat_codes[strip] = np.rint(values / flat_scale[strip]).astype(dtype)
    return {VALUES: codes, SCALE: scale}
