"""How much arithmetic a run's steps are, for MFU: of real tokens and patches, and with padding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qwen3vl_jax.config import Config
from qwen3vl_jax.storage.remote_files import Mirrored
from qwen3vl_jax.training.param_groups import Flat, group_of
from qwen3vl_jax.training.recipe import Recipe
from qwen3vl_jax.training.reporting.flops import Work, peak_flops, step_flops


class Speed:
    """FLOPs of a run's steps by what its recipe trains, and what its devices could do at best."""

    def __init__(self, recipe: Recipe, cfg: Config, weights: Flat, devices: int = 1):
        sparse = bool(cfg.text.num_experts)
        self._cfg = cfg
        self._how: dict[str, Any] = {}
        if recipe.lora.rank:
            self._how = {"trained": (), "adapters": adapter_sizes(cfg, weights)}
        else:
            self._how = {"trained": {group_of(name, sparse) for name in weights}}
        peak = recipe.report.peak_tflops * 1e12
        peak = peak or peak_flops(jax.local_devices()[0].device_kind)
        self._peak = peak and peak * devices

        self._padded = step_flops(cfg, full_work(recipe), **self._how)

    def of(self, micro: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """{"flops", "padded_flops", "peak_flops"} of a step, given packing.fill_of its micro batches."""
        names = ("tokens", "pairs", "patches", "patch_pairs")
        real = Work(*(int(sum(m[name] for m in micro)) for name in names))
        flops = step_flops(self._cfg, real, **self._how)
        return {"flops": flops, "padded_flops": self._padded, "peak_flops": self._peak}


def full_work(recipe: Recipe) -> Work:
    """What a step passes through the model with its padding: `flops.padded_work` of its batches."""
    pack, many = recipe.pack, recipe.step.accumulate
    tokens, patches = many * pack.rows * pack.length, many * pack.vision_rows * pack.vision_length
    pairs = tokens * (pack.length + 1) // 2
    return Work(tokens, pairs, patches, patches * pack.vision_length)


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


class Profiler:
    """A profiler trace of chosen steps in RUN_DIR/profile, which TensorBoard and XProf read."""

    def __init__(self, steps: tuple[int, ...], out: Path):
        self._steps, self._on = set(steps), False
        self._traces = Mirrored(out / "profile") if steps else None

    def before(self, number: int) -> None:
        """Starts a trace with the first of several chosen steps in a row."""
        if self._traces and number in self._steps and not self._on:
            jax.profiler.start_trace(str(self._traces.folder))
            self._on = True

    def after(self, number: int, metrics: Any) -> None:
        """Ends it with the last, when the device has done it."""
        if self._on and number + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self.end()

    def end(self) -> None:
        """Ends a trace that is still on: the run ends before its last chosen step."""
        if self._traces and self._on:
            jax.profiler.stop_trace()
            self._on = False
            self._traces.sync()
