"""From a checkpoint to what a step needs: trained weights, frozen ones, and how they make a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwen3vl_jax.checkpoint import load
from qwen3vl_jax.config import Config
from qwen3vl_jax.model import init_params, stack_layers
from qwen3vl_jax.structs import Params
from qwen3vl_jax.training import groups
from qwen3vl_jax.training.groups import Flat
from qwen3vl_jax.training.optimizer import make_optimizer
from qwen3vl_jax.training.recipe import Recipe
from qwen3vl_jax.training.step import TrainState, init_state, train_step

Join = Callable[..., Params]  # (weights, frozen, key=None) -> parameters with stacked layers


class Trainee(NamedTuple):
    """A model cut into what is trained and what is not."""

    weights: Flat
    frozen: Flat
    join: Join


def initial_params(recipe: Recipe, cfg: Config) -> Params:
    """The parameters that a run starts from, layers stacked.

    recipe.init "checkpoint" reads them; "normal" draws them from initializer_range, "fan_in" with a
    deviation of 1 / sqrt(inputs), without which a tower of a few hundred channels starts too quiet.
    """
    if recipe.init == "checkpoint":
        weights = (
            recipe.lora.base if recipe.lora.rank and recipe.lora.base in ("int8", "fp8") else None
        )
        params, _ = load(recipe.ckpt, weights=weights)
        return stack_layers(params)
    key = jax.random.key(recipe.seed)
    make = functools.partial(init_params, cfg=cfg)
    return jax.jit(lambda key: stack_layers(_rescaled(make(key), cfg, recipe.init)))(key)


def _rescaled(params: Params, cfg: Config, kind: str) -> Params:
    def rescale(path, x):
        name = path[-1].key
        if kind != "fan_in" or x.ndim < 2 or "bias" in name or name in ("embed", "pos"):
            return x
        fan_in = x[0].size if name in ("o", "weight") else x.shape[-1]
        return x * (fan_in**-0.5 / cfg.text.initializer_range)

    return jax.tree_util.tree_map_with_path(rescale, params)


def cut(recipe: Recipe, cfg: Config, params: Params) -> Trainee:
    """Which parameters are trained, in which dtype each is held. Raises InputError for unknown names."""
    flat, unflatten = groups.flatten(params)
    stopped = groups.frozen_names(list(flat), recipe.train.freeze, bool(cfg.text.num_experts))
    held, still = jnp.dtype(recipe.step.weights), jnp.dtype(recipe.step.dtype)
    weights = {n: x.astype(held) for n, x in flat.items() if n not in stopped}
    frozen = {n: _held(flat, n, still) for n in flat if n in stopped}

    def join(weights: Flat, frozen: Flat, key: Any = None) -> Params:
        return unflatten({**weights, **frozen})

    return Trainee(weights, frozen, join)


def _held(flat: Flat, name: str, dtype: Any) -> jax.Array:
    """A frozen leaf in the dtype of the computation; 8-bit values and their scales stay as they are."""
    x, eight_bit = flat[name], f"{name.rsplit('.', 1)[0]}.values" in flat
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) and not eight_bit else x


def rule_of(recipe: Recipe, cfg: Config, weights: Flat) -> optax.GradientTransformation:
    """The optimizer of the trained weights."""
    sparse = bool(cfg.text.num_experts)
    factors = groups.learning_rates(list(weights), recipe.train.rates, sparse)
    return make_optimizer(recipe.optimizer, recipe.steps, factors)


def start(
    recipe: Recipe, cfg: Config, trainee: Trainee
) -> tuple[TrainState, Callable[..., tuple[TrainState, dict[str, jax.Array]]]]:
    """The state before the first step and the jitted step(state, frozen, packed), state donated."""
    rule = rule_of(recipe, cfg, trainee.weights)
    settings, ema = recipe.step, recipe.optimizer.ema
    key = jax.random.fold_in(jax.random.key(recipe.seed), 1)
    state = init_state(key, trainee.weights, rule, settings, ema)
    step = functools.partial(
        train_step, cfg=cfg, step=settings, optimizer=rule, join=trainee.join, ema=ema
    )
    return state, jax.jit(step, donate_argnums=0)
