"""What benchmarks.training runs of this project, in a process of its own: a line of JSON a step."""

import functools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inference_ours import ceilings, emit
from benchmarks.scaling_cases import config, real_work, rows_of
from benchmarks.training import Run
from qwen3vl_jax.checkpoint.auto_mesh import bytes_limit
from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.training import train_model
from qwen3vl_jax.training.data import packing
from qwen3vl_jax.training.data.global_batches import bounded
from qwen3vl_jax.training.data.sample import Sample
from qwen3vl_jax.training.recipe import Recipe, read_recipe
from qwen3vl_jax.training.reporting import memory_estimate
from qwen3vl_jax.training.reporting.flops import step_flops, trained_parts

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STEPS = 7


def recipe_of(run: Run, remat: str) -> Recipe:
    """The recipe of configs/ with this run's rows; with images, a patch row for each token row."""
    changes = [f"pack.rows={run.rows}", f"pack.length={run.length}", "init=normal", "steps=1000"]
    changes.append(f"pack.vision_rows={run.rows if run.packed else 0}")
    changes += [f"pack.vision_length={2 * run.length}", f"step.remat={remat}"]
    if run.lora:
        changes += [f"lora.rank={run.lora}", 'lora.targets=["text"]', "lora.dropout=0.0"]
        changes += [f"lora.base={run.base}"]
    else:
        changes.append("train.freeze=[]")
    return read_recipe(CONFIGS / ("sft_8b_lora.toml" if run.lora else "sft_2b.toml"), changes)


def text_rows(cfg: Config, recipe: Recipe) -> packing.PackedBatch:
    """A batch [1 ..] of one sample of random text a row."""
    rng, length = np.random.default_rng(0), recipe.pack.length

    def sample() -> Sample:
        ids = rng.integers(0, 400, length).astype(np.int32)
        learned = np.arange(length) > 8
        labels = np.where(learned, ids, IGNORE_INDEX)
        positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
        return Sample("random", ids, labels, learned.astype(np.float32), positions, ())

    coming = iter(packing.Pending(i, sample()) for i in range(recipe.pack.rows + 1))
    chosen, _ = packing.choose(recipe.pack, [], lambda: next(coming))
    built = packing.build(cfg, recipe.pack, chosen, np.uint8, False)
    return jax.tree.map(lambda x: x[None], bounded(built, [built]))


def random_arrays(like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Random numbers of these shapes, drawn array by array: `init=normal` compiles a minute long."""

    @functools.partial(jax.jit, static_argnames=("shape", "dtype"))
    def matrix(key, shape, dtype):
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, -7, 8, jnp.int8).astype(dtype)
        return (jax.random.normal(key, shape, jnp.bfloat16) * 0.02).astype(dtype)

    def leaf(key: jax.Array, name: str, x: Any) -> jax.Array:
        last = name.rsplit(".", 1)[-1]
        if f"{name.removesuffix('.scale')}.values" in like:
            return jnp.full(x.shape, 0.004, x.dtype)
        if last == "scale" or last.endswith("norm") or last in ("ln1", "ln2"):
            return jnp.ones(x.shape, x.dtype)
        return jnp.zeros(x.shape, x.dtype) if "bias" in last else matrix(key, x.shape, x.dtype)

    keys = jax.random.split(jax.random.key(0), len(like))
    return {name: leaf(key, name, x) for key, (name, x) in zip(keys, like.items(), strict=True)}


def measure(cfg: Config, run: Run, remat: str) -> dict[str, Any]:
    """Seconds of a step, its losses, memory, and what it trained on."""
    mesh, room = make_mesh({}, jax.devices()[:1]), bytes_limit(jax.devices()[0])
    recipe = memory_estimate.with_remat(recipe_of(run, remat), cfg, room)
    packed = rows_of(cfg, recipe, mesh, 0) if run.packed else text_rows(cfg, recipe)
    packed = jax.tree.map(lambda x: jax.device_put(np.asarray(x)), packed)
    shapes = memory_estimate.held(recipe, cfg)
    weights, frozen = random_arrays(shapes.weights), random_arrays(shapes.frozen)
    optimizer = train_model.build_optimizer(recipe, cfg, weights)
    step = train_model.make_step(recipe, cfg, optimizer, shapes.merge)
    parts = trained_parts(recipe, cfg, weights)
    state = train_model.init_train_state(recipe, cfg, optimizer, weights, None)
    del weights
    start = time.perf_counter()
    compiled = step.lower(state, frozen, packed).compile()
    compiling = time.perf_counter() - start
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, packed)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    work, stats = real_work(packed), jax.devices()[0].memory_stats() or {}
    analysis: Any = compiled.memory_analysis()
    return {
        "run": run.name,
        "remat": recipe.step.remat,
        "seconds": sorted(seconds[1:])[len(seconds) // 2 - 1],
        "compile": compiling,
        "losses": losses,
        "tokens": work.tokens,
        "padded": run.rows * run.length,
        "flops": step_flops(cfg, work, **parts),
        "planned": analysis.peak_memory_in_bytes,
        "peak": stats.get("peak_bytes_in_use", 0),
    }


def main() -> None:
    """A line for the device, then one for each run."""
    asked = json.loads(sys.argv[1])
    cfg, device = config(asked["size"]), jax.devices()[0].device_kind
    emit({"device": device, "versions": f"jax {jax.__version__}", **ceilings(asked["size"])})
    for given in asked["works"]:
        run = Run(**given)
        try:
            emit(measure(cfg, run, asked["remat"]))
        except Exception as e:  # the other runs go on, and the table names this one
            emit({"run": run.name, "error": f"{type(e).__name__}: {e}"[:400]})
        jax.clear_caches()


if __name__ == "__main__":
    main()
