"""Checkpoints: an Orbax directory, a Hugging Face directory, or a Hub id.

An Orbax directory is complete in itself:

    config.json                      as Hugging Face writes it
    tokenizer.json, chat_template.*, preprocessor_config.json, ...
    params/                          the tree of init_params; layers are lists, one array a layer

`orbax.checkpoint.StandardCheckpointer().restore(DIR / "params")` reads it without this package.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import peft, readers
from convert.run_dir import is_run, run_adapter
from convert.stored import check_stored
from convert.to_orbax import PARAMS
from qwen3vl_jax.config import TIED, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.paths import as_path, is_remote, kind
from qwen3vl_jax.staging import CONFIG, copy_files, read_config, staged, write_config
from qwen3vl_jax.tensors import LazyTensor, flatten

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen3vl_jax.structs import Params

log = logging.getLogger("qwen3vl_jax")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def load(
    ckpt: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    weights: str | None = None,
    revision: str | None = None,
    expert_layout: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[Params, Config]:
    """(params, cfg) of an Orbax directory, a Hugging Face directory or a Hub id, on a device or a mesh.

    A directory may be remote (paths.py): of its files, no more than the tensors' bytes are fetched.
    mesh: None is that of `jax.set_mesh`, and without one the default device. Each parameter is read
    straight into its shards, as sharding.RULES cut it; a process reads what its devices hold, and its
    memory never more than that and one tensor. Compute in `jax.set_mesh(mesh)`.
    Tensors go to the device one by one, as stored or cast to `dtype` there; host memory holds a few at
    a time. A base model without a head gives params without "head" and a warning in the log.
    weights: None dequantises the FP8 of Hugging Face files to bf16 and takes an Orbax directory as it
    is; "fp8" keeps the codes and scales of an FP8 checkpoint; "int8" rounds the decoder's matrices
    (convert/int8.py says which) and logs by how much logits change. `dtype` is that of everything
    else and of the computation. Each such weight is a `quantized.Quantized`.
    revision: branch, tag or commit of a Hub id. expert_layout: as `python -m convert` has it.
    The directory of a run of train.py gives the weights of its best step, or its last (a LoRA run's
    merged).
    adapter: directory or Hub id of a PEFT adapter, or a LoRA run's directory, whose matrices stay
    beside the weights they adapt (`lora.Adapted`), so that nothing is rounded and 8-bit weights stay
    so; `lora.merge` adds them up.
    Raises InputError for weights that are absent, damaged, incomplete, not those of config.json, or
    not to be had in the form asked for, for an adapter that does not fit, and for an axis of the mesh
    that does not divide the parameters.
    """
    from qwen3vl_jax import loading
    from qwen3vl_jax.sharding import ambient_mesh

    dtype, mesh = _floating(dtype), ambient_mesh() if mesh is None else mesh
    directory = resolve(ckpt, revision)
    cfg = Config.from_hf(directory)
    beside = None if adapter is None else _adapter(resolve(adapter), cfg)
    params = loading.load_params(
        loading.Source(directory, cfg, weights, expert_layout), mesh, dtype
    )
    if beside is not None:
        from qwen3vl_jax.lora import attach

        matrices, settings = beside
        params = attach(params, cfg, loading.put_pairs(matrices, mesh, dtype), settings)
    return params, cfg


def _adapter(directory: Path, cfg: Config) -> tuple[dict[str, np.ndarray], peft.Adapter]:
    run = is_run(directory)
    return run_adapter(directory, cfg) if run else peft.load_adapter(directory, cfg)


def _floating(dtype: Any) -> Any:
    """A dtype that weights can be cast to, as JAX has it, or None; raises InputError."""
    import jax.numpy as jnp

    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        raise InputError(
            f"load: dtype is {dtype!r}, expected float32, bfloat16 or float16 (8 bits are weights=)"
        )
    return found


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
    FP8 weights need a config with their quantization_config: a Config has none.
    Raises InputError where `out` is in the way (force replaces a checkpoint) or params do not fit.
    """
    import jax

    from qwen3vl_jax.orbax_io import write_tree
    from qwen3vl_jax.quantized import as_dicts

    source = None if files_from is None else as_path(files_from)
    raw = config.to_hf() if isinstance(config, Config) else config
    described = source if raw is None else raw
    if described is None:
        raise InputError("save_params: no config and no files_from, expected one of them")
    cfg = Config.from_hf(described)
    told = read_config(source) if raw is None and source else raw or {}
    if told["text_config"].get(TIED) and "head" not in params:
        # As `Config.from_hf` reads a directory without a head; the key at the top may say otherwise.
        raw = told = {**told, TIED: True}
        cfg = Config.from_hf(told)

    def lazy_copy(x: Any) -> LazyTensor:
        # Of a copy: a jax.Array keeps the host's side of a transfer for as long as it lives.
        return LazyTensor(tuple(x.shape), np.dtype(x.dtype), lambda: np.asarray(x.copy()))

    lazy = jax.tree.map(lazy_copy, as_dicts(params))
    leaves = dict(flatten(lazy))
    if not all(isinstance(leaf, LazyTensor) for leaf in leaves.values()):
        raise InputError("save_params: the parameters hold an adapter; save lora.merge(params)")
    fp8 = check_stored(as_path(out), cfg, leaves, told) is not None
    names = readers.side_files(source, leave_out=[PARAMS]) if source else []
    with staged(as_path(out), force, needs=sum(leaf.nbytes for leaf in leaves.values())) as stage:
        write_tree(stage / PARAMS, lazy)
        if source:
            kept = [name for name in names if raw is None or name != Path(CONFIG)]
            copy_files(source, kept, stage, fp8)
        if raw is not None:
            write_config(stage, raw, cfg.tie_word_embeddings, fp8)


def resolve(ckpt: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a checkpoint; a Hub id is fetched into huggingface_hub's cache first.

    Without network (or with HF_HUB_OFFLINE=1) the cache alone is used. Raises InputError for a name
    that is neither, for a repository or revision that does not exist, and for one not in the cache.
    """
    found = local_directory(ckpt, revision)
    return _fetch(os.fspath(ckpt), revision) if found is None else found


def local_directory(ckpt: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """The directory of a checkpoint that is one; None for what can be a Hub id. Raises InputError."""
    path = as_path(ckpt)
    found = kind(path)
    if found == "folder":
        if revision is not None:
            raise InputError(f"{path}: is a directory; a revision ({revision}) is for Hub ids only")
        return path
    if found:
        raise InputError(f"{path}: is a file, expected a checkpoint directory or a Hub id")
    if is_remote(path) or not _HUB_ID.fullmatch(os.fspath(ckpt)):
        raise InputError(
            f"{path}: no such directory (a Hub id looks like Qwen/Qwen3-VL-2B-Instruct)"
        )
    return None


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = repo if revision is None else f"{repo} at revision {revision}"
    try:
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
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
    if not any(found.glob("*.safetensors")):
        readers.refuse_pickles(at, _hub_names(repo, found.name))
    return found


def _hub_names(repo: str, commit: str) -> list[str]:
    """The files of a commit on the Hub; none where it is out of reach."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repo, revision=commit)
    except Exception:  # what its HTTP library raises changes from version to version
        return []
