"""The parameters that a run of train.py has learned, read from its directory for inference and export."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen3vl_jax.checkpoint.adapter_map import Adapter
from qwen3vl_jax.checkpoint.adapters import merged
from qwen3vl_jax.checkpoint.config_files import PARAMS, read_config
from qwen3vl_jax.checkpoint.hf_reader import open_hf
from qwen3vl_jax.checkpoint.lazy_tensor import LazyTensor
from qwen3vl_jax.checkpoint.name_map import param_specs
from qwen3vl_jax.checkpoint.orbax_io import open_tree, read_part, read_tree, stored_tensors
from qwen3vl_jax.checkpoint.param_paths import TreePath
from qwen3vl_jax.checkpoint.validate import check_stored, stored_kind
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.training.lora_targets import adapter_of
from qwen3vl_jax.training.param_groups import flatten
from qwen3vl_jax.training.recipe import Recipe, read_recipe
from qwen3vl_jax.training.run_dir import CHECKPOINTS, CONFIG, MODEL, chosen_step, scores
from qwen3vl_jax.training.stacked_load import layers_of, paths_of
from qwen3vl_jax.training.train_model import initial_params

Sink = Callable[[TreePath, np.ndarray], None]
ReadInto = Callable[[Sink, Sequence[TreePath]], None]


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """What of a run is exported. step: best, last, a number, or None: best if any was evaluated."""

    step: str | None = None
    adapter: bool = False
    raw: bool = False


def run_leaves(run: Path, cfg: Config) -> tuple[dict[TreePath, LazyTensor], str]:
    """The parameters of a run's best step, or its last, by path, and which step. Raises InputError.

    As `run_to_hf` writes them; of what was trained one stack of layers is in memory at a time, so read
    them in their order.
    """
    recipe, (weights, message) = read_recipe(run / CONFIG), step_weights(run, SavedStep())
    if recipe.lora.rank:
        return merged_leaves(recipe, cfg, weights)[0], message + "merged"
    leaves, stacks = _base(recipe, cfg), {}
    open_tree(weights, lambda path, leaf: stacks.update({str(path[0]): leaf}))

    @functools.lru_cache(maxsize=1)
    def layers(name: str) -> dict[TreePath, np.ndarray]:
        return dict(layers_of(name, stacks[name].load()))

    for name, path in [(n, path) for n in stacks for path in paths_of(n, cfg)]:
        leaf = leaves[path]

        def load(
            name: str = name, path: TreePath = path, dtype: np.dtype = leaf.dtype
        ) -> np.ndarray:
            return layers(name)[path].astype(dtype)

        leaves[path] = LazyTensor(leaf.shape, leaf.dtype, load)
    return leaves, message.removesuffix(", ")


def run_adapter(run: Path, cfg: Config) -> tuple[dict[str, np.ndarray], Adapter]:
    """The adapter of a LoRA run's best step, or its last, as `peft.load_adapter` gives one."""
    recipe = read_recipe(run / CONFIG)
    if not recipe.lora.rank:
        raise InputError(f"{run}: holds no adapter (its lora.rank is 0); give it as the checkpoint")
    if Config.from_hf(run / MODEL) != cfg:
        raise InputError(
            f"{run}: its adapter is for {recipe.ckpt}, whose config.json is another one"
        )
    return flat_arrays(step_weights(run, SavedStep())[0]), adapter_of(recipe, cfg)


def step_weights(run: Path, wanted: SavedStep) -> tuple[Path, str]:
    """Where the weights of a run's step are, and what they are."""
    number = _step(run, wanted.step)
    saved = run / CHECKPOINTS / str(number)
    averaged = (saved / "average").is_dir() and not wanted.raw
    message = f"step {number}{', averaged weights' if averaged else ''}, "
    return saved / ("average" if averaged else "weights"), message


def _step(run: Path, wanted: str | None) -> int:
    """The step that is asked for, or the best if any was evaluated, else the last."""
    if wanted is None:
        wanted = "best" if scores(run) else "last"
    return chosen_step(run, wanted)


def trained_leaves(
    recipe: Recipe, cfg: Config, weights: Path
) -> tuple[dict[TreePath, LazyTensor], ReadInto]:
    """What a run without LoRA gives: trained arrays of a step, and those it froze."""
    trained = {p for path in stored_tensors(weights) for p in paths_of(str(path[0]), cfg)}
    leaves = _base(recipe, cfg)

    def read(sink: Sink, order: Sequence[TreePath]) -> None:
        def trained_sink(path: TreePath, array: np.ndarray) -> None:
            for place, layer in layers_of(str(path[0]), array):
                sink(place, layer.astype(leaves[place].dtype))

        read_tree(weights, trained_sink)
        for path in (path for path in order if path not in trained):
            sink(path, leaves[path].load())

    return leaves, read


def merged_leaves(
    recipe: Recipe, cfg: Config, weights: Path
) -> tuple[dict[TreePath, LazyTensor], ReadInto]:
    """What a LoRA run gives: the checkpoint it began with (not rounded to 8 bits), and its adapter."""
    leaves = merged(cfg, _base(recipe, cfg), flat_arrays(weights), adapter_of(recipe, cfg))

    def read(sink: Sink, order: Sequence[TreePath]) -> None:
        for path in order:
            sink(path, leaves[path].load())

    return leaves, read


def flat_arrays(weights: Path) -> dict[str, np.ndarray]:
    """The flat weights of a step in numpy."""
    found: dict[str, np.ndarray] = {}
    read_tree(weights, lambda path, array: found.update({str(path[0]): array}))
    return found


def _base(recipe: Recipe, cfg: Config) -> dict[TreePath, LazyTensor]:
    """The arrays that a run began with, in the dtypes of their files; drawn ones are bf16."""
    if recipe.init != "checkpoint":
        return _drawn(recipe, cfg)
    directory = resolve(recipe.ckpt)
    if not (directory / PARAMS).is_dir():
        return open_hf(directory, Config.from_hf(directory))
    stored = stored_tensors(directory / PARAMS)
    check_stored(directory, cfg, stored, read_config(directory))
    if stored_kind(stored):
        raise InputError(f"{directory}: holds 8-bit weights; set ckpt to what it was made from")
    return {
        path: dataclasses.replace(leaf, load=functools.partial(read_part, directory / PARAMS, path))
        for path, leaf in stored.items()
    }


def _drawn(recipe: Recipe, cfg: Config) -> dict[TreePath, LazyTensor]:
    """The arrays that a run drew at its start, drawn again when the first is asked for."""

    @functools.cache
    def arrays() -> dict[TreePath, np.ndarray]:
        flat = flatten(initial_params(recipe, cfg))[0]
        return {p: x for n, stack in flat.items() for p, x in layers_of(n, np.asarray(stack))}

    dtype = np.dtype(ml_dtypes.bfloat16)
    return {
        param.path: LazyTensor(
            param.shape, dtype, lambda path=param.path: arrays()[path].astype(dtype)
        )
        for param in param_specs(cfg)
    }
