"""The merge of adapters into the weights they lie beside."""

from qwen3vl_jax.checkpoint.adapters import merge

__all__ = ["merge"]
