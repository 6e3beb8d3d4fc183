"""Weights in Hugging Face files, read in the released layout: dequantized FP8, experts transposed.

Each class here has dtype, keep, load, load_scales and sliceable. `keep` means that FP8 stays: load gives
codes and load_scales one scale per block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen3vl_jax.checkpoint.fp8 import dequantize_into
from qwen3vl_jax.checkpoint.name_map import Block
from qwen3vl_jax.storage.safetensors_files import DTYPES, FP8, Files, Stored


@dataclasses.dataclass(frozen=True)
class Weight:
    """A stored tensor, with its scales if it is FP8."""

    files: Files
    tensor: Stored
    scales: Stored | None
    block: Block | None
    keep: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `load`: as stored, or bf16 for dequantized FP8."""
        as_stored = self.scales is None or self.keep
        return (DTYPES | FP8)[self.tensor.dtype if as_stored else "BF16"]

    def load(self) -> np.ndarray:
        """The values: a read-only view of the file, or a dequantized copy."""
        if self.scales is None or self.keep:
            return self.files.view(self.tensor)
        out = np.empty(self.tensor.shape, self.dtype)
        self.read_into(out)
        return out

    def sliceable(self) -> np.ndarray:
        """The values for slicing: of a remote file only the slices are fetched."""
        return self.load() if self.scales and not self.keep else self.files.sliced(self.tensor)

    def load_scales(self) -> np.ndarray:
        """The scales of kept FP8: a read-only view of the file."""
        assert self.scales is not None
        return self.files.view(self.scales)

    def read_into(self, out: np.ndarray) -> None:
        """Writes the values into `out` (same shape and dtype, any strides) without another copy."""
        codes = self.files.view(self.tensor)
        if self.scales is None or self.block is None or self.keep:
            out[...] = codes
        else:
            dequantize_into(codes, self.files.view(self.scales), self.block, out)


@dataclasses.dataclass(frozen=True)
class Experts:
    """[E, in, out] from matrices [out, in] of single experts; gate and up lie side by side.

    weights: `parts` matrices for each of the E experts, or one stored tensor [E, out, in].
    """

    weights: Sequence[Weight]
    shape: tuple[int, int, int]
    parts: int = 1

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `load`, one for all experts."""
        return self.weights[0].dtype

    @property
    def keep(self) -> bool:
        """Whether FP8 stays."""
        return self.weights[0].keep

    @property
    def fused(self) -> bool:
        """Whether one stored tensor holds all experts."""
        return len(self.weights[0].tensor.shape) == 3

    def load(self) -> np.ndarray:
        """The values, transposed into a copy."""
        out = np.empty(self.shape, self.dtype)
        if self.fused:
            self.weights[0].read_into(out.transpose(0, 2, 1))
            return out
        width = self.shape[2] // self.parts
        for k, weight in enumerate(self.weights):
            expert, part = divmod(k, self.parts)
            weight.read_into(out[expert, :, part * width : (part + 1) * width].T)
        return out

    # Slices of a transposed tensor lie everywhere in its file.
    sliceable = load

    def load_scales(self) -> np.ndarray:
        """The scales of kept FP8, transposed as the values are."""
        if self.fused:
            return self.weights[0].load_scales().transpose(0, 2, 1)
        scales = [weight.load_scales().T for weight in self.weights]
        experts = (scales[i : i + self.parts] for i in range(0, len(scales), self.parts))
        return np.stack([np.concatenate(expert, axis=1) for expert in experts])
