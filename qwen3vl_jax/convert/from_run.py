"""A run of train.py -> a Hugging Face directory, or the PEFT adapter of a LoRA run."""

from pathlib import Path

from qwen3vl_jax.checkpoint.peft_io import save_adapter
from qwen3vl_jax.config import Config
from qwen3vl_jax.convert import SHARD_SIZE, Progress
from qwen3vl_jax.convert.to_hf import write_files
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.atomic_dir import check_apart
from qwen3vl_jax.training.lora_targets import adapter_of
from qwen3vl_jax.training.recipe import read_recipe
from qwen3vl_jax.training.run_dir import CONFIG, MODEL
from qwen3vl_jax.training.run_params import SavedStep, flat_arrays, step_leaves, step_weights


def run_to_hf(
    run: Path,
    out: Path,
    wanted: SavedStep | None = None,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> tuple[int, int, str]:
    """Writes a saved step under released names; (tensors, bytes, a text that names the step).

    Each tensor has the dtype of the checkpoint that the run began with, or bf16 for FP8 and for random
    weights. A LoRA run is merged in fp32; wanted.adapter writes its adapter instead. Averaged weights are
    written if the run keeps them, unless wanted.raw. Raises InputError.
    """
    wanted = wanted or SavedStep()
    check_apart(run, out)
    recipe = read_recipe(run / CONFIG)
    cfg = Config.from_hf(run / MODEL)
    weights, message = step_weights(run, wanted)
    if wanted.adapter and not recipe.lora.rank:
        raise InputError(f"{run}: --adapter is for LoRA, and this run's lora.rank is 0")
    if wanted.adapter:
        arrays = flat_arrays(weights)
        save_adapter(out, cfg, arrays, adapter_of(recipe, cfg), base_name=recipe.ckpt)
        return len(arrays), sum(x.nbytes for x in arrays.values()), message + "PEFT adapter, "
    leaves, first = step_leaves(recipe, cfg, weights)
    message += "merged, " if recipe.lora.rank else ""
    written = write_files(out, cfg, leaves, first, run / MODEL, force, shard_size, progress)
    return (*written, message)
