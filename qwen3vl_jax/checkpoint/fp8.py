"""FP8 checkpoints: e4m3 codes with one float32 scale per block, kept or dequantized to bf16.

    W[..., a, b] = bf16(float32(code[..., a, b]) * scale[..., a // A, b // B])    for blocks [A, B]

Blocks cover the last two axes as stored, in any layout. The scales of tensor NAME are NAME_scale_inv
("inv" is historical: they multiply). The stored dtypes decide which tensors are FP8; config.json gives
the size of a block.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_jax.checkpoint.config_files import QUANTIZATION
from qwen3vl_jax.checkpoint.name_map import Block
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.safetensors_files import FP8, Stored

SUFFIX = "_scale_inv"
_ADVICE = "take the bf16 release"
# float32 of each of the 256 codes.
_VALUES = np.arange(256, dtype=np.uint8).view(FP8["F8_E4M3"]).astype(np.float32)


def block_of(where: Path, raw: Mapping[str, Any]) -> Block | None:
    """The block [A, B] of quantization_config in a config.json; None without one. Raises InputError."""
    text = raw.get("text_config")
    nested = text.get(QUANTIZATION) if isinstance(text, Mapping) else None
    if not (found := raw.get(QUANTIZATION) or nested):
        return None
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: {QUANTIZATION}: got {found!r}, expected an object; {_ADVICE}")
    # Transformers writes no fmt.
    for key, expected in (("quant_method", "fp8"), ("fmt", "e4m3")):
        if (value := found.get(key, "e4m3" if key == "fmt" else None)) != expected:
            wrong = f"{QUANTIZATION}.{key}: got {value!r}"
            raise InputError(f"{where}: {wrong}, expected {expected!r}; {_ADVICE}")
    block = found.get("weight_block_size")
    sides = tuple(block) if isinstance(block, (list, tuple)) else ()
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        wrong = f"{QUANTIZATION}.weight_block_size: got {block!r}"
        raise InputError(f"{where}: {wrong}, expected two sizes, as [128, 128]; {_ADVICE}")
    return sides


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Scales of a tensor [..., a, b]: [..., ceil(a / A), ceil(b / B)]."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def misfit(tensor: Stored, scales: Stored | None, block: Block | None) -> str | None:
    """The problem of a tensor and the scales of its name in one line, or None."""
    if tensor.dtype not in FP8:
        expected = f"expected {', '.join(FP8)}; take both from one release"
        return scales and f"scales {scales.where} of a tensor that is {tensor.dtype}, {expected}"
    if block is None or len(tensor.shape) not in (2, 3):
        return f"dtype of {tensor.where}: found {tensor.dtype}, expected BF16 (it has no blocks)"
    wanted = scale_shape(tensor.shape, block)
    if scales is None:
        name = tensor.name + SUFFIX
        return f"missing {name} F32 {list(wanted)}, the scales of {tensor.where}; fetch it again"
    if scales.dtype != "F32":
        return f"dtype of {scales.where}: found {scales.dtype}, expected F32; {_ADVICE}"
    if scales.shape != wanted:
        expected = f"{list(wanted)} for {list(tensor.shape)} in blocks of {list(block)}"
        found = f"found {list(scales.shape)}, expected {expected}"
        return f"shape of {scales.where}: {found}; {_ADVICE}"
    return None


def dequantize_into(codes: np.ndarray, scales: np.ndarray, block: Block, out: np.ndarray) -> None:
    """Writes the weights of codes [..., a, b] and their scales into `out`, bf16 of any strides."""
    if codes.ndim > 2:
        for code, scale, part in zip(codes, scales, out):
            dequantize_into(code, scale, block, part)
        return
    rows, columns = codes.shape
    for scale, start in zip(scales, range(0, rows, block[0])):
        strip = slice(start, start + block[0])
        # "clip" skips the bounds check: every index is below 256.
        values = np.take(_VALUES, codes[strip].view(np.uint8), mode="clip")
        values *= np.repeat(scale, min(block[1], columns))[:columns]
        # Casting first is faster where `out` is transposed.
        out[strip] = values.astype(out.dtype)
