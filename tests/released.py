"""Parameter trees from arrays by released name, and back, in the released layout."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3vl_jax.checkpoint.name_map import param_specs, tree_of
from qwen3vl_jax.checkpoint.param_paths import flatten
from qwen3vl_jax.config import Config


def from_hf(cfg: Config, tensors: Mapping[str, np.ndarray]) -> Any:
    """The parameter tree from arrays by released name, in the released layout."""
    specs = param_specs(cfg)
    leaves = {s.path: s.assemble([tensors[part.name] for part in s.parts]) for s in specs}
    return tree_of(cfg, leaves)


def to_hf(cfg: Config, params: Any) -> dict[str, np.ndarray]:
    """Arrays by released name, in the released layout: the inverse of `from_hf`."""
    leaves = dict(flatten(params))
    specs = (spec for spec in param_specs(cfg) if spec.path in leaves)
    pieces = (spec.split(np.asarray(leaves[spec.path])) for spec in specs)
    return {name: tensor for piece in pieces for name, tensor in piece}
