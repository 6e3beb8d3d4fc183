"""The step of a run as shapes with shardings, to be compiled and never run. Dims as in layers.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import layout_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.sharding import max_parts
from qwen3vl_jax.model.structs import Batch, VisionInputs
from qwen3vl_jax.storage.paths import as_path, kind
from qwen3vl_jax.training import train_model
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.recipe import Recipe, check_vision_length
from qwen3vl_jax.training.reporting import memory_estimate
from qwen3vl_jax.training.reporting.flops import full_work, step_flops, trained_parts
from qwen3vl_jax.training.state_sharding import (
    batch_shardings,
    check_mesh,
    state_shardings,
    with_shardings,
)

_SIZE = re.compile(r"(235b-a22b|30b-a3b|32b|8b|4b|2b)", re.IGNORECASE)


class Work(NamedTuple):
    """What one run of a program does, counted from shapes."""

    name: str  # of the time that it takes
    model: float  # FLOPs of all devices, nothing twice
    again: float  # with what is computed a second time
    tokens: int
    note: str  # which tokens
    steps: int = 0  # of the whole run; 0 where there is no such thing


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
    """The model's sizes: of a directory, else those that were released under the size in its name.

    No file of the Hub is read. Raises InputError where the name tells no size.
    """
    if kind(as_path(ckpt)) == "folder":
        return Config.from_hf(ckpt)
    if size := _SIZE.search(ckpt):
        return Config.named(size[0])
    raise InputError(
        f"{ckpt}: no such directory, and its name holds none of the released sizes (as 8b)"
    )


def check_batch(recipe: Recipe, cfg: Config, sizes: Mapping[str, int]) -> None:
    """Raises InputError for a batch or model that a mesh of these sizes does not divide."""
    check_mesh(layout_mesh(sizes), cfg, train_model.shapes(cfg))
    check_vision_length(recipe.pack, cfg)
    pack, rows, groups = recipe.pack, max_parts("batch", sizes), groups_of(recipe, sizes)
    for name, count, parts in (
        ("pack.groups", groups, rows),
        ("pack.rows", pack.rows, groups),
        ("pack.vision_rows", pack.vision_rows, groups),
    ):
        if count % parts:
            why = "data x fsdp x expert of the mesh, over which rows are spread"
            why = why if parts == rows else "pack.groups, into which rows are cut"
            raise InputError(f"{name} is {count}, expected a multiple of {parts}: {why}")
    for name, axis, count in (
        ("pack.length", "sequence", pack.length),
        ("the attention heads", "tensor", cfg.text.num_attention_heads),
        ("the experts", "expert", cfg.text.num_experts),
    ):
        if count % sizes.get(axis, 1) or (not count and sizes.get(axis, 1) > 1):
            raise InputError(
                f"mesh.{axis} is {sizes[axis]}, which does not divide {name} ({count})"
            )


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
    state = with_shardings(parts.state, state_shardings(mesh, cfg, parts.state))
    packed = packed_batch(recipe, cfg, groups_of(recipe, sizes))
    packed = with_shardings(packed, batch_shardings(mesh, packed))
    step = train_model.make_step(recipe, cfg, optimizer, parts.merge, state, keep_unused=True)
    return Program(
        step,
        (state, held["frozen weights"], packed),
        mesh,
        memory_estimate.held_bytes(held | {"batch": packed}),
        work_of(recipe, cfg, parts.weights),
        f"gradients, activations (remat {recipe.step.remat})",
        gradients.get("", 0),
    )


def work_of(recipe: Recipe, cfg: Config, weights: Mapping[str, Any]) -> Work:
    """The arithmetic of a step whose rows are all full, one sample a row."""
    how, work = trained_parts(recipe, cfg, dict(weights)), full_work(recipe)
    model = step_flops(cfg, work, **how)
    again = step_flops(cfg, work, **how, remat=recipe.step.remat)
    note = "places of the packed rows, filled or not"
    return Work("step time", model, again, work.tokens, note, recipe.steps)


def packed_batch(recipe: Recipe, cfg: Config, groups: int) -> PackedBatch:
    """The micro batches [M ..] of a step, as shapes; pixels are bytes, as a run sends them."""
    pack, c, many = recipe.pack, cfg.vision, recipe.step.accumulate

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((many, *shape), dtype)

    ints, floats = jnp.int32, jnp.float32
    rows = (pack.rows, pack.length)
    vision = vision_rows = named = None
    if pack.vision_rows:
        seen = (pack.vision_rows, pack.vision_length)
        pixels = of(jnp.uint8, *seen, math.prod(c.patch_shape))
        tables = of(ints, *seen, 4), of(floats, *seen, 4), of(ints, *seen, 2)
        vision = VisionInputs(pixels, *tables, of(ints, *seen), of(ints, *seen))
        vision_rows = of(ints, *rows)
        if recipe.step.vision_labels:
            named = of(ints, math.prod(seen) // c.merge_unit)
    batch = Batch(
        of(ints, *rows), of(ints, 3, *rows), of(ints, *rows), vision_rows, of(ints, pack.rows),
        vision, of(ints, *rows), groups=groups,
    )  # fmt: skip
    return PackedBatch(batch, of(floats, *rows), named)
