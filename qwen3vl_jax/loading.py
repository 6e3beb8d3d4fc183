"""q3.load: the weights of any checkpoint or training run, on a device or a mesh."""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.adapters import attach
from qwen3vl_jax.checkpoint.device_load import Source, load_params, put_pairs
from qwen3vl_jax.checkpoint.lazy_tensor import Leaves
from qwen3vl_jax.checkpoint.peft_io import load_adapter
from qwen3vl_jax.config import Config, is_run
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
    """(params, cfg) of a checkpoint, on a device or a mesh; not to be called inside jit.

    ckpt: an Orbax directory, a Hugging Face directory, a Hub id, or a RUN_DIR of train.py, which gives
    the weights of its best step or its last (LoRA merged). A directory may be remote (gs://..).
    mesh: None is that of `jax.set_mesh`, or the default device without one. Each parameter is read
    straight into its shards; host memory holds a few tensors at a time. Compute in `jax.set_mesh(mesh)`.
    dtype: tensors are cast to it on the device; None keeps the stored dtypes.
    weights: None dequantizes FP8 of Hugging Face files to bf16 and takes an Orbax directory as it is;
    "fp8" keeps the values and scales of an FP8 checkpoint; "int8" rounds the decoder's matrices, "int4"
    those of its layers to 4 bits in groups of 64, for memory: its products are slower. Each such weight
    is a `Quantized`, and `dtype` applies to everything else and to the computation.
    revision: branch, tag or commit of a Hub id. expert_layout: as in `python -m convert`.
    adapter: directory or Hub id of a PEFT adapter, or a LoRA run's directory. Its matrices stay beside
    the weights (`Adapted`), so nothing is rounded; `qwen3vl_jax.lora.merge` merges them.
    A base model without a head gives params without "head" and a warning in the log.
    Raises InputError for weights that are absent, damaged, incomplete, not those of config.json, or
    not available in the wanted form, for an adapter that does not fit, and for an axis of the mesh that
    does not divide the parameters.
    """
    if dtype is not None:
        dtype = _floating(dtype)
    if mesh is None and not (ambient := jax.sharding.get_mesh()).empty:
        mesh = ambient
    directory = resolve(ckpt, revision)
    cfg = Config.from_hf(directory)
    found = None
    # Read first: a wrong one costs no wait.
    if adapter is not None:
        path = resolve(adapter)
        found = (run_adapter if is_run(path) else load_adapter)(path, cfg)
    params = load_params(source_of(directory, cfg, weights, expert_layout), mesh, dtype)
    if found is not None:
        matrices, settings = found
        params = attach(params, cfg, put_pairs(matrices, mesh, dtype), settings)
    return params, cfg


def source_of(
    directory: Path, cfg: Config, weights: str | None = None, expert_layout: str | None = None
) -> Source:
    """The Source of a checkpoint's or a run's directory; a run is read when its leaves are asked for."""

    def read_run() -> Leaves:
        leaves, which = run_leaves(directory, cfg)
        log.warning("%s: %s", directory, which)
        return leaves

    return Source(directory, cfg, weights, expert_layout, read_run if is_run(directory) else None)


def _floating(dtype: Any) -> Any:
    """A dtype of weights as JAX has it. Raises InputError for others."""
    with contextlib.suppress(TypeError):
        if (found := jnp.dtype(dtype)) in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
            return found
    expected = "float32, bfloat16 or float16 (8 bits are weights=)"
    raise InputError(f"dtype: got {dtype!r}, expected {expected}")
