"""How much arithmetic a run's steps are, for MFU: of real tokens and patches, and with padding."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax

from qwen3vl_jax.config import Config
from qwen3vl_jax.training.flops import padded_work, peak_flops, real_work, step_flops
from qwen3vl_jax.training.groups import Flat, group_of
from qwen3vl_jax.training.packing import PackedBatch
from qwen3vl_jax.training.recipe import Recipe


class Speed:
    """FLOPs of a run's steps by what its recipe trains, and what its device could do at best."""

    def __init__(self, recipe: Recipe, cfg: Config, weights: Flat):
        sparse = bool(cfg.text.num_experts)
        self._cfg, self._how = cfg, {}
        if recipe.lora.rank:
            self._how = {"trained": (), "adapters": adapter_sizes(cfg, weights)}
        else:
            self._how = {"trained": {group_of(name, sparse) for name in weights}}
        peak = recipe.report.peak_tflops * 1e12
        self._peak = peak or peak_flops(jax.local_devices()[0].device_kind)

    def of(self, micro: Iterable[PackedBatch]) -> dict[str, Any]:
        """{"flops", "padded_flops", "peak_flops"} of a step, given its micro batches on the host."""
        micro = list(micro)
        real, padded = (
            functools.reduce(operator.add, map(work, micro)) for work in (real_work, padded_work)
        )
        count = functools.partial(step_flops, self._cfg, **self._how)
        return {"flops": count(real), "padded_flops": count(padded), "peak_flops": self._peak}


def adapter_sizes(cfg: Config, weights: Flat) -> dict[str, int]:
    """{group: parameters of low-rank pairs}, of experts those that a token meets."""
    sparse, found = bool(cfg.text.num_experts), Counter()
    for name, x in weights.items():
        group = group_of(name, sparse)
        found[group] += math.prod(x.shape)
    if sparse and "experts" in found:
        share = cfg.text.num_experts_per_tok / cfg.text.num_experts
        found["experts"] = round(found["experts"] * share)
    return dict(found)
