"""Our side of training tests: stacked parameters as flat dicts, packed batches, one step."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import ours
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.device_mesh import replicated
from qwen3vl_jax.model.structs import Batch, VisionInputs
from qwen3vl_jax.training import optimizer, param_groups, recipe, state_sharding, train_step
from qwen3vl_jax.training.data.packing import PackedBatch

FP32 = recipe.Step(dtype="float32", remat="none", loss_chunk=16)
FAST = {"xla_backend_optimization_level": 0}  # half the compile time, and nothing here runs long


def model(variant="shallow", moe=False):
    """(params, cfg, config.json) of a tiny model, without torch."""
    config = tiny.config_dict(variant, moe)
    return *ours.build(SimpleNamespace(config=config, weights=tiny.weights(config, 0))), config


def sample(config, row, seed=0):
    """(make_batch's arguments, labels [1 T]) of one prompt of tiny.inputs; half of the words count.

    Pixels are bytes.
    """
    inputs, rng = tiny.inputs(config, row, seed), np.random.default_rng(seed)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = rng.integers(0, 256, inputs[name].shape, np.uint8)
    ids = inputs["input_ids"]
    told = (rng.random(ids.shape) < 0.5) & (ids < 290)
    return inputs, np.where(told, ids, -100)


def pack(cfg, rows, length=32, patches=32) -> PackedBatch:
    """Rows of samples, one behind the other, each row with a ViT row of its own; both padded.

    What packing.py makes, written down again: nothing is predicted across samples.
    """
    unit = cfg.vision.merge_unit
    told = [_packed_row(cfg, samples, length, patches) for samples in rows]
    tokens, vision = ([row[i] for row in told] for i in (0, 1))
    for r, row in enumerate(tokens):
        row["vision_rows"] += np.where(row["vision_rows"] >= 0, r * (patches // unit), 0)
    stacked = {k: np.stack([row[k] for row in tokens]) for k in tokens[0]}
    weights = stacked.pop("weights")
    stacked["positions"] = stacked["positions"].swapaxes(0, 1)
    fields = {k: np.stack([row[k] for row in vision]) for k in vision[0]}
    batch = Batch(**stacked, delta=np.zeros(len(rows), np.int32), vision=VisionInputs(**fields))
    return PackedBatch(batch, weights)


def _packed_row(cfg, samples, length, patches):
    parts, seen, start, first = [], [], 0, 0
    for number, (inputs, labels) in enumerate(samples, 1):
        b = q3.make_batch(cfg, **inputs, labels=labels, pad=False)
        t = b.tokens.shape[1]
        told, rows = np.array(b.labels[0]), b.vision_rows
        told[0] = -100
        rng = np.random.default_rng(t)
        rows = np.full(t, -1, np.int32) if rows is None else np.asarray(rows[0])
        parts.append(
            {
                "tokens": b.tokens[0],
                "positions": b.positions[:, 0],
                "segment_ids": np.full(t, number, np.int32),
                "vision_rows": np.where(rows >= 0, rows + first // cfg.vision.merge_unit, -1),
                "labels": told,
                "weights": np.where(told == -100, 0, 0.5 + rng.random(t)).astype(np.float32),
            }
        )
        if b.vision is not None:
            v = {k: np.asarray(getattr(b.vision, k)) for k in b.vision.__dataclass_fields__}
            given = [x.dtype for k, x in inputs.items() if k.startswith("pixel")]
            v["pixels"] = v["pixels"].astype(given[0])  # make_batch gives floats
            seen.append({**v, "lo": v["lo"] + first, "hi": v["hi"] + first})
            first += len(v["lo"])
        start += t
    assert start <= length and first <= patches, (start, first)
    fills = {"vision_rows": -1, "labels": -100}
    row = {
        k: _fit(np.concatenate([p[k] for p in parts], -1), length, fills.get(k, 0))
        for k in parts[0]
    }
    return row, {k: _fit(x.T, patches, 0).T for k, x in _joined(cfg, seen).items()}


def _joined(cfg, seen):
    """Fields of VisionInputs, one picture behind the other; none at all where there is none."""
    wide = int(np.prod(cfg.vision.patch_shape))
    shapes = {"pixels": (wide,), "pos_index": (4,), "pos_weight": (4,), "coords": (2,)}
    shapes |= {"lo": (), "hi": ()}
    kinds = dict.fromkeys(shapes, np.int32) | {"pixels": np.float32, "pos_weight": np.float32}
    if not seen:
        return {k: np.zeros((0, *shape), kinds[k]) for k, shape in shapes.items()}
    return {k: np.concatenate([s[k] for s in seen]) for k in shapes}


def _fit(x, length, fill):
    gap = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return np.pad(x, gap, constant_values=fill)


def one_by_one(cfg, inputs, labels) -> PackedBatch:
    """Rows of one sample each (make_batch's arguments) as one micro batch, vision on its own row."""
    batch = q3.make_batch(cfg, **inputs, labels=labels)
    first = np.argmax(np.asarray(batch.segment_ids) > 0, 1)
    told = np.asarray(batch.labels).copy()
    told[np.arange(len(told)), first] = -100
    weights = (told != -100).astype(np.float32)
    return PackedBatch(batch.replace(labels=told), weights)


def micro(*batches: PackedBatch) -> PackedBatch:
    """Micro batches of one shape with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


def flat(params):
    """(weights, join) of per-layer parameters, everything trained."""
    weights, unflatten = param_groups.flatten(q3.stack_layers(params))
    return weights, lambda weights, frozen, key=None: unflatten({**weights, **frozen})


def gradients(weights, merge, cfg, packed, settings, key):
    """(gradients, sums, totals) of the training step's loss; merge(weights, key) gives parameters."""
    totals = train_step.step_totals(packed)

    def loss_fn(weights, batch, key):
        sums = train_step.batch_sums(merge(weights, key), cfg, batch, settings, key)
        return train_step.total_loss(sums, totals, settings), sums

    return *train_step.gradients(loss_fn, weights, packed, key), totals


def slopes(params, cfg, settings=FP32):
    """A jitted function of (weights, packed, key): (gradients, loss, metrics), everything trained."""
    _, join = flat(params)

    def run(weights, packed, key):
        grads, sums, totals = gradients(
            weights, lambda w, k: join(w, {}, k), cfg, packed, settings, key
        )
        return (
            grads,
            train_step.total_loss(sums, totals, settings),
            train_step.step_metrics(sums, totals),
        )

    return jax.jit(run, compiler_options=FAST)


def trainer(
    params, cfg, rule: recipe.Optimizer, settings=FP32, steps=100, freeze=(), rates=None, mesh=None
):
    """(state, frozen, jitted train_step) of a run over all or some parameters, laid out on a mesh."""
    weights, join = flat(params)
    sparse = bool(cfg.text.num_experts)
    stopped = param_groups.frozen_names(list(weights), freeze, sparse)
    frozen = {n: x for n, x in weights.items() if n in stopped}
    held = jnp.dtype(settings.weights)
    weights = {n: x.astype(held) for n, x in weights.items() if n not in stopped}
    factors = param_groups.learning_rates(list(weights), rates or {}, sparse)
    transform = optimizer.make_optimizer(rule, steps, factors)
    state = train_step.init_state(jax.random.key(1), weights, transform, settings, rule.ema)
    run = functools.partial(
        train_step.train_step,
        cfg=cfg,
        step=settings,
        optimizer=transform,
        merge=join,
        ema=rule.ema,
    )
    if mesh is None:
        return state, frozen, jax.jit(run, compiler_options=FAST)
    where = state_sharding.state_shardings(mesh, cfg, state)
    state = jax.tree.map(state_sharding.put, state, where)
    # The new state lies as the old one does: a second step is the same program.
    out = (where, replicated(mesh))
    return state, frozen, jax.jit(run, compiler_options=FAST, out_shardings=out)
