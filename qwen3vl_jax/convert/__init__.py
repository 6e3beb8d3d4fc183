"""Conversion between Hugging Face and Orbax checkpoints: `python -m convert --help`."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # a callback: (bytes just written, bytes in all)
SHARD_SIZE = 5_000_000_000  # bytes of one safetensors file, as in Hugging Face's releases
