"""A model cut into what is trained and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.training.param_groups import Flat

Join = Callable[..., Params]  # (weights, frozen, key=None) -> parameters with stacked layers


class Trainee(NamedTuple):
    """A model cut into what is trained and what is not."""

    weights: Flat
    frozen: Flat
    join: Join
