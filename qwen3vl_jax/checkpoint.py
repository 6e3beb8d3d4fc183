"""Checkpoints: an Orbax directory, a Hugging Face directory, or a Hub id.

An Orbax directory is complete in itself:

    config.json                      as Hugging Face writes it
    tokenizer.json, chat_template.*, preprocessor_config.json, ...
    params/                          the tree of init_params; layers are lists, one array a layer

`orbax.checkpoint.StandardCheckpointer().restore(DIR / "params")` reads it without this package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import matching, readers
from convert.mapping import tree_of
from convert.to_orbax import PARAMS
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.staging import CONFIG, copy_files, staged, write_config
from qwen3vl_jax.tensors import LazyTensor, flatten

if TYPE_CHECKING:
    from qwen3vl_jax.structs import Params

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def load(
    ckpt: str | os.PathLike[str],
    *,
    dtype: Any = None,
    revision: str | None = None,
    expert_layout: str | None = None,
) -> tuple[Params, Config]:
    """(params, cfg) of an Orbax directory, a Hugging Face directory or a Hub id, on the default device.

    Tensors go to the device one by one, as stored or cast to `dtype` there; host memory holds a few at
    a time. A base model without a head gives params without "head" and a warning in the log.
    revision: branch, tag or commit of a Hub id. expert_layout: as `python -m convert` has it.
    Raises InputError for weights that are absent, damaged, incomplete or not those of config.json.
    """
    directory = resolve(ckpt, revision)
    cfg = Config.from_hf(directory)
    if (directory / PARAMS).is_dir():
        return _load_orbax(directory, cfg, dtype), cfg
    if any(directory.glob(f"{PARAMS}.orbax-checkpoint-tmp*")):
        raise InputError(f"{directory}: its Orbax checkpoint was never finished; write it again")
    lazy = matching.open_hf(directory, cfg, expert_layout)
    import jax.numpy as jnp

    # jnp.array copies; device_put would alias the memory map on a CPU, and a file may change.
    leaves = {path: _cast(jnp.array(leaf.load()), dtype) for path, leaf in lazy.items()}
    return tree_of(cfg, leaves), cfg


def _load_orbax(directory: Path, cfg: Config, dtype: Any) -> Params:
    import jax

    from qwen3vl_jax.orbax_io import read_tree, stored_tensors

    stored = stored_tensors(directory / PARAMS)
    matching.check_stored(directory, cfg, stored)
    return read_tree(directory / PARAMS, lambda _, array: _cast(jax.device_put(array), dtype))


def _cast(array: Any, dtype: Any) -> Any:
    array = array if dtype is None else array.astype(dtype)
    return array.block_until_ready()  # or the host copies of many tensors would wait at once


def save_params(
    out: str | os.PathLike[str],
    params: Params,
    config: Config | Mapping[str, Any] | None = None,
    files_from: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> None:
    """Writes an Orbax directory from a parameter tree: complete or not at all.

    config: a Config or a config.json's dict; None takes the config.json of files_from.
    files_from: a checkpoint directory whose tokenizer, template and other files are copied.
    Raises InputError where `out` is in the way (force replaces a checkpoint) or params do not fit.
    """
    import jax

    from qwen3vl_jax.orbax_io import write_tree

    source = None if files_from is None else Path(files_from)
    raw = config.to_hf() if isinstance(config, Config) else config
    described = source if raw is None else raw
    if described is None:
        raise InputError("save_params: no config and no files_from, expected one of them")
    cfg = Config.from_hf(described)

    def lazy_copy(x: Any) -> LazyTensor:
        # Of a copy: a jax.Array keeps the host's side of a transfer for as long as it lives.
        return LazyTensor(tuple(x.shape), np.dtype(x.dtype), lambda: np.asarray(x.copy()))

    lazy = jax.tree.map(lazy_copy, params)
    leaves = dict(flatten(lazy))
    matching.check_stored(Path(out), cfg, leaves)
    names = readers.side_files(source, leave_out=[PARAMS]) if source else []
    with staged(Path(out), force, needs=sum(leaf.nbytes for leaf in leaves.values())) as stage:
        write_tree(stage / PARAMS, lazy)
        if source:
            copy_files(
                source, [name for name in names if raw is None or name != Path(CONFIG)], stage
            )
        if raw is not None:
            write_config(stage, raw)


def resolve(ckpt: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local directory of a checkpoint; a Hub id is fetched into huggingface_hub's cache first.

    Without network (or with HF_HUB_OFFLINE=1) the cache alone is used. Raises InputError for a name
    that is neither, for a repository or revision that does not exist, and for one not in the cache.
    """
    path = Path(ckpt)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{path}: is a directory; a revision ({revision}) is for Hub ids only")
        return path
    if path.exists():
        raise InputError(f"{path}: is a file, expected a checkpoint directory or a Hub id")
    if not _HUB_ID.fullmatch(os.fspath(ckpt)):
        raise InputError(
            f"{path}: no such directory (a Hub id looks like Qwen/Qwen3-VL-2B-Instruct)"
        )
    return _fetch(os.fspath(ckpt), revision)


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = repo if revision is None else f"{repo} at revision {revision}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as e:
        raise InputError(f"{at}: access is gated; accept its terms and log in to the Hub") from e
    except errors.RevisionNotFoundError as e:
        raise InputError(f"{at}: the repository has no such revision") from e
    except errors.RepositoryNotFoundError as e:
        raise InputError(f"{at}: no such directory, and no such repository on the Hub") from e
    except errors.LocalEntryNotFoundError as e:
        raise InputError(
            f"{at}: no such directory; the Hub is out of reach and the cache lacks it, or part of it"
        ) from e
    except Exception as e:  # what its HTTP library raises changes from version to version
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{at}: cannot be fetched from the Hub ({reason})") from e
