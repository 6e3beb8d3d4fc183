"""q3.load: the weights of any checkpoint, a run of train.py among them, on a device or a mesh."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.adapter_map import Adapter
from qwen3vl_jax.checkpoint.adapters import attach
from qwen3vl_jax.checkpoint.device_load import Source, load_params, put_pairs
from qwen3vl_jax.checkpoint.peft_io import load_adapter
from qwen3vl_jax.config import Config, is_run
from qwen3vl_jax.device_mesh import ambient_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.training.run_params import run_adapter, run_leaves

log = logging.getLogger("qwen3vl_jax")


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

    A directory may be remote (storage/paths.py): of its files, no more than the tensors' bytes are fetched.
    mesh: None is that of `jax.set_mesh`, and without one the default device. Each parameter is read
    straight into its shards, as sharding.RULES cut it; a process reads what its devices hold, and its
    memory never more than that and one tensor. Compute in `jax.set_mesh(mesh)`.
    Tensors go to the device one by one, as stored or cast to `dtype` there; host memory holds a few at
    a time. A base model without a head gives params without "head" and a warning in the log.
    weights: None dequantises the FP8 of Hugging Face files to bf16 and takes an Orbax directory as it
    is; "fp8" keeps the codes and scales of an FP8 checkpoint; "int8" rounds the decoder's matrices
    (checkpoint/int8.py says which). `dtype` is that of everything
    else and of the computation. Each such weight is a `quantized.Quantized`.
    revision: branch, tag or commit of a Hub id. expert_layout: as `python -m convert` has it.
    The directory of a run of train.py gives the weights of its best step, or its last (a LoRA run's
    merged).
    adapter: directory or Hub id of a PEFT adapter, or a LoRA run's directory, whose matrices stay
    beside the weights they adapt (`lora.Adapted`), so that nothing is rounded and 8-bit weights stay
    so; `qwen3vl_jax.lora.merge` adds them up.
    Raises InputError for weights that are absent, damaged, incomplete, not those of config.json, or
    not to be had in the form asked for, for an adapter that does not fit, and for an axis of the mesh
    that does not divide the parameters.
    """
    dtype, mesh = _floating(dtype), ambient_mesh() if mesh is None else mesh
    directory = resolve(ckpt, revision)
    cfg = Config.from_hf(directory)
    beside = None if adapter is None else _adapter(resolve(adapter), cfg)
    params = load_params(source_of(directory, cfg, weights, expert_layout), mesh, dtype)
    if beside is not None:
        matrices, settings = beside
        params = attach(params, cfg, put_pairs(matrices, mesh, dtype), settings)
    return params, cfg


def source_of(
    directory: Path, cfg: Config, weights: str | None = None, expert_layout: str | None = None
) -> Source:
    """A checkpoint's directory, or a run's, and the form that is asked of its weights."""
    leaves = None
    if is_run(directory):
        leaves, which = run_leaves(directory, cfg)
        log.warning("%s: %s", directory, which)
    return Source(directory, cfg, weights, expert_layout, leaves)


def _adapter(directory: Path, cfg: Config) -> tuple[dict[str, np.ndarray], Adapter]:
    return (run_adapter if is_run(directory) else load_adapter)(directory, cfg)


def _floating(dtype: Any) -> Any:
    """A dtype that weights can be cast to, as JAX has it, or None; raises InputError."""
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
