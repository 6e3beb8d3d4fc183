"""A run of train.py -> a Hugging Face directory, or the PEFT adapter of a LoRA run."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert import matching
from convert.mapping import rows
from convert.places import Adapter
from convert.readers import side_files
from convert.stored import check_stored, stored_kind
from convert.to_hf import SHARD_SIZE, Sink, write_files
from convert.to_orbax import PARAMS, Progress
from qwen3vl_jax.cli import signals_later
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.staging import check_apart, copy_files, read_config
from qwen3vl_jax.tensors import LazyTensor, TreePath

if TYPE_CHECKING:
    from qwen3vl_jax.training.recipe import Recipe

_RUN, CHECKPOINTS = "config.toml", "checkpoints"
_Read = Callable[[Sink, Sequence[TreePath]], None]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What of a run is exported. step: best, last, a number, or None: best if any was evaluated."""

    step: str | None = None
    adapter: bool = False
    raw: bool = False


def is_run(directory: Path) -> bool:
    """Whether this is a directory that train.py writes."""
    return (directory / _RUN).is_file() and (directory / CHECKPOINTS).is_dir()


def run_to_hf(
    run: Path,
    out: Path,
    wanted: Wanted | None = None,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> tuple[int, int, str]:
    """Writes a saved step under released names; (tensors, bytes, which step and what of it).

    Each tensor has the dtype of the checkpoint that the run began with (bf16 where there is none, or
    where it was FP8). What the run froze is read from that checkpoint. A LoRA run is merged into it in
    fp32; wanted.adapter writes its adapter instead. A run that keeps an average gives that, but for
    wanted.raw. Raises InputError.
    """
    from qwen3vl_jax.training.recipe import read_recipe
    from qwen3vl_jax.training.run_dir import MODEL

    wanted = wanted or Wanted()
    check_apart(run, out)
    recipe = read_recipe(run / _RUN)
    cfg = Config.from_hf(run / MODEL)
    weights, told = _weights(run, wanted)
    if wanted.adapter and not recipe.lora.rank:
        raise InputError(f"{run}: --adapter is for LoRA, and this run's lora.rank is 0")
    with signals_later():
        importlib.import_module("qwen3vl_jax.orbax_io")
    if wanted.adapter:
        return (*_write_adapter(recipe, cfg, weights, out), told + "PEFT adapter, ")
    if recipe.lora.rank:
        stored, read = _merged(recipe, cfg, weights)
        told += "merged, "
    else:
        stored, read = _whole(recipe, cfg, weights)

    def finish(stage: Path) -> None:
        copy_files(run / MODEL, side_files(run / MODEL), stage)

    written = write_files(out, cfg, stored, read, finish, force, shard_size, progress)
    return (*written, told)


def run_leaves(run: Path, cfg: Config) -> tuple[dict[TreePath, LazyTensor], str]:
    """The parameters of a run's best step, or its last, by path, and which step. Raises InputError.

    As `run_to_hf` writes them; of what was trained one stack of layers is in memory at a time, so read
    them in their order.
    """
    from qwen3vl_jax.orbax_io import open_tree
    from qwen3vl_jax.training.recipe import read_recipe
    from qwen3vl_jax.training.stacked import layers_of, paths_of

    recipe, (weights, told) = read_recipe(run / _RUN), _weights(run, Wanted())
    if recipe.lora.rank:
        return _merged(recipe, cfg, weights)[0], told + "merged"
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
    return leaves, told.removesuffix(", ")


def run_adapter(run: Path, cfg: Config) -> tuple[dict[str, np.ndarray], Adapter]:
    """The adapter of a LoRA run's best step, or its last, as `peft.load_adapter` gives one."""
    from qwen3vl_jax.training.adapters import adapter_of
    from qwen3vl_jax.training.recipe import read_recipe
    from qwen3vl_jax.training.run_dir import MODEL

    recipe = read_recipe(run / _RUN)
    if not recipe.lora.rank:
        raise InputError(f"{run}: holds no adapter (its lora.rank is 0); give it as the checkpoint")
    if Config.from_hf(run / MODEL) != cfg:
        raise InputError(
            f"{run}: its adapter is for {recipe.ckpt}, whose config.json is another one"
        )
    return _arrays(_weights(run, Wanted())[0]), adapter_of(recipe, cfg)


def _weights(run: Path, wanted: Wanted) -> tuple[Path, str]:
    """Where the weights of a run's step are, and what they are."""
    number = _step(run, wanted.step)
    saved = run / CHECKPOINTS / str(number)
    averaged = (saved / "average").is_dir() and not wanted.raw
    told = f"step {number}{', averaged weights' if averaged else ''}, "
    return saved / ("average" if averaged else "weights"), told


def _step(run: Path, wanted: str | None) -> int:
    """The step that is asked for, or the best if any was evaluated, else the last."""
    from qwen3vl_jax.training.run_dir import chosen_step, scores

    if wanted is None:
        wanted = "best" if scores(run) else "last"
    return chosen_step(run, wanted)


def _whole(recipe: Recipe, cfg: Config, weights: Path) -> tuple[dict[TreePath, LazyTensor], _Read]:
    """What a run without LoRA gives: trained arrays of a step, and those it froze."""
    from qwen3vl_jax.orbax_io import read_tree, stored_tensors
    from qwen3vl_jax.training.stacked import layers_of, paths_of

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


def _merged(recipe: Recipe, cfg: Config, weights: Path) -> tuple[dict[TreePath, LazyTensor], _Read]:
    """What a LoRA run gives: the checkpoint it began with (not rounded to 8 bits), and its adapter."""
    from convert.merging import merged
    from qwen3vl_jax.training.adapters import adapter_of

    leaves = merged(cfg, _base(recipe, cfg), _arrays(weights), adapter_of(recipe, cfg))

    def read(sink: Sink, order: Sequence[TreePath]) -> None:
        for path in order:
            sink(path, leaves[path].load())

    return leaves, read


def _write_adapter(recipe: Recipe, cfg: Config, weights: Path, out: Path) -> tuple[int, int]:
    from convert.peft import save_adapter
    from qwen3vl_jax.training.adapters import adapter_of

    arrays = _arrays(weights)
    save_adapter(out, cfg, arrays, adapter_of(recipe, cfg), base_name=recipe.ckpt)
    return len(arrays), sum(x.nbytes for x in arrays.values())


def _arrays(weights: Path) -> dict[str, np.ndarray]:
    """The flat weights of a step in numpy."""
    from qwen3vl_jax.orbax_io import read_tree

    found: dict[str, np.ndarray] = {}
    read_tree(weights, lambda path, array: found.update({str(path[0]): array}))
    return found


def _base(recipe: Recipe, cfg: Config) -> dict[TreePath, LazyTensor]:
    """The arrays that a run began with, in the dtypes of their files; drawn ones are bf16."""
    from qwen3vl_jax.checkpoint import resolve
    from qwen3vl_jax.orbax_io import read_part, stored_tensors

    if recipe.init != "checkpoint":
        return _drawn(recipe, cfg)
    directory = resolve(recipe.ckpt)
    if not (directory / PARAMS).is_dir():
        return matching.open_hf(directory, Config.from_hf(directory))
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
    import ml_dtypes

    from qwen3vl_jax.training.groups import flatten
    from qwen3vl_jax.training.setup import initial_params
    from qwen3vl_jax.training.stacked import layers_of

    @functools.cache
    def arrays() -> dict[TreePath, np.ndarray]:
        flat = flatten(initial_params(recipe, cfg))[0]
        return {p: x for n, stack in flat.items() for p, x in layers_of(n, np.asarray(stack))}

    dtype = np.dtype(ml_dtypes.bfloat16)
    return {
        row.path: LazyTensor(row.shape, dtype, lambda path=row.path: arrays()[path].astype(dtype))
        for row in rows(cfg)
    }
