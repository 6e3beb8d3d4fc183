"""Hugging Face directory -> Orbax directory."""

from pathlib import Path

from qwen3vl_jax.checkpoint import adapters, hf_reader, peft_io, quantize
from qwen3vl_jax.checkpoint.config_files import PARAMS, copy_files
from qwen3vl_jax.checkpoint.name_map import tree_of
from qwen3vl_jax.checkpoint.orbax_io import write_tree
from qwen3vl_jax.config import Config
from qwen3vl_jax.convert import Progress
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage import atomic_dir, paths


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
    atomic_dir.check_apart(source, out)
    paths.for_orbax(out)
    cfg = Config.from_hf(source)
    as_stored = leaves = hf_reader.open_hf(source, cfg, layout, weights)
    if adapter is not None:
        as_stored = leaves = adapters.merged(cfg, leaves, *peft_io.load_adapter(adapter, cfg))
    if weights in quantize.CODES:
        leaves = quantize.quantize_leaves(cfg, as_stored, weights)
    if (source / PARAMS).exists():
        raise InputError(f"{source}: holds {PARAMS!r}, where the Orbax checkpoint would be")
    total = sum(leaf.nbytes for leaf in leaves.values())
    with atomic_dir.atomic_dir(out, force, needs=total) as stage:
        write_tree(stage / PARAMS, tree_of(cfg, leaves), lambda done: progress(done, total))
        copy_files(source, stage, fp8=weights == "fp8")
    return len(leaves), total
