"""What `benchmarks.scaling` runs in a process of its own: decoding and training on one mesh.

A case prints one line of JSON; arrays to compare go to a file, so that memory is that of one case.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import qwen3vl_jax as q3
from demo.evaluate import CHECKPOINT
from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.planning.program import Serving, empty_cache
from qwen3vl_jax.planning.program import weights as weight_shapes
from qwen3vl_jax.processing.encoded_prompt import EncodedImage
from qwen3vl_jax.training import train_model
from qwen3vl_jax.training.data import packing
from qwen3vl_jax.training.data.global_batches import bounded, divided
from qwen3vl_jax.training.data.sample import Sample
from qwen3vl_jax.training.recipe import Recipe, read_recipe
from qwen3vl_jax.training.reporting.flops import Counts, step_flops
from qwen3vl_jax.training.state_sharding import batch_axis, batch_shardings, put
from qwen3vl_jax.training.train_step import batch_sums, gradients, step_totals, total_loss

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "sft_2b.toml"
EVERY = 997  # of a gradient's numbers, those that are compared
GROUPS = 2  # of rows, so that one device and two have the same batch


@dataclasses.dataclass(frozen=True)
class Case:
    """One run. sizes: of mesh axes; timed, layers: of the decoder that is timed, and compared."""

    kind: str  # decode or train
    model: str  # a released size, or tiny or tiny-moe
    sizes: Mapping[str, int]
    rows: tuple[int, ...]  # decode: one timing each; train: one number
    length: int  # decode: slots, all but `steps` filled; train: tokens of a row
    steps: int
    timed: int = 0  # 0: all of them
    layers: int = 0  # 0: nothing is compared
    truth: bool = False  # compute it in float32 too

    @property
    def devices(self) -> int:
        """How many it runs on."""
        return math.prod(self.sizes.values())


def config(model: str, layers: int = 0) -> Config:
    """A released size, or the demo's with dense layers or experts; layers: of the decoder, 0 all."""
    cfg = whole_config(model)
    text = dataclasses.replace(cfg.text, num_hidden_layers=layers or cfg.text.num_hidden_layers)
    return dataclasses.replace(cfg, text=text)


def whole_config(model: str) -> Config:
    """`config` with all its layers."""
    if not model.startswith("tiny"):
        return Config.named(model)
    cfg = Config.from_hf(CHECKPOINT)
    if model == "tiny":
        return cfg
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **experts))


def run(case: Case, out: Path) -> dict[str, Any]:
    """The figures of a case; what is compared is written to `out` (.npz)."""
    mesh = make_mesh(case.sizes, jax.devices()[: case.devices])
    with jax.set_mesh(mesh):
        told, compared = (decoding if case.kind == "decode" else training)(case, mesh)
    arrays: Any = compared
    np.savez(out, **arrays)
    return told | {"device": jax.devices()[0].device_kind}


def decoding(case: Case, mesh: Mesh) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """({"ms": {rows: ms a step}}, logits of a prefill and of decode steps)."""
    cfg = config(case.model, case.timed)
    params, told = random_weights(cfg, mesh=mesh), {}
    for rows in case.rows:
        told[rows] = decode_ms(case, cfg, mesh, params, rows)
    del params
    if not case.layers:
        return {"ms": told}, {}
    cfg = config(case.model, case.layers)
    params = random_weights(cfg, mesh=mesh)
    found = {"bfloat16": answers(cfg, params)}
    if case.truth:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        del params
        with jax.default_matmul_precision("highest"):
            found["float32"] = answers(cfg, wide)
    return {"ms": told}, found


def random_weights(cfg: Config, kind: str | None = None, mesh: Mesh | None = None) -> dict:
    """Random weights in bf16, int8 or fp8, in their shards: the same numbers on every mesh."""

    @functools.partial(jax.jit, static_argnames=("shape", "dtype", "where"))
    def matrix(key, shape, dtype, where):
        if dtype == jnp.int8:
            x = jax.random.randint(key, shape, -127, 128, dtype)
        else:
            x = jax.random.normal(key, shape, jnp.bfloat16) * std
            x = (x / scale if dtype != jnp.bfloat16 else x).astype(dtype)
        return x if where is None else jax.lax.with_sharding_constraint(x, where)

    def leaf(key, x):
        if x.dtype == jnp.float32:  # the scales of 8-bit weights
            return jnp.full(x.shape, scale, x.dtype)
        if x.ndim == 1:
            return jnp.ones(x.shape, x.dtype)
        return matrix(key, x.shape, x.dtype, x.sharding if mesh else None)

    std = cfg.text.initializer_range * 2
    scale = std / 73  # int8 numbers are spread evenly: 73 is their deviation
    shapes = weight_shapes(cfg, mesh or make_mesh({}, jax.devices()[:1]), jnp.bfloat16, kind)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, list(map(leaf, keys, leaves)))


def decode_ms(case: Case, cfg: Config, mesh: Mesh, params: dict, rows: int) -> float:
    """Milliseconds of a decode step with a cache that is full at the last one; median of five."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def steps(params, cache, tokens):
        def one(_, carry):
            cache, logits = q3.decode_step(params, cfg, *carry)
            return cache, jnp.argmax(logits, -1).astype(jnp.int32)

        return jax.lax.fori_loop(0, case.steps, one, (cache, tokens))

    shapes = empty_cache(cfg, mesh, Serving(rows, case.length, None))
    where = jax.tree.map(lambda x: x.sharding, shapes)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    cache = jax.jit(zeros, out_shardings=where)()
    tokens, times = jnp.arange(rows, dtype=jnp.int32), []
    filled = np.full(rows, shapes.slots - case.steps, np.int32)
    for _ in range(6):
        cache = cache.replace(length=jax.device_put(filled, where.length))
        start = time.perf_counter()
        cache, tokens = jax.block_until_ready(steps(params, cache, tokens))
        times.append((time.perf_counter() - start) * 1000 / case.steps)
    return sorted(times[1:])[2]


def answers(cfg: Config, params: dict, rows: int = 4, steps: int = 8) -> np.ndarray:
    """Logits [steps + 1, B, V] after a prompt with an image, and after tokens that are given."""
    h, w, unit = 12, 20, cfg.vision.merge_unit
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 400, (rows, 100 + h * w // unit)).astype(np.int32)
    ids[:, 9] = cfg.vision_start_token_id
    ids[:, 10 : 10 + h * w // unit] = cfg.image_token_id
    pixels = rng.standard_normal((rows * h * w, math.prod(cfg.vision.patch_shape)))
    batch = q3.make_batch(
        cfg,
        input_ids=ids,
        pixel_values=pixels.astype(np.float32),
        image_grid_thw=[(1, h, w)] * rows,
    )
    slots = batch.tokens.shape[1] + steps
    fill = jax.jit(lambda params, batch: q3.prefill(params, cfg, batch, slots))
    step = jax.jit(lambda *given: q3.decode_step(given[0], cfg, *given[1:]), donate_argnums=1)
    cache, logits = fill(params, batch)
    found = [np.asarray(logits)]
    for tokens in rng.integers(0, 400, (steps, rows)).astype(np.int32):
        cache, logits = step(params, cache, tokens)
        found.append(np.asarray(logits))
    return np.stack(found)


def training(case: Case, mesh: Mesh) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(time, losses and memory of steps, some of the gradients of the first batch)."""
    cfg, rows = config(case.model), case.rows[0]
    changes = [f"pack.rows={rows}", f"pack.length={case.length}", "init=normal", "steps=100"]
    changes += [f"pack.vision_rows={rows}", f"pack.vision_length={2 * case.length}"]
    changes += ["optimizer.warmup=10", "step.remat=full"]
    recipe = read_recipe(RECIPE, changes)
    trainable = train_model.prepare(recipe, cfg, mesh=mesh)
    optimizer = train_model.build_optimizer(recipe, cfg, trainable.weights)
    like = train_model.shape_of_state(recipe, cfg, optimizer, trainable.weights, mesh)
    step = train_model.make_step(recipe, cfg, optimizer, trainable.merge, like)
    batches = packing.for_one_program([rows_of(cfg, recipe, mesh, seed) for seed in range(2)])
    state = train_model.init_train_state(recipe, cfg, optimizer, trainable.weights, mesh)
    frozen, merge = trainable.frozen, trainable.merge
    del trainable
    compiled = step.lower(state, frozen, batches[0]).compile()
    losses, times = [], []
    for i in range(case.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batches[i % 2])
        losses.append(float(metrics["loss"]))
        times.append((time.perf_counter() - start) * 1000)
    stats: Any = compiled.memory_analysis()
    real = [d.memory_stats() or {} for d in mesh.devices.flat]
    work = real_work(batches[0])
    told = {
        "ms": sorted(times[1:])[len(times) // 2 - 1],
        "losses": losses,
        "tokens": work.tokens,
        "flops": step_flops(cfg, work, trained={"text", "merger", "embeddings", "head"}),
        "planned": stats.peak_memory_in_bytes,
        "peak": max(x.get("peak_bytes_in_use", 0) for x in real),
    }
    del state, compiled
    found = {}
    if case.layers:
        weights = train_model.prepare(recipe, cfg, mesh=mesh).weights
        kinds = ("bfloat16", "float32") if case.truth else ("bfloat16",)
        for dtype in kinds:
            found[dtype] = some_gradients(recipe, cfg, weights, frozen, merge, batches[0], dtype)
    return told, found


def real_work(packed: packing.PackedBatch) -> Counts:
    """What a batch (or micro batches [M ..]) holds without padding, pairs from the real ranges."""
    ids = np.asarray(packed.batch.segment_ids)
    sizes = [np.bincount(row[row > 0]).astype(np.int64) for row in ids.reshape(-1, ids.shape[-1])]
    pairs = sum(int(np.sum(n * (n + 1) // 2)) for n in sizes)
    patches = patch_pairs = 0
    if (vision := packed.batch.vision) is not None:
        seen = np.maximum(np.asarray(vision.hi, np.int64) - np.asarray(vision.lo, np.int64), 0)
        patches, patch_pairs = int(np.sum(seen > 0)), int(np.sum(seen))
    return Counts(int(np.sum(ids > 0)), pairs, patches, patch_pairs)


def some_gradients(
    recipe: Recipe, cfg: Config, weights: Any, frozen: Any, merge: Callable, packed: Any, dtype: str
) -> np.ndarray:
    """Every 997th number of each gradient, computed in `dtype`, as one array."""
    how = dataclasses.replace(recipe.step, dtype=dtype)

    @jax.jit
    def some(weights, frozen, packed):
        totals = step_totals(packed)

        def loss_fn(weights, batch, key):
            sums = batch_sums(merge(weights, frozen, key), cfg, batch, how, key)
            return total_loss(sums, totals, how), sums

        grads, _ = gradients(loss_fn, weights, packed, jax.random.key(0))
        return {name: g.reshape(-1)[::EVERY] for name, g in grads.items()}

    precision = "highest" if dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        found = some(weights, frozen, packed)
    return np.concatenate([np.asarray(found[name]) for name in sorted(found)])


def rows_of(cfg: Config, recipe: Recipe, mesh: Mesh, seed: int) -> packing.PackedBatch:
    """A batch [1 ..] of random samples with an image each, in GROUPS groups of rows."""
    rng, pack, parts = np.random.default_rng(seed), divided(recipe.pack, GROUPS), []
    for _ in range(GROUPS):
        coming = iter(packing.Pending(i, sample(cfg, rng, pack.length)) for i in range(1 << 30))
        chosen, _ = packing.choose(pack, [], lambda coming=coming: next(coming))
        parts.append(packing.build(cfg, pack, chosen, np.uint8, False))

    def join(path: Any, *xs: np.ndarray) -> np.ndarray:
        return np.concatenate(xs, batch_axis(path))[None]

    whole = jax.tree_util.tree_map_with_path(join, *parts)
    whole = whole.replace(batch=whole.batch.replace(groups=GROUPS))
    whole = bounded(whole, parts)
    return jax.tree.map(put, whole, batch_shardings(mesh, whole))


def sample(cfg: Config, rng: np.random.Generator, length: int) -> Sample:
    """A conversation of an eighth to a half of a row, a third of it an image."""
    size = int(rng.integers(length // 8, length // 2))
    side = max(int((size / 3) ** 0.5), 1)
    h, w = 2 * side, 2 * max(size // 3 // side, 1)
    count = h * w // cfg.vision.merge_unit
    ids = rng.integers(0, 400, size).astype(np.int32)
    ids[9 : 9 + count] = cfg.image_token_id
    learned = np.arange(size) > size // 2
    pixels = rng.integers(0, 256, (h * w, math.prod(cfg.vision.patch_shape))).astype(np.uint8)
    labels, weights = np.where(learned, ids, packing.IGNORE_INDEX), learned.astype(np.float32)
    positions = np.tile(np.arange(size, dtype=np.int32), (3, 1))
    image = EncodedImage(pixels, (1, h, w), 9, 9 + count)
    return Sample("random", ids, labels, weights, positions, (image,))
