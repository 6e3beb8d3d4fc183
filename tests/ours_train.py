"""Our side of training tests: stacked parameters as flat dicts, packed batches, one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import qwen3vl_jax as q3
from qwen3vl_jax.training import groups, optimizer, recipe, step
from qwen3vl_jax.training.packing import PackedBatch

FP32 = recipe.Step(dtype="float32", remat="none", loss_chunk=16)


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
    weights, unflatten = groups.flatten(q3.stack_layers(params))
    return weights, lambda weights, frozen, key=None: unflatten({**weights, **frozen})


def slopes(params, cfg, settings=FP32):
    """A jitted function of (weights, packed, key): (gradients, loss, metrics), everything trained."""
    _, join = flat(params)

    @jax.jit
    def run(weights, packed, key):
        grads, sums, totals = step.gradients(
            weights, lambda w, k: join(w, {}, k), cfg, packed, settings, key
        )
        return grads, step.total_loss(sums, totals, settings), step.step_metrics(sums, totals)

    return run


def trainer(params, cfg, rule: recipe.Optimizer, settings=FP32, steps=100, freeze=(), rates=None):
    """(state, frozen, jitted train_step) of a run over all or some parameters."""
    weights, join = flat(params)
    sparse = bool(cfg.text.num_experts)
    stopped = groups.frozen_names(list(weights), freeze, sparse)
    frozen = {n: x for n, x in weights.items() if n in stopped}
    held = jnp.dtype(settings.weights)
    weights = {n: x.astype(held) for n, x in weights.items() if n not in stopped}
    factors = groups.learning_rates(list(weights), rates or {}, sparse)
    rule_of = optimizer.make_optimizer(rule, steps, factors)
    state = step.init_state(jax.random.key(1), weights, rule_of, settings, rule.ema)
    run = functools.partial(
        step.train_step, cfg=cfg, step=settings, optimizer=rule_of, join=join, ema=rule.ema
    )
    return state, frozen, jax.jit(run)
