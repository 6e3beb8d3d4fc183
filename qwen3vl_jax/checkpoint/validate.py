"""Checks of a checkpoint's arrays against its config.json and the weights that the caller wants."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_jax.checkpoint.config_files import QUANTIZATION
from qwen3vl_jax.checkpoint.fp8 import block_of
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, Leaves
from qwen3vl_jax.checkpoint.name_map import Block, param_specs
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str
from qwen3vl_jax.checkpoint.quantize import CODES, scale_shape
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError, ProblemsError
from qwen3vl_jax.storage.atomic_dir import CONFIG
from qwen3vl_jax.storage.safetensors_files import FP8

WEIGHTS = ("fp8", "int8", "int4")
_KINDS = {FP8["F8_E4M3"]: "fp8", **{dtype: kind for kind, (dtype, _) in CODES.items()}}


class MismatchError(ProblemsError):
    """Tensors that do not fit config.json."""

    def __init__(self, where: Path | str, problems: list[str]):
        super().__init__(f"{where}: tensors do not fit config.json", problems)


def check_weights(where: Path, held: str | None, weights: str | None) -> None:
    """Raises InputError if a checkpoint that holds one of WEIGHTS, or None, cannot give the wanted ones."""
    if weights not in (None, *WEIGHTS):
        expected = "expected None, fp8, int8 or int4; leave it out for 16 or 32 bits"
        raise InputError(f"weights: got {weights!r}, {expected}")
    if weights == "fp8" and held != "fp8":
        more = "" if held else ", or take weights int8"
        found = f"holds {held or 'no FP8'} weights, and weights fp8 needs an FP8 release"
        raise InputError(f"{where}: {found}; take one, or leave it out{more}")
    if weights in ("int8", "int4") and held not in (None, weights):
        found = f"holds {held} weights, which {weights} would round again"
        advice = f"take {held} (weights=, --weights or lora.base), or the 16-bit release"
        raise InputError(f"{where}: {found}; {advice}")


def stored_kind(stored: Leaves) -> str | None:
    """The kind of an Orbax checkpoint's weights: one of WEIGHTS, or None."""
    kinds = {_KINDS.get(leaf.dtype) for path, leaf in stored.items() if path[-1] == VALUES}
    return min((kind for kind in kinds if kind), default=None)


def check_stored(where: Path, cfg: Config, stored: Leaves, raw: Mapping[str, Any]) -> Block | None:
    """The block of an Orbax checkpoint's FP8 weights, or None; its arrays are those of the config.

    raw: the config.json's dict. An untied head may be absent (a base model). Raises MismatchError.
    """
    block = block_of(where, raw) if stored_kind(stored) == "fp8" else None
    wanted: dict[TreePath, tuple[int, ...]] = {}
    dtypes: dict[TreePath, str] = {}
    for param in param_specs(cfg):
        values, scale = (*param.path, VALUES), (*param.path, SCALE)
        if values not in stored or len(param.parts[0].axes) < 2:
            if param.path != ("head",) or param.path in stored:
                wanted[param.path] = param.shape
            continue
        kind, wanted[values] = _KINDS.get(stored[values].dtype), param.shape
        wanted[scale] = scale_shape(param, "int4" if kind == "int4" else "int8")
        if kind == "fp8" and block:
            wanted[scale] = param.scale_shape(block)
        elif kind in (None, "fp8"):
            dtypes[values] = f"int8, int4, or float8_e4m3fn with {QUANTIZATION} in {CONFIG}"
        if scale in stored and stored[scale].dtype != np.float32:
            dtypes[scale] = "float32"
    problems = [f"unknown {path_str(path)}" for path in stored.keys() - wanted.keys()]
    for path, expected in dtypes.items():
        found = f"found {stored[path].dtype}, expected {expected}"
        problems.append(f"dtype of {path_str(path)}: {found}")
    for path, shape in wanted.items():
        if path not in stored:
            problems.append(f"missing {path_str(path)} {list(shape)}")
        elif stored[path].shape != shape:
            found = f"found {list(stored[path].shape)}, expected {list(shape)}"
            problems.append(f"shape of {path_str(path)}: {found}")
    if problems:
        raise MismatchError(where, sorted(problems))
    return block
