"""Trains the demo checkpoint on one device.

    python train.py --config configs/demo.toml --out RUN_DIR [key=value ...]

AdamW with warm-up and cosine decay, bfloat16 computation over float32 weights. RUN_DIR becomes a
Hugging Face checkpoint directory, with metrics.csv and recipe.json, what was run, beside the weights.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import sys
import time
import tomllib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qwen3vl_jax.cli import EXPECTED, report
from qwen3vl_jax.errors import InputError

Recipe = dict[str, Any]
FIELDS = (
    "step",
    "loss",
    "naming",
    "exact",
    "held_out_loss",
    "held_out_exact",
    "held_out_clips",
    "lr",
    "norm",
    "ms",
    "tokens_s",
)


def read_recipe(path: Path, changes: list[str]) -> Recipe:
    """Read a TOML recipe and apply ``key=value`` or ``table.key=value`` changes to it.

    Raises InputError for a file that cannot be read, a key that the recipe does not have, and a
    value of another type than the recipe's.
    """
    try:
        recipe = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: expected a TOML file, found: {error}") from None
    for change in changes:
        name, _, text = change.partition("=")
        *tables, key = name.split(".")
        table: Any = recipe
        for part in tables:
            table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict) or isinstance(table.get(key, {}), dict):
            raise InputError(
                f"{change}: expected [table.]key=value, found no key {name!r} in {path}"
            )
        table[key] = _value(change, text, table[key])
    return recipe


def check(recipe: Recipe) -> None:
    """Raises InputError for numbers that no run can have, before anything is written or compiled."""
    least = {"steps": 1, "workers": 0, "few": 0, "batch.rows": 1, "batch.length": 64, "batch.windows": 1,
             "optimizer.warmup": 0, "report.every": 1, "report.evaluate_every": 1,
             "report.evaluate_batches": 1}  # fmt: skip
    for name, low in least.items():
        value: Any = functools.reduce(lambda table, key: table[key], name.split("."), recipe)
        if value < low:
            raise InputError(f"{name} is {value}, expected a whole number from {low}")
    if not 0 <= recipe["clips"] <= 1:
        raise InputError(f"clips is {recipe['clips']}, expected a chance from 0 to 1")
    if recipe["optimizer"]["warmup"] >= recipe["steps"]:
        raise InputError(
            f"steps is {recipe['steps']}, expected more than optimizer.warmup "
            f"({recipe['optimizer']['warmup']})"
        )
    if recipe["dtype"] not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype is {recipe['dtype']!r}, expected float32, bfloat16 or float16")


def _value(change: str, text: str, old: Any) -> Any:
    """The value of a change, in TOML; a bare word is a string."""
    try:
        new = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        new = text
    new = float(new) if isinstance(old, float) and type(new) is int else new
    if type(new) is not type(old):
        kind = {int: "a whole number", float: "a number", str: "a word"}[type(old)]
        raise InputError(f"{change}: expected {kind} like {old!r}, found {text!r}")
    return new


def batches(recipe: Recipe, folder: Path, part: str, steps: int) -> Iterator[Any]:
    """Yield the batches of steps 0, 1, ..., composed ahead of time by worker processes."""
    from demo.examples import Shape, make_batch

    seed = recipe["seed"] + (part == "held_out")
    few = recipe["few"] if part == "train" else 0
    shape, clips = Shape(**recipe["batch"]), recipe["clips"]
    make = functools.partial(make_batch, str(folder), part, shape, seed, few=few, clips=clips)
    workers = recipe["workers"] or max(1, (os.cpu_count() or 1) - 1)
    with ProcessPoolExecutor(min(workers, steps), mp_context=get_context("spawn")) as pool:
        ahead = deque(pool.submit(make, step) for step in range(min(2 * workers, steps)))
        for step in range(len(ahead), steps + len(ahead)):
            if step < steps:
                ahead.append(pool.submit(make, step))
            yield ahead.popleft().result()


def make_optimizer(recipe: Recipe):
    """AdamW with clipped gradients, and its learning rate by step: (transformation, schedule).

    Norms, biases and the table of positions do not decay.
    """
    import jax
    import optax

    settings = recipe["optimizer"]
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings["learning_rate"], settings["warmup"], recipe["steps"]
    )

    def decayed(params):
        def matrix(path, _):
            name = jax.tree_util.keystr(path)
            return not any(part in name for part in ("bias", "norm", "ln", "pos"))

        return jax.tree_util.tree_map_with_path(matrix, params)

    adamw = optax.adamw(
        schedule, b2=settings["b2"], weight_decay=settings["weight_decay"], mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(settings["clip"]), adamw), schedule


def init(key, cfg):
    """The project's initial parameters, with matrices rescaled from 0.02 to 1 / sqrt(fan-in).

    0.02 suits widths of thousands; at widths of hundreds a tower starts too quiet to learn.
    """
    import jax

    import qwen3vl_jax as q3

    def rescale(path, x):
        name = path[-1].key
        if x.ndim < 2 or "bias" in name or name in ("embed", "pos"):
            return x
        fan_in = x[0].size if name in ("o", "weight") else x.shape[-1]
        return x * (fan_in**-0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(rescale, q3.init_params(key, cfg))


def loss_fn(params, cfg, batch, dtype):
    """Cross-entropy of answers, and half that of what the vision tower sees.

    Each token of an answer of n tokens weighs 1 / sqrt(n), as in Qwen3-VL's own training: else a
    list of boxes drowns out a one-word answer. Source: arXiv 2511.21631. The labels of placeholders
    are read from the merged vision rows themselves, through the head: asked of the decoder's last
    layer instead, naming crowds out the search for a digit.

    Returns (sum, {"loss": of answers, "naming": of vision rows, "right": bool [B, T-1]}).
    """
    import jax
    import jax.numpy as jnp

    import qwen3vl_jax as q3
    from qwen3vl_jax.model import unembed

    params = jax.tree.map(lambda x: x.astype(dtype), params)
    features = encode_windows(params, cfg, batch.vision)
    logits = q3.forward(params, cfg, batch.replace(vision=None), features=features)[:, :-1]
    labels = answer_labels(batch)[:, 1:]
    loss = mean_loss(logits, labels, answer_weights(labels >= 0))
    seen = unembed(params, cfg, features.merged[batch.vision_rows])
    naming = mean_loss(seen, batch.labels, batch.vision_rows >= 0)
    metrics = {"loss": loss, "naming": naming, "right": jnp.argmax(logits, -1) == labels}
    return loss + 0.5 * naming, metrics


def mean_loss(logits, labels, weights):
    """Weighted mean cross-entropy of logits [B, T, V] and labels [B, T], 0 where none counts."""
    import jax.numpy as jnp
    import optax

    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def answer_labels(batch):
    """The labels [B, T] of answers alone: -100 on placeholders too."""
    import jax.numpy as jnp

    return jnp.where(batch.vision_rows >= 0, -100, batch.labels)


def answer_weights(counted):
    """1 / sqrt(length of its run) where ``counted`` bool [B, T] is true, else 0: float32 [B, T]."""
    import jax.numpy as jnp

    starts = counted & ~jnp.pad(counted, ((0, 0), (1, 0)))[:, :-1]
    run, rows = jnp.cumsum(starts, axis=1), jnp.arange(len(counted))[:, None]
    lengths = jnp.zeros((len(counted), counted.shape[1] + 1)).at[rows, run].add(counted)
    return counted / jnp.sqrt(jnp.maximum(lengths[rows, run], 1.0))


def encode_windows(params, cfg, vision):
    """Encode packed pictures, each window [W, 256, ...] by itself: features of all their rows.

    Attention inside windows costs the same whatever the mix of pictures; one long row of patches
    would not.
    """
    import jax
    import jax.numpy as jnp

    import qwen3vl_jax as q3

    pixels = vision.pixels.astype(jnp.float32) / 127.5 - 1.0
    encode = functools.partial(q3.vision_encode, params, cfg)
    out = jax.vmap(encode)(vision.replace(pixels=pixels))
    width = out.merged.shape[-1]
    taps = out.taps.swapaxes(0, 1)
    return q3.Features(out.merged.reshape(-1, width), taps.reshape(len(taps), -1, width))


def answers_right(labels, right) -> list[bool]:
    """For each run of labels [B, T]: whether all of it was right (``right`` [B, T-1]).

    Every token is predicted after the true ones, so an answer is right here exactly when greedy
    decoding writes it.
    """
    import numpy as np

    found = []
    for counted, hits in zip(np.asarray(labels[:, 1:] >= 0), np.asarray(right), strict=True):
        edges = np.flatnonzero(np.diff(np.pad(counted, 1).astype(np.int8)))
        found += [bool(hits[a:b].all()) for a, b in edges.reshape(-1, 2)]
    return found


def clip_answers_right(cfg, batches, metrics) -> list[bool]:
    """`answers_right` of the rows that show a clip, over batches and what `loss_fn` said of them."""
    import numpy as np

    found = []
    for batch, metric in zip(batches, metrics, strict=True):
        rows = (np.asarray(batch.tokens) == cfg.video_token_id).any(1)
        found += answers_right(np.asarray(answer_labels(batch))[rows], metric["right"][rows])
    return found


def save(params, cfg, out: Path) -> None:
    """Write bfloat16 weights under their released names to ``out``/model.safetensors."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    from convert.mapping import to_hf

    tensors = {
        k: np.ascontiguousarray(v).astype(jnp.bfloat16) for k, v in to_hf(cfg, params).items()
    }
    part = out / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(out / "model.safetensors")


class Report:
    """metrics.csv, and a progress bar with loss, learning rate, step time and tokens a second."""

    def __init__(self, out: Path, recipe: Recipe):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.file = (out / "metrics.csv").open("w", newline="")
        self.csv: csv.DictWriter[str] = csv.DictWriter(self.file, FIELDS)
        self.csv.writeheader()
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("compiling", total=recipe["steps"])
        self.since, self.step = time.perf_counter(), 0

    def write(self, step: int, tokens: int, **values: float) -> None:
        """Record what happened up to ``step``; ``tokens`` are those of one batch."""
        now = time.perf_counter()
        seconds = (now - self.since) / max(step - self.step, 1)
        self.since, self.step = now, step
        row = {"ms": 1000 * seconds, "tokens_s": tokens / seconds, **values}
        self.csv.writerow({"step": step, **{k: f"{v:.6g}" for k, v in row.items()}})
        self.file.flush()
        text = " ".join(f"{k} {v:.4g}" for k, v in row.items())
        self.bar.update(self.task, completed=step, description=text)
        if not self.bar.console.is_terminal or "held_out_loss" in values:
            self.bar.console.print(f"step {step} {text}", highlight=False, soft_wrap=True)


def train(recipe: Recipe, out: Path) -> None:
    """Run a recipe and leave a checkpoint directory in ``out``."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import qwen3vl_jax as q3
    from demo import files

    files.write(out)
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    cfg = q3.Config.from_hf(out)
    dtype = jnp.dtype(recipe["dtype"])
    params = jax.jit(functools.partial(init, cfg=cfg))(jax.random.key(recipe["seed"]))
    optimizer, schedule = make_optimizer(recipe)
    state = jax.jit(optimizer.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, batch):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, cfg, batch, dtype)
        updates, state = optimizer.update(grads, state, params)
        metrics["norm"] = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        return optax.apply_updates(params, updates), state, metrics

    @jax.jit
    def evaluate(params, batch):
        return loss_fn(params, cfg, batch, dtype)[1]

    every = recipe["report"]
    held_out = list(batches(recipe, out, "held_out", every["evaluate_batches"]))
    told = Report(out, recipe)
    with told.file, told.bar:
        for step, batch in enumerate(batches(recipe, out, "train", recipe["steps"]), 1):
            params, state, metrics = update(params, state, batch)
            last = step == recipe["steps"]
            checked = last or step % every["evaluate_every"] == 0
            if not checked and step % every["every"]:
                continue
            loss = float(metrics["loss"])
            if not np.isfinite(loss):
                raise InputError(f"step {step}: the loss is {loss}; lower optimizer.learning_rate")
            exact = np.mean(answers_right(answer_labels(batch), metrics["right"]))
            values = {"loss": loss, "exact": exact, "lr": schedule(step)}
            values |= {name: metrics[name] for name in ("naming", "norm")}
            if checked:
                seen = [evaluate(params, batch) for batch in held_out]
                right = [
                    answers_right(answer_labels(b), m["right"]) for b, m in zip(held_out, seen)
                ]
                values["held_out_loss"] = np.mean([m["loss"] for m in seen])
                values["held_out_exact"] = np.mean(np.concatenate(right))
                if timed := clip_answers_right(cfg, held_out, seen):
                    values["held_out_clips"] = np.mean(timed)
                save(params, cfg, out)
            told.write(step, int(batch.segment_ids.sum()), **values)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Trains the demo checkpoint on one device.")
    parser.add_argument("--config", type=Path, required=True, help="a recipe, see configs/")
    parser.add_argument(
        "--out", type=Path, required=True, help="a new directory for the checkpoint"
    )
    parser.add_argument("--force", action="store_true", help="write over an existing checkpoint")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_args(arguments)
    try:
        recipe = read_recipe(args.config, args.changes)
        check(recipe)
        if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
            raise InputError(
                f"--out {args.out}: it exists and is not empty; add --force to write over it"
            )
        train(recipe, args.out)
    except EXPECTED as error:
        return report(error, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
