"""Writes tiny FP8 checkpoints, and what their weights are by a formula of their own."""

import re
from typing import Any

import ml_dtypes
import numpy as np
from hf_files import Tensors

BLOCK = (27, 17)  # divides no side of the tiny models
# What the released FP8 files quantise: decoder layers without norms and router.
QUANTISED = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj\.weight|mlp\.(?!gate\.).*)$")


def config(raw: dict[str, Any], block: tuple[int, ...] = BLOCK) -> dict[str, Any]:
    """A config.json that says how its weights are quantised, as the released ones do."""
    quantised = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    return raw | {"quantization_config": {**quantised, "weight_block_size": list(block)}}


def quantised(tensors: Tensors, block: tuple[int, int] = BLOCK, seed: int = 0) -> Tensors:
    """The tensors with random finite codes and random scales in place of the decoder's matrices."""
    rng = np.random.default_rng(seed)
    finite = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    out = {}
    for name, tensor in tensors.items():
        if not QUANTISED.search(name):
            out[name] = tensor
            continue
        counts = [-(-side // width) for side, width in zip(tensor.shape[-2:], block)]
        codes = rng.choice(finite, tensor.shape).view(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(1e-5, 1e-4, (*tensor.shape[:-2], *counts)).astype(np.float32)
        out |= {name: codes, f"{name}_scale_inv": scales}
    return out


def spread(scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """Every weight's own scale: [..., a, b] from [..., a / A, b / B]."""
    rows, columns = (np.arange(side) // width for side, width in zip(shape[-2:], block))
    return scales[..., rows[:, None], columns]


def dequantised(tensors: Tensors, block: tuple[int, int] = BLOCK) -> Tensors:
    """The tensors with bf16 weights in place of codes and scales."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dtype == ml_dtypes.float8_e4m3fn:
            scales = spread(tensors[f"{name}_scale_inv"], tensor.shape, block)
            out[name] = (tensor.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
        elif not name.endswith("_scale_inv"):
            out[name] = tensor
    return out
