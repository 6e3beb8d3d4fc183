"""RUN_DIR/model: the config, tokenizer and template that a run works with, new tokens in them."""

from __future__ import annotations

from pathlib import Path

from qwen3vl_jax.checkpoint.config_files import PARAMS, copy_files
from qwen3vl_jax.config import Config, is_run
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.storage.atomic_dir import CONFIG, atomic_dir
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.storage.paths import is_remote, remove_tree
from qwen3vl_jax.storage.safetensors_files import side_files
from qwen3vl_jax.training.new_tokens import add_tokens
from qwen3vl_jax.training.recipe import Recipe


def write_model_files(recipe: Recipe, target: Path) -> None:
    """Copies all but the weights of recipe.ckpt, and adds train.new_tokens; complete or not at all.

    Raises InputError for a checkpoint that is not there, and for tokens that cannot be added.
    """
    source = resolve(recipe.ckpt)
    if is_run(source):
        raise InputError(
            f"ckpt: got {source}, a run of train.py, expected a checkpoint; write its weights first: "
            f"python -m convert --to-hf {source} OUT_DIR"
        )
    if is_remote(target) and (target / CONFIG).is_file():
        remove_tree(target)  # this run's own, of a start that did not come to a checkpoint
    with atomic_dir(target, force=True) as stage:
        copy_files(source, side_files(source, leave_out=[PARAMS]), stage)
        if recipe.train.new_tokens:
            rows = Config.from_hf(source).text.vocab_size
            add_tokens(source, stage, recipe.train.new_tokens, rows)


def open_model(recipe: Recipe, target: Path) -> tuple[Processor, list[int]]:
    """The processor of what `write_model_files` wrote, and the ids of train.new_tokens."""
    proc = Processor.from_pretrained(target)
    return proc, [proc.tokenizer.id_of(name) for name in recipe.train.new_tokens]
