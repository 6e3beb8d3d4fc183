"""transformers' fast image processor, for benchmarks.images."""

import io
from typing import Any

import numpy as np
import torch
import torchvision_shim  # noqa: F401
from PIL import Image
from transformers import Qwen2VLImageProcessor


class FastProcessor:
    """From a file's bytes to patches as the released models have them, on one thread."""

    def __init__(self, min_pixels: int, max_pixels: int):
        self._processor = Qwen2VLImageProcessor(
            patch_size=16,
            merge_size=2,
            size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )

    def __call__(self, data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            made: Any = self._processor(images=[image], return_tensors="pt")
        finally:
            torch.set_num_threads(before)
        return made["pixel_values"].numpy()
