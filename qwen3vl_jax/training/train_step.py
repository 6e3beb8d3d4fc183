"""One training step as a pure function: loss, gradients over micro batches, optimizer update.

Dims as in layers.py; W patch rows of P patches, M micro batches. Labels are shifted in `batch_sums`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.labels import shift_labels
from qwen3vl_jax.model.attention import Dropout
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.model.transformer import final_norm, full_attention, lm_head, run_decoder
from qwen3vl_jax.model.vision import vision_encode
from qwen3vl_jax.training import losses
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.optimizer import apply_update, exact, named_key
from qwen3vl_jax.training.param_groups import Flat, MergeParams, decays
from qwen3vl_jax.training.recipe import Step


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes, without frozen weights. A checkpoint holds all of it."""

    step: jax.Array  # int32, updates done
    key: jax.Array  # uint32 [2], the run's key; every step folds its number in
    weights: Flat  # {name: array} of the trained weights
    optimizer: Any
    compensation: Flat | None  # int16, the low bits of compensated bf16 weights
    average: Flat | None  # fp32, moving average of the weights


class Sums(NamedTuple):
    """Sums over the tokens of one or more micro batches."""

    answers: losses.TokenSums
    vision: losses.TokenSums | None  # of image features, see PackedBatch.vision_labels
    routers: losses.RouterSums | None  # [L ..]
    balance: jax.Array  # the load-balancing loss times tokens


def init_state(
    key: jax.Array, weights: Flat, optimizer: GradientTransformation, step: Step, ema: float
) -> TrainState:
    """The state before the first step. The optimizer's moments are fp32, also for bf16 weights."""
    compensated = step.weights == "bfloat16" and step.rounding == "compensated"

    # Jitted, so that the fp32 copy for the optimizer is never in memory.
    @jax.jit
    def begin(weights: Flat) -> tuple[Any, Flat | None, Flat | None]:
        wide = {name: x.astype(jnp.float32) for name, x in weights.items()}
        none = {name: jnp.zeros(x.shape, jnp.int16) for name, x in weights.items()}
        return optimizer.init(wide), none if compensated else None, wide if ema else None

    moments, left, average = begin(weights)
    step_0 = jnp.zeros((), jnp.int32)
    return TrainState(step_0, jax.random.key_data(key), weights, moments, left, average)


def batch_sums(
    params: Params, cfg: Config, packed: PackedBatch, step: Step, key: jax.Array | None = None
) -> Sums:
    """The forward pass: loss sums of one packed batch. params have stacked layers.

    key: of dropout; None: no dropout (evaluation). Computes in step.dtype. Labels are shifted here, one
    token to the left; a sample's first token has weight 0, so no sample predicts the next one.
    """
    batch, how = packed.batch, {"dtype": jnp.dtype(step.dtype), "remat": step.remat}
    features = dropout = vision_sums = None
    if (vision := batch.vision) is not None:
        vision = vision.replace(pixels=normalised(vision.pixels))
        features = vision_encode(params, cfg, vision, **how)
    if key is not None and step.attention_dropout:
        dropout = Dropout(named_key(key, "attention"), step.attention_dropout)
    attended = batch.segment_ids > 0

    def collect(x, kept, routed):
        return None if routed is None else losses.router_sums(routed, attended)

    def head_sums(x: jax.Array, labels: jax.Array, weights: jax.Array) -> losses.TokenSums:
        x, table = final_norm(params, cfg, x), lm_head(params, cfg)
        return losses.chunked_cross_entropy(x, table, labels, weights, step.loss_chunk)

    attend, text = full_attention(batch, dropout), batch.replace(vision=None)
    x, routers = run_decoder(params, cfg, text, features, attend, collect=collect, **how)
    labels = shift_labels(cast(jax.Array, batch.labels))
    weights, balance = shift_labels(packed.weights, 0), jnp.zeros((), jnp.float32)
    if packed.vision_labels is not None and features is not None:
        even = jnp.ones(packed.vision_labels.shape, jnp.float32)
        vision_sums = head_sums(features.merged, packed.vision_labels, even)
    if routers is not None:
        tokens = jnp.sum(attended)
        balance = losses.balance_loss(routers, tokens) * tokens
    return Sums(head_sums(x, labels, weights), vision_sums, routers, balance)


def normalised(pixels: jax.Array) -> jax.Array:
    """Normalises uint8 pixels to -1 .. 1 in fp32, as the processor does. Others stay as they are."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


class Totals(NamedTuple):
    """The divisors of a step's sums, over all its micro batches."""

    weight: jax.Array  # sum of the weights of target tokens
    vision: jax.Array  # image features that have a label
    tokens: jax.Array  # tokens that are not padding


def step_totals(packed: PackedBatch) -> Totals:
    """Totals of one batch, or of micro batches with a leading axis."""
    weights = jnp.where(packed.batch.labels == IGNORE_INDEX, 0.0, packed.weights)
    named = packed.vision_labels
    seen = jnp.zeros((), jnp.int32) if named is None else jnp.sum(named != IGNORE_INDEX)
    tokens = jnp.sum(packed.batch.segment_ids > 0)
    return Totals(jnp.maximum(jnp.sum(weights), 1e-9), jnp.maximum(seen, 1), jnp.maximum(tokens, 1))


def total_loss(sums: Sums, totals: Totals, step: Step) -> jax.Array:
    """The loss of one micro batch; those of a step add up to the step's loss.

    The load-balancing loss is a product of two means: it is per micro batch, weighted by its tokens.
    """
    loss = (sums.answers.loss + step.z_loss * sums.answers.z) / totals.weight
    if sums.vision is not None:
        loss = loss + step.vision_labels * sums.vision.loss / totals.vision
    return loss + step.balance_loss * sums.balance / totals.tokens


def train_step(
    state: TrainState,
    frozen: Mapping[str, Any],
    packed: PackedBatch,
    *,
    cfg: Config,
    step: Step,
    optimizer: GradientTransformation,
    merge: MergeParams,
    ema: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from micro batches [M ..]: (new state, metrics). Jit it and donate the state.

    merge(weights, frozen, key) gives the parameter tree with stacked layers.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    totals = step_totals(packed)

    def loss_fn(weights: Flat, batch: PackedBatch, key: jax.Array) -> tuple[jax.Array, Sums]:
        params = merge(weights, frozen, key)
        sums = batch_sums(params, cfg, batch, step, key)
        return total_loss(sums, totals, step), sums

    weights = state.weights
    # A gradient has the dtype of its weight, inside a device and between devices. Matrices are multiplied
    # in 16 bits anyway, so the forward pass is the same; LoRA's are scaled first.
    if step.gradients == "bfloat16":
        others = ("vision.pos", ".a", ".b")
        matrices = [n for n in weights if decays(n) and not n.endswith(others)]
        weights = weights | {n: weights[n].astype(jnp.bfloat16) for n in matrices}
    grads, sums = gradients(loss_fn, weights, packed, key)
    new = updated(state, grads, optimizer, ema, named_key(key, "rounding"))
    return new, step_metrics(sums, totals) | {"grad_norm": optax.tree.norm(grads)}


def gradients(
    loss_fn: Callable[..., Any], weights: Flat, packed: PackedBatch, key: jax.Array
) -> tuple[Flat, Sums]:
    """(fp32 gradients, sums) of micro batches [M ..]. loss_fn(weights, batch, key) -> (loss, sums)."""

    def of(micro, i):
        grads, sums = jax.grad(loss_fn, has_aux=True)(weights, micro, jax.random.fold_in(key, i))
        return {n: g.astype(jnp.float32) for n, g in grads.items()}, sums

    def body(carry, xs):
        return jax.tree.map(jnp.add, carry, of(*xs)), None

    first = jax.tree.map(lambda x: x[0], packed)
    if len(packed.weights) == 1:
        return of(first, 0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, first, 0))
    return jax.lax.scan(body, zero, (packed, jnp.arange(len(packed.weights))))[0]


def updated(
    state: TrainState, grads: Flat, optimizer: GradientTransformation, ema: float, key: jax.Array
) -> TrainState:
    """The state after one update with fp32 gradients. key: of stochastic rounding."""
    updates, moments = optimizer.update(grads, state.optimizer, state.weights)
    updates, low_bits = cast(Flat, updates), state.compensation or {}
    old = state.weights.items()
    new = {n: apply_update(n, weight, updates[n], key, low_bits.get(n)) for n, weight in old}
    weights = {n: weight for n, (weight, _) in new.items()}
    low_bits = state.compensation and {n: low for n, (_, low) in new.items()}
    average = state.average and {
        n: ema * old + (1 - ema) * exact(*new[n]) for n, old in state.average.items()
    }
    return TrainState(state.step + 1, state.key, weights, moments, low_bits, average)


def step_metrics(sums: Sums, totals: Totals) -> dict[str, jax.Array]:
    """Metrics: means of the parts of the loss, and the experts' load."""
    answers = sums.answers
    out = {"loss": answers.loss / totals.weight}
    out |= {"accuracy": answers.correct / jnp.maximum(answers.tokens, 1)}
    out |= {"targets": answers.tokens, "tokens": totals.tokens}
    if sums.vision is not None:
        out["vision_loss"] = sums.vision.loss / totals.vision
    if sums.routers is not None:
        load = jnp.sum(sums.routers.counts, 1)  # [L E]
        # 1 is an even load.
        even = load / jnp.maximum(jnp.sum(load, -1, keepdims=True), 1) * load.shape[-1]
        out |= {"balance_loss": sums.balance / totals.tokens, "expert_load": jnp.mean(even, 0)}
        out |= {"expert_load_max": jnp.max(even), "expert_load_min": jnp.min(even)}
    return out
