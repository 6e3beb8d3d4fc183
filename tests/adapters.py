"""Random adapters of tiny models, and what attaches them."""

import numpy as np

from qwen3vl_jax.checkpoint.adapter_map import Adapter, lora_targets
from qwen3vl_jax.training.lora_targets import targeted

RANK, ALPHA = 4, 6.0
EVERYTHING = {
    False: ("text", "vision", "mergers", "head"),
    True: ("text", "experts", "router", "vision", "mergers"),
}


def random(cfg, targets, rank=RANK, alpha=ALPHA, seed=0):
    """(weights, settings) of an adapter that changes logits by about as much as they are large."""
    adapter = Adapter.uniform(targeted(targets, cfg), rank, alpha)
    rng, weights = np.random.default_rng(seed), {}
    for name, ranks in adapter.ranks.items():
        place = lora_targets(cfg)[name]
        a, b = place.shapes(max(ranks))
        weights[f"{name}.a"] = (rng.standard_normal(a) / place.inner**0.5).astype(np.float32)
        weights[f"{name}.b"] = (rng.standard_normal(b) / 5).astype(np.float32)
    return weights, adapter
