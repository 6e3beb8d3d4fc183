"""`python -m convert` and `from convert.to_orbax import to_orbax` in a clone: qwen3vl_jax/convert/."""

from qwen3vl_jax import convert
from qwen3vl_jax.convert import SHARD_SIZE, Progress

__all__ = ["SHARD_SIZE", "Progress"]
__path__ += convert.__path__
