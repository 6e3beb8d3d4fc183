"""The files beside a checkpoint's weights: copies, and the config.json of a written checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.config import TIED, Config
from qwen3vl_jax.storage.atomic_dir import CONFIG
from qwen3vl_jax.storage.json_text import read_json_file, write_json
from qwen3vl_jax.storage.paths import copy_file, make_folder
from qwen3vl_jax.storage.safetensors_files import side_files

PARAMS = "params"  # the Orbax item inside a checkpoint directory
QUANTIZATION = "quantization_config"  # a key of config.json or its text_config


def copy_files(
    source: Path, target: Path, fp8: bool = False, names: Iterable[Path] | None = None
) -> None:
    """Copies files beside weights (all, or relative names), config.json (`as_written`) last."""
    names = side_files(source, leave_out=[PARAMS]) if names is None else names
    for name in sorted(names, key=lambda name: (name == Path(CONFIG), name)):
        make_folder((target / name).parent)
        if name == Path(CONFIG):
            raw, tied = read_config(source), Config.from_hf(source).tie_word_embeddings
            if as_written(raw, tied, fp8) != raw:
                write_config(target, raw, tied, fp8)
                continue
        copy_file(source / name, target / name)


def read_config(directory: Path) -> dict[str, Any]:
    """The dict of a directory's config.json."""
    return read_json_file(directory / CONFIG)


def write_config(directory: Path, raw: Mapping[str, Any], tied: bool, fp8: bool = False) -> None:
    """Writes the config.json of `as_written`."""
    text = write_json(as_written(raw, tied, fp8), CONFIG, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def as_written(raw: Mapping[str, Any], tied: bool, fp8: bool = False) -> dict[str, Any]:
    """A config.json's dict for a written checkpoint; quantization_config stays only for kept FP8."""
    left = dict(raw)
    if isinstance(text := left.get("text_config"), Mapping):
        left["text_config"] = dict(text)
    # transformers 5 reads tie_word_embeddings at the top, transformers 4 in text_config.
    for part in (left, left.get("text_config", {})):
        if not fp8:
            part.pop(QUANTIZATION, None)
        if part.get(TIED, False) is not tied:
            part[TIED] = tied
    return left
