"""Hugging Face directory -> Orbax directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from convert.mapping import tree_of
from convert.matching import open_hf
from convert.readers import side_files
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.staging import check_apart, copy_files, staged

PARAMS = "params"  # the Orbax item inside a checkpoint directory
Progress = Callable[[int, int], None]  # (bytes just done, bytes in all)


def to_orbax(
    source: Path,
    out: Path,
    force: bool = False,
    layout: str | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[int, int]:
    """Writes OUT/params (Orbax) and every file of SOURCE that holds no weights; (tensors, bytes).

    One array a layer, in the dtypes of the files, a few tensors in memory at a time. `layout` says how
    fused experts lie where their shape does not tell. Raises InputError before anything is written.
    """
    check_apart(source, out)
    cfg = Config.from_hf(source)
    leaves = open_hf(source, cfg, layout)
    if (source / PARAMS).exists():
        raise InputError(
            f"{source}: holds {PARAMS!r}, which would collide with the Orbax checkpoint"
        )
    total = sum(leaf.nbytes for leaf in leaves.values())
    with staged(out, force, needs=total) as stage:
        from qwen3vl_jax.orbax_io import write_tree

        write_tree(stage / PARAMS, tree_of(cfg, leaves), lambda done: progress(done, total))
        copy_files(source, side_files(source), stage)
    return len(leaves), total
