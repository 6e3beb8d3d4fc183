"""q3.save_params: writes an Orbax directory.

    config.json                      as Hugging Face writes it
    tokenizer.json, chat_template.*, preprocessor_config.json, ...
    params/                          the tree of init_params, one array a layer

`orbax.checkpoint.StandardCheckpointer().restore(DIR / "params")` reads it without this package.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qwen3vl_jax.checkpoint import config_files, device_load, orbax_io, param_paths, validate
from qwen3vl_jax.checkpoint.lazy_tensor import LazyTensor
from qwen3vl_jax.config import TIED, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.storage import atomic_dir, paths, safetensors_files


def save_params(
    out: paths.AnyPath,
    params: Params,
    config: Config | Mapping[str, Any] | None = None,
    files_from: paths.AnyPath | None = None,
    force: bool = False,
) -> None:
    """Writes an Orbax directory from a parameter tree, complete or not at all.

    config: a Config or a config.json's dict (which FP8 weights need); None takes that of files_from, a
    checkpoint directory whose tokenizer, template and other files are copied. Raises InputError if `out`
    exists (force replaces a checkpoint) or params do not fit the config.
    """
    source = None if files_from is None else paths.as_path(files_from)
    raw = config.to_hf() if isinstance(config, Config) else config
    if (described := source if raw is None else raw) is None:
        raise InputError("save_params: got no config and no files_from, expected one of them")
    cfg = Config.from_hf(described)
    described = config_files.read_config(source) if raw is None and source else raw or {}
    if described["text_config"].get(TIED) and "head" not in params:
        # As `Config.from_hf` reads a directory without a head, whatever the key at the top says.
        raw = described = {**described, TIED: True}
        cfg = Config.from_hf(described)

    def lazy_copy(x: Any) -> LazyTensor:
        # A copy, because a jax.Array keeps its host transfer buffer alive.
        return LazyTensor(tuple(x.shape), np.dtype(x.dtype), lambda: np.asarray(x.copy()))

    lazy = jax.tree.map(lazy_copy, device_load.as_dicts(params))
    leaves = dict(param_paths.flatten(lazy))
    if not all(isinstance(leaf, LazyTensor) for leaf in leaves.values()):
        what = "got parameters with an adapter, expected plain ones"
        raise InputError(f"save_params: {what}; save qwen3vl_jax.lora.merge(params)")
    fp8 = validate.check_stored(paths.as_path(out), cfg, leaves, described) is not None
    left_out = [config_files.PARAMS, *([] if raw is None else [atomic_dir.CONFIG])]
    names = safetensors_files.side_files(source, left_out) if source else []
    size = sum(leaf.nbytes for leaf in leaves.values())
    with atomic_dir.atomic_dir(paths.as_path(out), force, needs=size) as stage:
        orbax_io.write_tree(stage / config_files.PARAMS, lazy)
        if source:
            config_files.copy_files(source, stage, fp8, names)
        if raw is not None:
            config_files.write_config(stage, raw, cfg.tie_word_embeddings, fp8)
