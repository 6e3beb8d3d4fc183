"""From a checkpoint to what a step needs: trained weights, frozen weights, optimizer, jitted step.

Functions raise InputError for what does not fit the model.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from optax import GradientTransformation

from qwen3vl_jax.checkpoint import config_files, device_load, param_paths, stacking, validate
from qwen3vl_jax.checkpoint.name_map import param_specs, tree_of
from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import compiler_options, replicated
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.parameters import init_params
from qwen3vl_jax.storage.paths import as_path
from qwen3vl_jax.training import lora_targets, new_tokens, param_groups, state_sharding
from qwen3vl_jax.training.optimizer import make_optimizer
from qwen3vl_jax.training.param_groups import Flat, MergeParams, TrainableParams
from qwen3vl_jax.training.recipe import Recipe, few_bits
from qwen3vl_jax.training.stacked_load import load_stacked, stacked
from qwen3vl_jax.training.state_sharding import params_shardings
from qwen3vl_jax.training.train_step import TrainState, init_state, train_step

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
_FEW_BITS_ALONE = "holds weights of 8 or 4 bits, which only LoRA can train over; set lora.rank"


def prepare(
    recipe: Recipe, cfg: Config, new_ids: Sequence[int] = (), mesh: Mesh | None = None
) -> TrainableParams:
    """The first weights of a run, split into trained and frozen, in their shardings on the mesh.

    new_ids: of train.new_tokens. Raises InputError also for a mesh that does not divide the model, and
    for 8-bit weights without LoRA.
    """
    state_sharding.check_mesh(mesh, cfg, shapes(cfg))
    params = initial_params(recipe, cfg, mesh)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    if not recipe.lora.rank and any(isinstance(x, Quantized) for x in leaves):
        raise InputError(f"{recipe.ckpt}: {_FEW_BITS_ALONE}")
    if new_ids and recipe.init == "checkpoint":
        params = new_tokens.new_rows(params, new_ids)
    weights, frozen, merge = split_trainable(recipe, cfg, params)
    if new_ids and "embed" not in weights:
        raise InputError("train.new_tokens: train.freeze holds embeddings; they cannot be learned")
    where = params_shardings(mesh, cfg, {**weights, **frozen})
    weights = {name: state_sharding.put(x, where[name]) for name, x in weights.items()}
    frozen = {name: state_sharding.put(x, where[name]) for name, x in frozen.items()}
    return TrainableParams(weights, frozen, merge)


def check_base(recipe: Recipe, cfg: Config) -> None:
    """Raises InputError for a checkpoint on this machine whose weights a run of the recipe refuses."""
    directory = as_path(recipe.ckpt)
    if (directory / config_files.PARAMS).is_dir() or any(directory.glob("*.safetensors")):
        stored = device_load.Source(directory, cfg, few_bits(recipe)).stored()
        if not recipe.lora.rank and validate.stored_kind(stored):
            raise InputError(f"{recipe.ckpt}: {_FEW_BITS_ALONE}")


def initial_params(recipe: Recipe, cfg: Config, mesh: Mesh | None = None) -> Params:
    """The first parameters of a run, layers stacked, each in its dtype of `held_dtypes`.

    recipe.init: "checkpoint" reads them; "normal" draws them with a deviation of initializer_range;
    "fan_in" with 1 / sqrt(inputs), which a small model needs for signals of a usable size.
    """
    dtype_of = held_dtypes(recipe, cfg)
    if recipe.init == "checkpoint":
        return load_stacked(recipe.ckpt, dtype_of, few_bits(recipe), mesh)

    def rescale(path: Any, x: jax.Array) -> jax.Array:
        name = path[-1].key
        if recipe.init != "fan_in" or x.ndim < 2 or "bias" in name or name in ("embed", "pos"):
            return x
        fan_in = x[0].size if name in ("o", "weight") else x.shape[-1]
        return x * (fan_in**-0.5 / cfg.text.initializer_range)

    def make(key: jax.Array) -> Flat:
        params = jax.tree_util.tree_map_with_path(rescale, init_params(key, cfg))
        flat = param_groups.flatten(stacking.stack_layers(params))[0]
        return {name: x.astype(dtype_of(name)) for name, x in flat.items()}

    where = params_shardings(mesh, cfg, shapes(cfg)) if mesh else None
    flat = jax.jit(make, out_shardings=where)(jax.random.key(recipe.seed))
    return tree_of(cfg, {param_paths.parse_path(name): x for name, x in flat.items()})


def held_dtypes(recipe: Recipe, cfg: Config) -> Callable[[str], Any]:
    """A function of a parameter's stacked name: the dtype in which a run holds it."""
    if recipe.lora.rank:
        base = jnp.dtype(recipe.step.dtype if few_bits(recipe) else recipe.lora.base)
        return lambda name: base
    stopped = _frozen_names(recipe, cfg)
    held, still = jnp.dtype(recipe.step.weights), jnp.dtype(recipe.step.dtype)
    return lambda name: still if name in stopped else held


@functools.lru_cache(maxsize=4)
def shapes(cfg: Config) -> Flat:
    """{stacked name: fp32 ShapeDtypeStruct} of a model's parameters; do not change it."""
    # From the name map: tracing the 94 layers of the largest model takes seconds.
    stacks = dict(stacked(cfg, param.path, param.shape) for param in param_specs(cfg))
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in stacks.items()}
    return param_groups.flatten(tree_of(cfg, leaves))[0]


def split_trainable(recipe: Recipe, cfg: Config, params: Params) -> TrainableParams:
    """Splits parameters into trained and frozen ones, each cast to its dtype of `held_dtypes`."""
    if recipe.lora.rank:
        return lora_targets.split_lora(recipe, cfg, params)
    flat, unflatten = param_groups.flatten(params)
    stopped, dtype_of = _frozen_names(recipe, cfg), held_dtypes(recipe, cfg)
    held = {name: x.astype(dtype_of(name)) for name, x in flat.items()}

    def merge(weights: Flat, frozen: Flat, key: Any = None) -> Params:
        return unflatten({**weights, **frozen})

    weights = {name: x for name, x in held.items() if name not in stopped}
    return TrainableParams(weights, {name: held[name] for name in held if name in stopped}, merge)


def _frozen_names(recipe: Recipe, cfg: Config) -> set[str]:
    freeze, sparse = recipe.train.freeze, bool(cfg.text.num_experts)
    return param_groups.frozen_names(shapes(cfg), freeze, sparse)


def build_optimizer(recipe: Recipe, cfg: Config, weights: Flat) -> GradientTransformation:
    """The optimizer of the trained weights. Raises InputError for train.rates of frozen ones."""
    sparse, why = bool(cfg.text.num_experts), "train.freeze holds it"
    if recipe.lora.rank:
        why = f"LoRA trains lora.targets {list(recipe.lora.targets)} alone"
    rates = recipe.train.rates
    factors = param_groups.learning_rates(weights, rates, sparse, shapes(cfg), why)
    return make_optimizer(recipe.optimizer, recipe.steps, factors)


def initial_state(recipe: Recipe, optimizer: GradientTransformation, weights: Flat) -> TrainState:
    """The state before the first step. Works under jax.eval_shape."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), 1)
    return init_state(key, weights, optimizer, recipe.step, recipe.optimizer.ema)


def shape_of_state(
    recipe: Recipe, cfg: Config, optimizer: GradientTransformation, weights: Flat, mesh: Mesh | None
) -> TrainState:
    """`initial_state` as ShapeDtypeStructs, with shardings on a mesh."""
    state = jax.eval_shape(functools.partial(initial_state, recipe, optimizer), weights)
    if mesh is None:
        return state
    return state_sharding.with_shardings(state, state_sharding.state_shardings(mesh, cfg, state))


def init_train_state(
    recipe: Recipe, cfg: Config, optimizer: GradientTransformation, weights: Flat, mesh: Mesh | None
) -> TrainState:
    """`initial_state` in its shardings. On a mesh the weights are donated."""
    make = functools.partial(initial_state, recipe, optimizer)
    if mesh is None:
        return make(weights)
    like = shape_of_state(recipe, cfg, optimizer, weights, mesh)
    where = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(make, donate_argnums=0, out_shardings=where)(weights)


def make_step(
    recipe: Recipe,
    cfg: Config,
    optimizer: GradientTransformation,
    merge: MergeParams,
    state: TrainState | None = None,
    keep_unused: bool = False,
) -> Step:
    """The jitted step(state, frozen, packed) -> (state, metrics). The state is donated.

    state: arrays or shapes whose shardings the new state gets; None on one device. keep_unused: unread
    arguments stay in the program, so that its memory is that of a run.
    """
    settings: Any = {"cfg": cfg, "step": recipe.step, "ema": recipe.optimizer.ema}
    step = functools.partial(train_step, **settings, optimizer=optimizer, merge=merge)
    where, options = jax.tree.map(lambda x: x.sharding, state), {}
    if where is not None:
        mesh = where.step.mesh
        options["out_shardings"] = where, replicated(mesh)
        options["compiler_options"] = compiler_options(mesh)
    return jax.jit(step, donate_argnums=0, keep_unused=keep_unused, **options)
