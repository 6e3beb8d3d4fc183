"""Checkpoints between Hugging Face's files and Orbax: `python -m convert --help`."""

from collections.abc import Callable

# Told while a tensor after another is written: (bytes just done, bytes in all).
Progress = Callable[[int, int], None]
# Bytes of a safetensors file, as Hugging Face splits them.
SHARD_SIZE = 5_000_000_000
