"""Hugging Face directory -> Orbax directory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from convert.int8 import quantised
from convert.mapping import tree_of
from convert.matching import open_hf
from convert.merging import merged
from convert.peft import load_adapter
from convert.readers import side_files
from qwen3vl_jax.cli import signals_later
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.paths import for_orbax
from qwen3vl_jax.staging import check_apart, copy_files, staged
from qwen3vl_jax.tensors import LazyTensor, TreePath, subtree

log = logging.getLogger("qwen3vl_jax")
PARAMS = "params"  # the Orbax item inside a checkpoint directory
Progress = Callable[[int, int], None]  # (bytes just done, bytes in all)


def to_orbax(
    source: Path,
    out: Path,
    force: bool = False,
    layout: str | None = None,
    progress: Progress = lambda done, total: None,
    weights: str | None = None,
    adapter: Path | None = None,
) -> tuple[int, int]:
    """Writes OUT/params (Orbax) and every file of SOURCE that holds no weights; (tensors, bytes).

    One array a layer, in the dtypes of the files, a few tensors in memory at a time. `layout` says how
    fused experts lie where their shape does not tell. weights: None dequantises FP8 to bf16, "fp8"
    keeps it, "int8" rounds as convert/int8.py says and logs by how much logits change.
    adapter: a PEFT directory that is added to the weights (before int8 rounds them).
    Raises InputError before anything is written.
    """
    check_apart(source, out)
    for_orbax(out)
    cfg = Config.from_hf(source)
    as_stored = leaves = open_hf(source, cfg, layout, weights)
    if adapter is not None:
        as_stored = leaves = merged(cfg, leaves, *load_adapter(adapter, cfg))
    if weights == "int8":
        leaves = quantised(cfg, as_stored)
    if (source / PARAMS).exists():
        raise InputError(
            f"{source}: holds {PARAMS!r}, which would collide with the Orbax checkpoint"
        )
    total = sum(leaf.nbytes for leaf in leaves.values())
    with staged(out, force, needs=total) as stage:
        with signals_later():
            from qwen3vl_jax.orbax_io import write_tree

        write_tree(stage / PARAMS, tree_of(cfg, leaves), lambda done: progress(done, total))
        copy_files(source, side_files(source), stage, fp8=weights == "fp8")
    if weights == "int8":
        _log_error(out, cfg, as_stored)
    return len(leaves), total


def _log_error(out: Path, cfg: Config, original: dict[TreePath, LazyTensor]) -> None:
    """Says in the log how far the logits of what was written are from the original's."""
    from qwen3vl_jax.logit_error import logit_error
    from qwen3vl_jax.orbax_io import read_part

    written = functools.partial(read_part, out / PARAMS)
    error = logit_error(cfg, functools.partial(subtree, original), written)
    log.warning("%s: int8: %s", out, error)
