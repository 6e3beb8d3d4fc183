"""Conversion between Hugging Face and Orbax checkpoints: `python -m convert --help`."""

from collections.abc import Callable

# A callback while tensors are written: (bytes just written, bytes in all).
Progress = Callable[[int, int], None]
SHARD_SIZE = 5_000_000_000  # bytes of one safetensors file, as in Hugging Face's releases
