"""From a checkpoint to what a step needs: trained weights, frozen ones, and how they make a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.name_map import param_specs, tree_of
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.model.sharding import compiler_options, replicated
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.model.transformer import init_params, stack_layers
from qwen3vl_jax.training import param_groups
from qwen3vl_jax.training.lora_targets import split_lora
from qwen3vl_jax.training.new_tokens import new_rows
from qwen3vl_jax.training.optimizer import make_optimizer
from qwen3vl_jax.training.param_groups import Flat, MergeParams, TrainableParams
from qwen3vl_jax.training.recipe import Recipe
from qwen3vl_jax.training.stacked_load import load_stacked, stacked
from qwen3vl_jax.training.state_sharding import (
    check_mesh,
    params_shardings,
    put,
    state_shardings,
    with_shardings,
)
from qwen3vl_jax.training.train_step import TrainState, init_state, train_step

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def prepare(
    recipe: Recipe, cfg: Config, new_ids: Sequence[int] = (), mesh: Mesh | None = None
) -> TrainableParams:
    """The model that a run starts from, read or drawn, and cut; new_ids: of train.new_tokens.

    Each array lies on the mesh as sharding.RULES say, and was read or drawn there.

    Raises InputError for what does not fit the model, a mesh that does not divide it, and 8-bit weights
    without LoRA.
    """
    check_mesh(mesh, cfg, shapes(cfg))
    params = initial_params(recipe, cfg, mesh)
    if recipe.lora.rank:
        return shard_params(split_lora(recipe, cfg, params), cfg, mesh)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    if any(isinstance(x, Quantized) for x in leaves):
        raise InputError(
            f"{recipe.ckpt}: holds 8-bit weights, which only LoRA can train over; set lora.rank"
        )
    if new_ids and recipe.init == "checkpoint":
        params = new_rows(params, new_ids)
    trainable = split_trainable(recipe, cfg, params)
    if new_ids and "embed" not in trainable.weights:
        raise InputError(
            "train.new_tokens: train.freeze holds embeddings, so they cannot be learned"
        )
    return shard_params(trainable, cfg, mesh)


def shard_params(trainable: TrainableParams, cfg: Config, mesh: Mesh | None) -> TrainableParams:
    """The same arrays, each where the mesh wants it. Raises InputError as sharding.shardings does."""
    if mesh is None:
        return trainable

    def laid(flat: Flat) -> Flat:
        where = params_shardings(mesh, cfg, flat)
        return {n: put(x, where[n]) for n, x in flat.items()}

    return trainable._replace(weights=laid(trainable.weights), frozen=laid(trainable.frozen))


def initial_params(recipe: Recipe, cfg: Config, mesh: Mesh | None = None) -> Params:
    """The parameters that a run starts from, layers stacked, each in the dtype it is held in.

    recipe.init "checkpoint" reads them; "normal" draws them from initializer_range, "fan_in" with a
    deviation of 1 / sqrt(inputs), without which a tower of a few hundred channels starts too quiet.
    """
    dtype_of = held_dtypes(recipe, cfg)
    if recipe.init == "checkpoint":
        eight_bit = recipe.lora.rank and recipe.lora.base in ("int8", "fp8")
        weights = recipe.lora.base if eight_bit else None
        return load_stacked(recipe.ckpt, dtype_of, weights, functools.partial(where_of, mesh, cfg))

    unflatten = param_groups.flatten(tree_of_shapes(cfg))[1]

    def make(key: jax.Array) -> Flat:
        params = stack_layers(_rescaled(init_params(key, cfg), cfg, recipe.init))
        return {
            name: x.astype(dtype_of(name)) for name, x in param_groups.flatten(params)[0].items()
        }

    where = params_shardings(mesh, cfg, shapes(cfg)) if mesh else None
    return unflatten(jax.jit(make, out_shardings=where)(jax.random.key(recipe.seed)))


def where_of(mesh: Mesh | None, cfg: Config, name: str, x: Any) -> Any:
    """The sharding of one array by its stacked name, None without a mesh."""
    return params_shardings(mesh, cfg, {name: x})[name]


def held_dtypes(recipe: Recipe, cfg: Config) -> Callable[[str], Any]:
    """The dtype in which each parameter is held, by its stacked name: trained, or frozen.

    Raises InputError for a group that train.freeze names and the model does not have.
    """
    if recipe.lora.rank:
        plain = recipe.lora.base in ("float32", "bfloat16")
        base = jnp.dtype(recipe.lora.base if plain else recipe.step.dtype)
        return lambda name: base
    stopped = param_groups.frozen_names(list(shapes(cfg)), recipe.train.freeze, _sparse(cfg))
    held, still = jnp.dtype(recipe.step.weights), jnp.dtype(recipe.step.dtype)
    return lambda name: still if name in stopped else held


@functools.lru_cache(maxsize=4)
def shapes(cfg: Config) -> Flat:
    """{stacked name: fp32 ShapeDtypeStruct} of a model's parameters, to be read only.

    From the converter's table: tracing the 94 layers of the largest model takes seconds.
    """
    return param_groups.flatten(tree_of_shapes(cfg))[0]


def tree_of_shapes(cfg: Config) -> Params:
    """`shapes` as the tree of parameters with stacked layers."""
    stacks = dict(stacked(cfg, param.path, param.shape) for param in param_specs(cfg))
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in stacks.items()}
    return tree_of(cfg, leaves)


def _rescaled(params: Params, cfg: Config, kind: str) -> Params:
    def rescale(path, x):
        name = path[-1].key
        if kind != "fan_in" or x.ndim < 2 or "bias" in name or name in ("embed", "pos"):
            return x
        fan_in = x[0].size if name in ("o", "weight") else x.shape[-1]
        return x * (fan_in**-0.5 / cfg.text.initializer_range)

    return jax.tree_util.tree_map_with_path(rescale, params)


def split_trainable(recipe: Recipe, cfg: Config, params: Params) -> TrainableParams:
    """Which parameters are trained; each is cast to the dtype it is held in. Raises InputError."""
    flat, unflatten = param_groups.flatten(params)
    stopped = param_groups.frozen_names(list(flat), recipe.train.freeze, _sparse(cfg))
    dtype_of = held_dtypes(recipe, cfg)
    held = {name: x.astype(dtype_of(name)) for name, x in flat.items()}

    def merge(weights: Flat, frozen: Flat, key: Any = None) -> Params:
        return unflatten({**weights, **frozen})

    weights = {name: x for name, x in held.items() if name not in stopped}
    return TrainableParams(weights, {name: held[name] for name in held if name in stopped}, merge)


def _sparse(cfg: Config) -> bool:
    return bool(cfg.text.num_experts)


def build_optimizer(recipe: Recipe, cfg: Config, weights: Flat) -> optax.GradientTransformation:
    """The optimizer of the trained weights. Raises InputError for a train.rates of what is not trained."""
    lora, every = recipe.lora, list(shapes(cfg))
    why = (
        f"LoRA trains lora.targets {list(lora.targets)} alone"
        if lora.rank
        else "train.freeze holds it"
    )
    param_groups.check_trained(recipe.train.rates, list(weights), every, why, _sparse(cfg))
    factors = param_groups.learning_rates(list(weights), recipe.train.rates, _sparse(cfg))
    return make_optimizer(recipe.optimizer, recipe.steps, factors)


def initial_state(
    recipe: Recipe, optimizer: optax.GradientTransformation, weights: Flat
) -> TrainState:
    """The state before the first step; trace it with jax.eval_shape for its shapes alone."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), 1)
    return init_state(key, weights, optimizer, recipe.step, recipe.optimizer.ema)


def shape_of_state(
    recipe: Recipe, cfg: Config, optimizer: optax.GradientTransformation, weights: Flat,
    mesh: Mesh | None = None,
) -> TrainState:  # fmt: skip
    """`initial_state` as ShapeDtypeStructs, on a mesh with their shardings."""
    state = jax.eval_shape(functools.partial(initial_state, recipe, optimizer), weights)
    return with_shardings(state, state_shardings(mesh, cfg, state)) if mesh else state


def init_train_state(
    recipe: Recipe, cfg: Config, optimizer: optax.GradientTransformation, weights: Flat,
    mesh: Mesh | None = None,
) -> TrainState:  # fmt: skip
    """`initial_state` of weights that lie on a mesh; they are donated there."""
    if mesh is None:
        return initial_state(recipe, optimizer, weights)
    make = functools.partial(initial_state, recipe, optimizer)
    where = jax.tree.map(
        lambda x: x.sharding, shape_of_state(recipe, cfg, optimizer, weights, mesh)
    )
    return jax.jit(make, donate_argnums=0, out_shardings=where)(weights)


def make_step(
    recipe: Recipe, cfg: Config, optimizer: optax.GradientTransformation, merge: MergeParams,
    state: TrainState | None = None, keep_unused: bool = False,
) -> Step:  # fmt: skip
    """The jitted step(state, frozen, packed) -> (state, metrics); the state is donated.

    state: arrays or shapes with their shardings, which the new state has too; None on one device.
    keep_unused: what the step does not read counts in its memory, as a run holds it all the same.
    """
    step = functools.partial(
        train_step,
        cfg=cfg,
        step=recipe.step,
        optimizer=optimizer,
        merge=merge,
        ema=recipe.optimizer.ema,
    )
    if state is None:
        return jax.jit(step, donate_argnums=0)
    where = jax.tree.map(lambda x: x.sharding, state)
    mesh = where.step.mesh
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(where, replicated(mesh)),
        compiler_options=compiler_options(mesh),
        keep_unused=keep_unused,
    )
