"""FP8 checkpoints: e4m3 codes with one float32 scale a block, which become bf16 weights or are kept.

    W[..., a, b] = bf16(float32(code[..., a, b]) * scale[..., a // A, b // B])    for blocks [A, B]

Blocks lie along the last two axes as stored, whatever the layout. A tensor's scales have its name with
`_scale_inv` behind ("inv" is historical: they multiply).
What is quantised is decided by the stored dtypes; config.json says how large the blocks are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_jax.checkpoint.config_files import QUANTISATION
from qwen3vl_jax.checkpoint.name_map import Block
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.safetensors_files import (
    FP8,
    Stored,
)

SUFFIX = "_scale_inv"
_ADVICE = "take the bf16 release"
# float32 of each of the 256 codes.
_VALUES = np.arange(256, dtype=np.uint8).view(FP8["F8_E4M3"]).astype(np.float32)


def block_of(where: Path, raw: Mapping[str, Any]) -> Block | None:
    """The block [A, B] of a config.json's quantization_config, wherever it stands; None without one.

    Raises InputError for another method than fp8, another format than e4m3, and no block.
    """
    text = raw.get("text_config")
    nested = text.get(QUANTISATION) if isinstance(text, Mapping) else None
    quantised = raw.get(QUANTISATION) or nested
    if not quantised:
        return None
    if not isinstance(quantised, Mapping):
        raise InputError(f"{where}: {QUANTISATION} is {quantised!r}, expected an object; {_ADVICE}")
    method = quantised.get("quant_method")
    if method != "fp8":
        raise InputError(f"{where}: weights quantised by {method!r}, expected fp8; {_ADVICE}")
    form = quantised.get("fmt", "e4m3")  # transformers itself writes no fmt
    block = quantised.get("weight_block_size")
    if form != "e4m3":
        raise InputError(f"{where}: {QUANTISATION}.fmt is {form!r}, expected 'e4m3'; {_ADVICE}")
    sides = tuple(block) if isinstance(block, (list, tuple)) else ()
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise InputError(
            f"{where}: {QUANTISATION}.weight_block_size is {block!r}, expected two sizes "
            f"(one scale a block), as [128, 128]; {_ADVICE}"
        )
    return sides


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Scales of a tensor [..., a, b]: [..., ceil(a / A), ceil(b / B)]."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def misfit(tensor: Stored, scales: Stored | None, block: Block | None) -> str | None:
    """What is wrong with a tensor and the scales of its name (one line), or None."""
    if tensor.dtype in FP8:
        if block is None or len(tensor.shape) not in (2, 3):
            return (
                f"dtype of {tensor.where}: found {tensor.dtype}, expected BF16 (it has no blocks)"
            )
        return _misfit_scales(tensor, scales, block)
    if scales is None:
        return None
    return (
        f"scales {scales.where} of a tensor that is {tensor.dtype}, expected {', '.join(FP8)}; "
        f"take both from one release"
    )


def _misfit_scales(tensor: Stored, scales: Stored | None, block: Block) -> str | None:
    wanted = scale_shape(tensor.shape, block)
    if scales is None:
        name = tensor.name + SUFFIX
        return f"missing {name} F32 {list(wanted)}, the scales of {tensor.where}; fetch it again"
    if scales.dtype != "F32":
        return f"dtype of {scales.where}: found {scales.dtype}, expected F32; {_ADVICE}"
    if scales.shape != wanted:
        return (
            f"shape of {scales.where}: found {list(scales.shape)}, expected {list(wanted)} for "
            f"{list(tensor.shape)} in blocks of {list(block)}; {_ADVICE}"
        )
    return None


def dequantize_into(codes: np.ndarray, scales: np.ndarray, block: Block, out: np.ndarray) -> None:
    """Writes the weights of codes [..., a, b] (8-bit) into `out` (bf16, same shape, any strides).

    scales: float32, `scale_shape`. A strip of blocks at a time, so that float32 values stay in cache.
    """
    if codes.ndim > 2:
        for code, scale, part in zip(codes, scales, out):
            dequantize_into(code, scale, block, part)
        return
    rows, columns = codes.shape
    for scale, start in zip(scales, range(0, rows, block[0])):
        strip = slice(start, start + block[0])
        # "clip" only spares the check of indices, of which every one is below 256.
        values = np.take(_VALUES, codes[strip].view(np.uint8), mode="clip")
        values *= np.repeat(scale, min(block[1], columns))[:columns]
        out[strip] = values.astype(out.dtype)  # cast first: where `out` is turned, that is faster
