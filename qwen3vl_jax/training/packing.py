from __future__ import annotations

import flax.struct
import jax

from qwen3vl_jax.structs import Batch


class PackedBatch(flax.struct.PyTreeNode):
    batch: Batch
    weights: jax.Array
    vision_labels: jax.Array | None = None
