"""Programs as shapes with shardings, to be compiled and never run. Dims as in layers.py.

Of a run its step; of inference the prefill of a group of prompts, and one decode step of all rows.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.device_load import as_structs, path_shardings, placement
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, TreePath
from qwen3vl_jax.checkpoint.name_map import param_specs, tree_of
from qwen3vl_jax.checkpoint.quantize import CODES, kind_of, quantized_params, scale_shape
from qwen3vl_jax.config import SIZE, Config
from qwen3vl_jax.device_mesh import array_sharding, layout_mesh, replicated
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.decode_loop import decode_steps, first_token, insert_rows
from qwen3vl_jax.inference.requests import GenerationOptions
from qwen3vl_jax.model.cache import KV_AXES, init_cache, prefill
from qwen3vl_jax.model.sharding import max_parts, platform
from qwen3vl_jax.model.structs import FEW, Batch, KVCache, VisionInputs
from qwen3vl_jax.processing.batch import group_size
from qwen3vl_jax.storage.paths import as_path, kind
from qwen3vl_jax.training import state_sharding, train_model
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.recipe import Recipe, check_vision_length
from qwen3vl_jax.training.reporting import flops, memory_estimate
from qwen3vl_jax.training.state_sharding import with_shardings


class Work(NamedTuple):
    """What one run of a program does, counted from shapes."""

    name: str  # of the time that it takes
    model: float  # FLOPs of all devices, nothing twice
    again: float  # with what is computed a second time
    tokens: int
    note: str  # which tokens
    steps: int = 0  # of the whole run; 0 where there is no such thing
    loops: int = 0  # of unknown length, of which one round is counted


class Program(NamedTuple):
    """A jitted function and its arguments for one mesh: shapes, dtypes and shardings."""

    fn: Any
    args: tuple[Any, ...]
    mesh: Mesh
    held: dict[str, int]  # bytes that a device holds before the program runs, by part
    work: Work
    inside: str  # what the program's own memory is for
    gradients: int = 0  # bytes of a device


def config_of(ckpt: str) -> Config:
    """The config of a directory, else that released under the size in its name. Raises InputError."""
    if kind(as_path(ckpt)) == "folder":
        return Config.from_hf(ckpt)
    if size := SIZE.search(ckpt):
        return Config.named(size[0])
    sizes = "its name holds none of the released sizes (as 8b)"
    raise InputError(f"{ckpt}: no such directory, and {sizes}")


def check_batch(recipe: Recipe, cfg: Config, sizes: Mapping[str, int]) -> None:
    """Raises InputError for a batch or model that a mesh of these sizes does not divide."""
    state_sharding.check_mesh(layout_mesh(sizes), cfg, train_model.shapes(cfg))
    check_vision_length(recipe.pack, cfg)
    pack, rows, groups = recipe.pack, max_parts("batch", sizes), groups_of(recipe, sizes)
    counts = {"groups": groups, "rows": pack.rows, "vision_rows": pack.vision_rows}
    for name, count in counts.items():
        if count % (parts := rows if name == "groups" else groups):
            why = "data x fsdp x expert of the mesh, over which rows are spread"
            why = why if parts == rows else "pack.groups, into which rows are cut"
            raise InputError(f"pack.{name} is {count}, expected a multiple of {parts}: {why}")
    divided = {
        "sequence": ("pack.length", pack.length),
        "tensor": ("the attention heads", cfg.text.num_attention_heads),
        "expert": ("the experts", cfg.text.num_experts),
    }
    for axis, (name, count) in divided.items():
        size = sizes.get(axis, 1)
        if count % size or (not count and size > 1):
            raise InputError(f"mesh.{axis} is {size}, which does not divide {name} ({count})")


def groups_of(recipe: Recipe, sizes: Mapping[str, int]) -> int:
    """Into how many groups of their own samples a new run of this recipe cuts its rows."""
    return recipe.pack.groups or max_parts("batch", sizes)


def training_step(recipe: Recipe, cfg: Config, mesh: Mesh) -> Program:
    """The step that a run of this recipe takes on a mesh. Raises InputError."""
    sizes = dict(mesh.shape)
    check_batch(recipe, cfg, sizes)
    parts = memory_estimate.held(recipe, cfg)
    optimizer = train_model.build_optimizer(recipe, cfg, parts.weights)
    held = memory_estimate.on_mesh(recipe, cfg, parts, mesh)
    # They are the program's own.
    gradients = memory_estimate.held_bytes({"": held.pop(memory_estimate.GRADIENTS)})
    state = state_sharding.state_shardings(mesh, cfg, parts.state)
    state = with_shardings(parts.state, state)
    packed = packed_batch(recipe, cfg, groups_of(recipe, sizes))
    packed = with_shardings(packed, state_sharding.batch_shardings(mesh, packed))
    step = train_model.make_step(recipe, cfg, optimizer, parts.merge, state, keep_unused=True)
    args, work = (state, held["frozen weights"], packed), work_of(recipe, cfg, parts.weights)
    inside = f"gradients, activations (remat {recipe.step.remat})"
    sizes = memory_estimate.held_bytes(held | {"batch": packed})
    return Program(step, args, mesh, sizes, work, inside, gradients.get("", 0))


def work_of(recipe: Recipe, cfg: Config, weights: Mapping[str, Any]) -> Work:
    """The arithmetic of a step whose rows are all full, one sample a row."""
    how, work = flops.trained_parts(recipe, cfg, dict(weights)), flops.full_work(recipe)
    model = flops.step_flops(cfg, work, **how)
    again = flops.step_flops(cfg, work, **how, remat=recipe.step.remat)
    note = "places of the packed rows, filled or not"
    return Work("step time", model, again, work.tokens, note, recipe.steps)


def packed_batch(recipe: Recipe, cfg: Config, groups: int) -> PackedBatch:
    """The micro batches [M ..] of a step, as shapes; pixels are bytes, as a run sends them."""
    pack, c, many = recipe.pack, cfg.vision, recipe.step.accumulate

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((many, *shape), dtype)

    ints, floats = jnp.int32, jnp.float32
    rows = (pack.rows, pack.length)
    # As a run on a GPU has them, if a row holds few samples and images.
    most = FEW if platform() == "gpu" else 0
    vision = vision_rows = named = None
    if pack.vision_rows:
        seen = (pack.vision_rows, pack.vision_length)
        pixels = of(jnp.uint8, *seen, math.prod(c.patch_shape))
        tables = of(ints, *seen, 4), of(floats, *seen, 4), of(ints, *seen, 2)
        vision = VisionInputs(pixels, *tables, of(ints, *seen), of(ints, *seen), most)
        vision_rows = of(ints, *rows)
        if recipe.step.vision_labels:
            named = of(ints, math.prod(seen) // c.merge_unit)
    ids, positions, delta = of(ints, *rows), of(ints, 3, *rows), of(ints, pack.rows)
    fields = ids, positions, ids, vision_rows, delta, vision, ids
    batch = Batch(*fields, groups=groups, segments=most)
    return PackedBatch(batch, of(floats, *rows), named)


_BLOCK, _BESIDE_FP8 = (128, 128), (("embed",), ("head",))  # of the released FP8 files
IMAGE = 4096  # patches of the image in a prompt: one of 1024 x 1024 pixels


class Serving(NamedTuple):
    """What is asked of a model: rows answered at a time, tokens of prompt and answer together."""

    rows: int
    slots: int
    chunk: int | None
    dtype: Any = jnp.bfloat16
    weights: str | None = None  # int8, int4 or fp8, as `load` has it


def decoding(cfg: Config, mesh: Mesh, asked: Serving) -> Program:
    """The loop of decode steps that inference dispatches, the donated cache full. Raises InputError."""
    params, cache = weights(cfg, mesh, asked.dtype, asked.weights), empty_cache(cfg, mesh, asked)
    shape = functools.partial(_replicated_shape, mesh)
    options = GenerationOptions(asked.slots).of_rows(cfg, asked.rows)
    options = jax.tree.map(lambda x: shape(x.dtype, *x.shape), options)
    # What the loop takes, as every dispatch leaves it.
    logits = shape(jnp.float32, asked.rows, cfg.text.vocab_size)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(first_token, cache, logits, shape(jnp.int32, asked.rows, 1), options)
    state = _laid_out(mesh, state.replace(cache=None), 2, ("batch", None)).replace(cache=cache)

    def run(params, state, ended, options, steps, enough):
        return decode_steps(params, cfg, state, ended, options, steps, enough)

    # The vision tower, which no decode step reads, lies there too.
    fn = jax.jit(run, donate_argnums=1, keep_unused=True)
    ended, number = shape(jnp.bool_, asked.rows), shape(jnp.int32)
    # A token sees the whole cache at worst.
    counts = flops.Counts(asked.rows, asked.rows * asked.slots, 0, 0)
    total = sum(flops.forward_flops(cfg, counts).values())
    note = "of all rows, cache full"
    work = Work("time of a decode step", total, total, asked.rows, note, loops=1)
    held = memory_estimate.held_bytes({"weights": params, "cache": (cache.k, cache.v)})
    args = params, state, ended, options, number, number
    return Program(fn, args, mesh, held, work, "the loop of steps itself")


def prefilling(cfg: Config, mesh: Mesh, asked: Serving) -> Program:
    """A group of prompts as wide as the cache put into it, an image in each. Raises InputError.

    The most that `serve` holds: the donated cache of all rows, and beside it the prompts it takes in.
    """
    params, cache = weights(cfg, mesh, asked.dtype, asked.weights), empty_cache(cfg, mesh, asked)
    width, count = asked.slots, group_size(asked.rows)
    patches = min(IMAGE, cfg.vision.merge_unit * width)
    shape = functools.partial(_replicated_shape, mesh)
    ints, floats = functools.partial(shape, jnp.int32), functools.partial(shape, jnp.float32)
    seen, row, of_rows = count * patches, ints(count, width), ints(count)
    tables = ints(seen, 4), floats(seen, 4), ints(seen, 2)
    pixels = floats(seen, math.prod(cfg.vision.patch_shape))
    vision = VisionInputs(pixels, *tables, ints(seen), ints(seen))
    batch = Batch(row, ints(3, count, width), row, row, of_rows, vision)
    chunk = None if asked.chunk is None or asked.chunk >= width else asked.chunk

    def run(params, cache, batch, rows):
        new, logits = prefill(params, cfg, batch, width, chunk=chunk)
        source = jnp.stack([jnp.arange(count), jnp.zeros(count, jnp.int32)], axis=1)
        return insert_rows(cache, rows, new, source), logits

    pairs = count * (width * (width + 1) // 2)
    counts = flops.Counts(count * width, pairs, seen, count * patches**2)
    parts = flops.forward_flops(cfg, counts)
    # One token of each prompt gets logits.
    parts["head"] /= width
    total = sum(parts.values())
    note = f"{count} prompt{'s' * (count > 1)}, {patches} patches in each"
    work = Work("time of a prefill", total, total, count * width, note)
    held = {"weights": params, "cache": (cache.k, cache.v), "prompts": batch}
    held = memory_estimate.held_bytes(held)
    fn = jax.jit(run, donate_argnums=1, keep_unused=True)
    args = params, cache, batch, of_rows
    return Program(fn, args, mesh, held, work, "prompts' cache, activations")


def weights(cfg: Config, mesh: Mesh, dtype: Any, kind: str | None = None) -> Any:
    """Parameters as per-layer lists of shapes, each with its sharding. Raises InputError."""
    leaves = held_arrays(cfg, dtype, kind)
    where = {path: placement(path, s) for path, s in path_shardings(mesh, cfg, leaves).items()}
    return as_structs(tree_of(cfg, with_shardings(leaves, where)))


def held_arrays(cfg: Config, dtype: Any, kind: str | None) -> dict[TreePath, jax.ShapeDtypeStruct]:
    """What `load` holds of a model, by path: of 8-bit weights the codes and the scales."""
    out: dict[TreePath, jax.ShapeDtypeStruct] = {}
    few = quantized_params(cfg) if kind else {}
    for row in param_specs(cfg):
        if kind is None or row.path not in few or (kind == "fp8" and row.path in _BESIDE_FP8):
            out[row.path] = jax.ShapeDtypeStruct(row.shape, dtype)
            continue
        if kind == "fp8":
            code, scales = jnp.float8_e4m3fn, row.scale_shape(_BLOCK)
        else:
            code, scales = CODES[kind_of(row, kind)][0], scale_shape(row, kind)
        out[*row.path, VALUES] = jax.ShapeDtypeStruct(row.shape, code)
        out[*row.path, SCALE] = jax.ShapeDtypeStruct(scales, jnp.float32)
    return out


def empty_cache(cfg: Config, mesh: Mesh, asked: Serving) -> KVCache:
    """A cache as shapes, laid out as every function of cache.py leaves it."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_cache(cfg, asked.rows, asked.slots, asked.dtype))
    return _laid_out(mesh, shapes, 4, KV_AXES)


def _laid_out(mesh: Mesh, tree: Any, rank: int, axes: tuple[str | None, ...]) -> Any:
    """Shapes with shardings: of arrays of `rank` dimensions along `axes`, others whole."""

    def put(x: Any) -> Any:
        own = axes if len(x.shape) == rank else (None,) * len(x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=array_sharding(mesh, own, x))

    return jax.tree.map(put, tree)


def _replicated_shape(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))
