"""The optimizer over named parameters, its schedule, and updates of bf16 weights."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen3vl_jax.training.param_groups import Flat, decays
from qwen3vl_jax.training.recipe import Optimizer


def make_schedule(settings: Optimizer, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step: linear warmup from 0, then cosine, linear or constant."""
    peak, left = settings.learning_rate, max(steps - settings.warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, left, settings.final),
        "linear": optax.linear_schedule(peak, peak * settings.final, left),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    warm = optax.linear_schedule(0.0, peak, max(settings.warmup, 1))
    return optax.join_schedules([warm, after], [settings.warmup]) if settings.warmup else after


def make_optimizer(
    settings: Optimizer, steps: int, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Gradient clipping, update rule, weight decay and learning rate factors, over flat dicts.

    Sources: AdamW arXiv 1711.05101, Adafactor 1804.04235, Muon kellerjordan.github.io/posts/muon.
    """

    def clipped(updates: Any, params: Any = None) -> Any:
        # One product, which XLA fuses into its uses. optax.clip_by_global_norm selects between two
        # arrays: a second set of gradients in memory.
        scale = jnp.minimum(settings.clip / optax.tree.norm(updates), 1.0)
        return {name: u * scale for name, u in updates.items()}

    return optax.chain(
        optax.stateless(clipped) if settings.clip else optax.identity(),
        _update_rule(settings),
        optax.add_decayed_weights(settings.weight_decay, mask={n: decays(n) for n in factors}),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, dict(factors))),
        optax.scale_by_learning_rate(make_schedule(settings, steps)),
    )


def _update_rule(settings: Optimizer) -> optax.GradientTransformation:
    b1, b2, eps = settings.b1, settings.b2, settings.eps
    if settings.name == "adamw":
        return optax.scale_by_adam(b1, b2, eps)
    if settings.name == "adafactor":
        factored = optax.scale_by_factored_rms(decay_rate=0.8)
        return optax.chain(factored, optax.clip_by_block_rms(1.0))
    if settings.name == "muon":
        # Updates as large as Adam's, so that the same learning rates fit.
        options: Any = {"consistent_rms": 0.2, "muon_weight_dimension_numbers": _matrices}
        muon = optax.contrib.muon(1.0, beta=b1, adam_b1=b1, adam_b2=b2, eps=eps, **options)
        # optax's Muon negates its updates; scale_by_learning_rate negates them again.
        return optax.chain(muon, optax.scale(-1.0))
    return optax.identity()


def _matrices(params: Flat) -> dict[str, Any]:
    """Muon's two axes of each matrix; None for what gets Adam: embeddings, norms and biases.

    Leading axes are stacks: layers, experts, heads of q, k and v, gate and up.
    """

    found: dict[str, Any] = dict.fromkeys(params)
    for name, x in params.items():
        outside = name in ("embed", "head") or name.endswith((".pos", "patch.weight"))
        # Muon masks its own leaves, which have no ndim then.
        if hasattr(x, "ndim") and not outside and decays(name):
            # attn.o is [D N H], which sums over all heads
            heads, n = name.endswith("attn.o"), x.ndim
            axes = ((n - 2, n - 1), n - 3) if heads else (n - 1, n - 2)
            found[name] = optax.contrib.MuonDimensionNumbers(*axes)
    return found


def apply_update(
    name: str, weight: jax.Array, update: jax.Array, key: jax.Array, low_bits: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """(new weight, new low bits) after adding an fp32 update.

    A bf16 weight is too coarse for small updates. With low_bits (see `split_bits`) the sum is exact;
    without, it is rounded stochastically, which is right on average.
    """
    total = exact(weight, low_bits) + update
    if low_bits is not None:
        return split_bits(total)
    wide = weight.dtype == jnp.float32
    return total if wide else round_by_chance(total, named_key(key, name)), None


def split_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """fp32 -> (nearest bf16, int16 of the low bits): the same number in the same four bytes."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Ties away from zero: the low bits fit int16.
    upper = (bits + jnp.uint32(0x8000)) >> 16
    low_bits = (bits - (upper << 16)).astype(jnp.uint16)
    near = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return near, jax.lax.bitcast_convert_type(low_bits, jnp.int16)


def exact(weight: jax.Array, low_bits: jax.Array | None) -> jax.Array:
    """A weight in fp32: the inverse of `split_bits` if there are low bits."""
    if low_bits is None:
        return weight.astype(jnp.float32)
    upper = jax.lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32) << 16
    bits = upper + low_bits.astype(jnp.int32).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def round_by_chance(x: jax.Array, key: jax.Array) -> jax.Array:
    """fp32 -> bf16 by stochastic rounding: up with the probability of the distance to the value below.

    Philox gives the same bits in each run of one program, much faster than threefry.
    """
    seed = jnp.tile(jax.random.key_data(key), 2)
    philox = jax.lax.RandomAlgorithm.RNG_PHILOX
    _, noise = jax.lax.rng_bit_generator(seed, x.shape, jnp.uint32, algorithm=philox)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key for a name, the same in every run."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
