"""Parameters that a run of train.py has learned, read from its directory for inference and export."""

import dataclasses
import functools
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen3vl_jax.checkpoint import adapters, device_load, name_map, orbax_io, validate
from qwen3vl_jax.checkpoint.adapter_map import Adapter
from qwen3vl_jax.checkpoint.lazy_tensor import LazyTensor
from qwen3vl_jax.checkpoint.param_paths import TreePath
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.training import lora_targets, param_groups, stacked_load, train_model
from qwen3vl_jax.training.recipe import Recipe, few_bits, read_recipe
from qwen3vl_jax.training.run_dir import CHECKPOINTS, CONFIG, MODEL, chosen_step, scores


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """The step and the form to export. step: best, last, a number, or None (best if evaluated)."""

    step: str | None = None
    adapter: bool = False
    raw: bool = False


def run_leaves(run: Path, cfg: Config) -> tuple[dict[TreePath, LazyTensor], str]:
    """`step_leaves` of a run's best step, or its last, and a text that names it. Raises InputError."""
    recipe, (weights, message) = read_recipe(run / CONFIG), step_weights(run, SavedStep())
    leaves, _ = step_leaves(recipe, cfg, weights)
    if not message.startswith(f"step {(last := chosen_step(run, 'last'))},"):
        message += f"the best of its evaluations (the last is step {last}), "
    if not recipe.lora.rank:
        return leaves, message.removesuffix(", ")
    if base := few_bits(recipe):
        how = f"--ckpt {recipe.ckpt} --weights {base} --adapter {run}"
        message += f"merged into 16-bit weights; it was trained over {base}: {how} is that"
        return leaves, message
    return leaves, message + "merged"


def step_leaves(
    recipe: Recipe, cfg: Config, weights: Path
) -> tuple[dict[TreePath, LazyTensor], list[TreePath]]:
    """(the parameters of a saved step by path, the paths to read first and in this order).

    A LoRA run's adapter is merged into the checkpoint that it began with. Of other runs, trained
    layers come stack by stack, one stack in memory at a time, and frozen arrays come from that
    checkpoint.
    """
    base = _base(recipe, cfg)
    if recipe.lora.rank:
        adapter = lora_targets.adapter_of(recipe, cfg)
        return adapters.merged(cfg, base, flat_arrays(weights), adapter), []
    layers: dict[TreePath, np.ndarray] = {}

    def load(name: str, stack: LazyTensor, path: TreePath) -> np.ndarray:
        if path not in layers:
            # The old stack goes before the next one comes.
            layers.clear()
            layers.update(stacked_load.layers_of(name, stack.load()))
        return layers[path].astype(base[path].dtype)

    trained = {}
    for (name, *_), stack in orbax_io.open_tree(weights).items():
        for path in stacked_load.paths_of(str(name), stack.shape):
            read = functools.partial(load, str(name), stack, path)
            trained[path] = dataclasses.replace(base[path], load=read, read=None)
    return trained | {path: leaf for path, leaf in base.items() if path not in trained}, [*trained]


def run_adapter(run: Path, cfg: Config) -> tuple[dict[str, np.ndarray], Adapter]:
    """The adapter of a LoRA run's best step, or its last, as `load_adapter` gives one."""
    recipe = read_recipe(run / CONFIG)
    if not recipe.lora.rank:
        raise InputError(f"{run}: holds no adapter (its lora.rank is 0); give it as the checkpoint")
    if Config.from_hf(run / MODEL) != cfg:
        found = f"its adapter is for {recipe.ckpt}, whose config.json is another one"
        raise InputError(f"{run}: {found}")
    return flat_arrays(step_weights(run, SavedStep())[0]), lora_targets.adapter_of(recipe, cfg)


def step_weights(run: Path, wanted: SavedStep) -> tuple[Path, str]:
    """The folder of a saved step's weights, and a text that names them."""
    usual = "best" if scores(run) else "last"
    number = chosen_step(run, usual if wanted.step is None else wanted.step)
    saved = run / CHECKPOINTS / str(number)
    if (saved / "average").is_dir() and not wanted.raw:
        return saved / "average", f"step {number}, averaged weights, "
    return saved / "weights", f"step {number}, "


def flat_arrays(weights: Path) -> dict[str, np.ndarray]:
    """The weights of a step as numpy arrays by name, layers stacked."""
    return {str(path[0]): leaf.load() for path, leaf in orbax_io.open_tree(weights).items()}


def _base(recipe: Recipe, cfg: Config) -> dict[TreePath, LazyTensor]:
    """The arrays that a run began with, in the dtypes of their files; random ones are bf16."""
    if recipe.init == "checkpoint":
        directory = resolve(recipe.ckpt)
        stored = dict(device_load.Source(directory, cfg).stored())
        if validate.stored_kind(stored):
            found = "holds weights of 8 or 4 bits; set ckpt to what it was made from"
            raise InputError(f"{directory}: {found}")
        return stored

    @functools.cache
    def arrays() -> dict[TreePath, np.ndarray]:
        # Drawn again when the first is loaded.
        drawn: dict[TreePath, np.ndarray] = {}
        for name, x in param_groups.flatten(train_model.initial_params(recipe, cfg))[0].items():
            drawn |= stacked_load.layers_of(name, np.asarray(x))
        return drawn

    def read(path: TreePath) -> np.ndarray:
        return arrays()[path].astype(dtype)

    specs, dtype = name_map.param_specs(cfg), np.dtype(ml_dtypes.bfloat16)
    return {x.path: LazyTensor(x.shape, dtype, functools.partial(read, x.path)) for x in specs}
