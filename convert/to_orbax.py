"""Hugging Face directory -> Orbax directory."""

from pathlib import Path

from convert import Progress
from qwen3vl_jax.checkpoint.adapters import merged
from qwen3vl_jax.checkpoint.config_files import PARAMS, copy_files
from qwen3vl_jax.checkpoint.hf_reader import open_hf
from qwen3vl_jax.checkpoint.name_map import tree_of
from qwen3vl_jax.checkpoint.orbax_io import write_tree
from qwen3vl_jax.checkpoint.peft_io import load_adapter
from qwen3vl_jax.checkpoint.quantize import CODES, quantize_leaves
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.atomic_dir import atomic_dir, check_apart
from qwen3vl_jax.storage.paths import for_orbax
from qwen3vl_jax.storage.safetensors_files import side_files


def to_orbax(
    source: Path,
    out: Path,
    force: bool = False,
    layout: str | None = None,
    progress: Progress = lambda done, total: None,
    weights: str | None = None,
    adapter: Path | None = None,
) -> tuple[int, int]:
    """Writes OUT/params (Orbax) and every file of SOURCE without weights; (tensors, bytes).

    layout: of fused experts where their shape is ambiguous. weights: None dequantizes FP8 to bf16, "fp8"
    keeps it, "int8" rounds the decoder's matrices. adapter: a PEFT directory, merged before rounding.
    Raises InputError before anything is written.
    """
    check_apart(source, out)
    for_orbax(out)
    cfg = Config.from_hf(source)
    as_stored = leaves = open_hf(source, cfg, layout, weights)
    if adapter is not None:
        as_stored = leaves = merged(cfg, leaves, *load_adapter(adapter, cfg))
    if weights in CODES:
        leaves = quantize_leaves(cfg, as_stored, weights)
    if (source / PARAMS).exists():
        raise InputError(f"{source}: holds {PARAMS!r}, where the Orbax checkpoint would be")
    total = sum(leaf.nbytes for leaf in leaves.values())
    with atomic_dir(out, force, needs=total) as stage:
        write_tree(stage / PARAMS, tree_of(cfg, leaves), lambda done: progress(done, total))
        copy_files(source, side_files(source), stage, fp8=weights == "fp8")
    return len(leaves), total
