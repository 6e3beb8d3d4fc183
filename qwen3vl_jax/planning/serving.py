"""The programs of inference as shapes on a mesh: prefill of a prompt, and one decode step of all rows."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.device_load import as_structs, path_shardings
from qwen3vl_jax.checkpoint.int8 import int8_params
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, TreePath
from qwen3vl_jax.checkpoint.name_map import param_specs, tree_of
from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.decode_loop import insert_rows
from qwen3vl_jax.model.cache import decode_step, init_cache, prefill
from qwen3vl_jax.model.sharding import array_sharding, replicated
from qwen3vl_jax.model.structs import Batch, KVCache, VisionInputs
from qwen3vl_jax.planning.program import Program, Work
from qwen3vl_jax.processing.batch import group_size
from qwen3vl_jax.training.reporting.flops import Counts, forward_flops
from qwen3vl_jax.training.reporting.memory_estimate import held_bytes

_BLOCK, _BESIDE_FP8 = (128, 128), (("embed",), ("head",))  # of the released FP8 files
PICTURE = 4096  # patches of the picture in a prompt: one of 1024 x 1024 pixels


class Serving(NamedTuple):
    """What is asked of a model: rows answered at a time, tokens of prompt and answer together."""

    rows: int
    slots: int
    chunk: int | None
    dtype: Any = jnp.bfloat16
    weights: str | None = None  # int8 or fp8, as `load` has it


def decoding(cfg: Config, mesh: Mesh, asked: Serving) -> Program:
    """One decode step onto a full cache, which is donated. Raises InputError."""
    params, cache = weights(cfg, mesh, asked.dtype, asked.weights), empty_cache(cfg, mesh, asked)
    tokens = _replicated_shape(mesh, jnp.int32, asked.rows)
    # The vision tower, which no decode step reads, lies there too.
    fn = jax.jit(functools.partial(_decode, cfg=cfg), donate_argnums=1, keep_unused=True)
    # A token sees the whole cache at worst.
    flops = _flops(cfg, Counts(asked.rows, asked.rows * asked.slots, 0, 0))
    work = Work("time of a decode step", flops, flops, asked.rows, "of all rows, cache full")
    held = held_bytes({"weights": params, "cache": (cache.k, cache.v)})
    return Program(fn, (params, cache, tokens), mesh, held, work, "the step itself")


def _decode(params, cache, tokens, *, cfg):
    return decode_step(params, cfg, cache, tokens)


def prefilling(cfg: Config, mesh: Mesh, asked: Serving) -> Program:
    """A group of prompts as wide as the cache put into it, a picture in each; the cache is donated.

    The most that `serve` holds: the cache of all rows, and beside it the prompts it takes in together.
    Raises InputError.
    """
    params, cache = weights(cfg, mesh, asked.dtype, asked.weights), empty_cache(cfg, mesh, asked)
    width, count = asked.slots, group_size(asked.rows)
    patches = min(PICTURE, cfg.vision.merge_unit * width)
    batch = _prompts(cfg, mesh, count, width, patches)
    chunk = None if asked.chunk is None or asked.chunk >= width else asked.chunk

    def run(params, cache, batch, rows):
        new, logits = prefill(params, cfg, batch, width, chunk=chunk)
        return insert_rows(cache, rows, new), logits

    passed = Counts(count * width, count * (width * (width + 1) // 2), count * patches,
                    count * patches**2)  # fmt: skip
    flops = _flops(cfg, passed, head=count)
    note = f"{count} prompt{'s' * (count > 1)}, {patches} patches in each"
    work = Work("time of a prefill", flops, flops, count * width, note)
    held = held_bytes({"weights": params, "cache": (cache.k, cache.v), "prompts": batch})
    args = params, cache, batch, _replicated_shape(mesh, jnp.int32, count)
    fn = jax.jit(run, donate_argnums=1, keep_unused=True)
    return Program(fn, args, mesh, held, work, "prompts' cache, activations")


def _flops(cfg: Config, passed: Counts, head: int | None = None) -> float:
    """FLOPs of a forward pass, of which `head` tokens (None: all) get logits."""
    parts = forward_flops(cfg, passed)
    if head is not None:
        parts["head"] *= head / passed.tokens
    return sum(parts.values())


def weights(cfg: Config, mesh: Mesh, dtype: Any, kind: str | None = None) -> Any:
    """Parameters as per-layer lists of shapes, each with its sharding; kind: int8, fp8 or None.

    Raises InputError.
    """
    leaves = held_arrays(cfg, dtype, kind)
    where = path_shardings(mesh, cfg, leaves)
    put = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[path])
        for path, x in leaves.items()
    }
    return as_structs(tree_of(cfg, put))


def held_arrays(cfg: Config, dtype: Any, kind: str | None) -> dict[TreePath, jax.ShapeDtypeStruct]:
    """What `load` holds of a model, by path: of 8-bit weights the codes and the scales."""
    out: dict[TreePath, jax.ShapeDtypeStruct] = {}
    eight = int8_params(cfg) if kind else {}
    code = jnp.int8 if kind == "int8" else jnp.float8_e4m3fn
    for row in param_specs(cfg):
        if row.path not in eight or (kind == "fp8" and row.path in _BESIDE_FP8):
            out[row.path] = jax.ShapeDtypeStruct(row.shape, dtype)
        else:
            scales = row.channels if kind == "int8" else row.scale_shape(_BLOCK)
            out[*row.path, VALUES] = jax.ShapeDtypeStruct(row.shape, code)
            out[*row.path, SCALE] = jax.ShapeDtypeStruct(scales, jnp.float32)
    return out


def empty_cache(cfg: Config, mesh: Mesh, asked: Serving) -> KVCache:
    """A cache as shapes, laid out as every function of cache.py leaves it."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_cache(cfg, asked.rows, asked.slots, asked.dtype))

    def put(x: Any) -> Any:
        axes = ("batch", "kv_heads", None, None) if len(x.shape) == 4 else (None,)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=array_sharding(mesh, axes, x))

    return jax.tree.map(put, shapes)


def _prompts(cfg: Config, mesh: Mesh, count: int, width: int, patches: int) -> Batch:
    """Rows of tokens, a picture of so many patches in each."""
    of, seen = functools.partial(_replicated_shape, mesh), count * patches
    vision = VisionInputs(
        of(jnp.float32, seen, math.prod(cfg.vision.patch_shape)), of(jnp.int32, seen, 4),
        of(jnp.float32, seen, 4), of(jnp.int32, seen, 2), of(jnp.int32, seen), of(jnp.int32, seen),
    )  # fmt: skip
    row = functools.partial(of, jnp.int32)
    return Batch(
        row(count, width),
        row(3, count, width),
        row(count, width),
        row(count, width),
        row(count),
        vision,
    )


def _replicated_shape(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))
