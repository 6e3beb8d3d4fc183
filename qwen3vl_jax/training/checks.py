"""What can be refused before jax is imported: files that are not there, extras that are not installed."""

from __future__ import annotations

import importlib.util

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.paths import as_path, kind
from qwen3vl_jax.training.recipe import Pack, Recipe

_EXTRA = ("grain", "tomli_w", "matplotlib", "tensorboardX")
PYTHON = "python:"  # in front of a source that is a class


def check_run(recipe: Recipe) -> None:
    """Raises InputError for a recipe that cannot start here: extras, mesh, model, files."""
    check_extras(recipe)
    check_sources(recipe)
    if kind(as_path(recipe.ckpt)) == "folder":
        check_vision_length(recipe.pack, Config.from_hf(recipe.ckpt))


def check_vision_length(pack: Pack, cfg: Config) -> None:
    """Raises InputError for vision rows that would cut a merged row."""
    unit, length = cfg.vision.merge_unit, pack.vision_length
    if pack.vision_rows and length % unit:
        raise InputError(f"pack.vision_length is {length}, expected a multiple of {unit}")


def check_extras(recipe: Recipe) -> None:
    """Raises InputError for a package of the extras that is not installed."""
    for name in (*_EXTRA, *(["wandb"] if recipe.report.wandb else [])):
        if importlib.util.find_spec(name) is None:
            extra = "wandb" if name == "wandb" else "train"
            why = "report.wandb is set" if name == "wandb" else "training needs it"
            raise InputError(
                f"{name} is not installed and {why}: pip install 'qwen3vl-jax[{extra}]' "
                f"(in a clone: pip install -e '.[{extra}]')"
            )


def check_sources(recipe: Recipe) -> None:
    """Raises InputError where there is nothing to train on, or a source's file is not there."""
    if not recipe.data.sources:
        raise InputError("data.sources is empty, expected [[data.sources]] with a path")
    for table, sources in (("data", recipe.data.sources), ("evaluate", recipe.evaluate.sources)):
        for number, source in enumerate(sources):
            name = f"{table}.sources.{number}"
            if not source.path.startswith(PYTHON) and not kind(as_path(source.path)):
                raise InputError(f"{name}.path is {source.path!r}: no such file")
            if source.media and kind(as_path(source.media)) != "folder":
                raise InputError(f"{name}.media is {source.media!r}: no such folder")
