"""Rotary embeddings: interleaved MRoPE with its scaling types, and the 2-D rotary of the ViT."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.rope_config import RopeConfig


def mrope_axes(section: tuple[int, ...], half: int) -> np.ndarray:
    """Which of T, H, W (0, 1, 2) turns each of the `half` frequencies: interleaved MRoPE.

    [4, 2, 2] gives 0 1 2 0 1 2 0 0: H at 1, 4, .. below 3 * section[1], W at 2, 5, .. below
    3 * section[2], T elsewhere. Source: Qwen3-VL report, arXiv 2511.21631.
    """
    axes = np.zeros(half, np.int32)
    axes[1 : 3 * section[1] : 3] = 1
    axes[2 : 3 * section[2] : 3] = 2
    return axes


def mrope(
    cfg: TextConfig, positions: jax.Array, dtype, longest: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """positions [3 B T] -> cos and sin [B T 1 H/2], computed in fp32 and cast to dtype.

    longest: the largest position of rows of which these positions are a piece.
    """
    inverse, scale = inverse_frequencies(cfg, jnp.max(positions) if longest is None else longest)
    axes = mrope_axes(cfg.rope.mrope_section, cfg.head_dim // 2)
    angles = jnp.moveaxis(positions.astype(jnp.float32)[axes], 0, -1) * inverse
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    return cos[:, :, None].astype(dtype), sin[:, :, None].astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + H/2]) of x [.. H] by the angles of cos and sin [.. H/2]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def vision_rotary(head_dim: int, theta: float, coords: jax.Array) -> tuple[jax.Array, jax.Array]:
    """coords [.. 2] (row, column in the frame) -> cos and sin [.. 1 H/2] in fp32: rows, then columns."""
    quarter = head_dim // 4
    inverse = 1.0 / np.float32(theta) ** (
        np.arange(quarter, dtype=np.float32) / np.float32(quarter)
    )
    angles = coords.astype(jnp.float32)[..., None] * inverse  # [.. 2 H/4]
    angles = angles.reshape(*coords.shape[:-1], 1, 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


def inverse_frequencies(cfg: TextConfig, longest: jax.Array) -> tuple[jax.Array, float]:
    """The H/2 inverse frequencies in fp32 and the factor on cos and sin.

    Only dynamic and longrope look at the largest position: as in the reference, the longest row of the
    call decides for all of it. Sources: linear and dynamic NTK (transformers), YaRN arXiv 2309.00071,
    LongRoPE arXiv 2402.13753, Llama 3.1.
    """
    r, dim = cfg.rope, cfg.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.float32(r.theta) ** exponents
    if r.rope_type == "linear":
        return jnp.asarray(1.0 / powers / np.float32(r.factor)), 1.0
    if r.rope_type == "dynamic":
        limit = cfg.max_position_embeddings
        length = jnp.maximum(longest + 1, limit).astype(jnp.float32)
        stretch = r.factor * length / limit - (r.factor - 1)
        return 1.0 / (r.theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
    if r.rope_type == "longrope":
        limit = r.original_max_position_embeddings
        short, long = (np.asarray(f, np.float32) * powers for f in (r.short_factor, r.long_factor))
        beyond = longest + 1 > limit
        return 1.0 / jnp.where(beyond, long, short), _longrope_scale(r)
    if r.rope_type == "yarn":
        return jnp.asarray(_yarn(r, powers, dim)), _yarn_scale(r)
    if r.rope_type == "llama3":
        return jnp.asarray(_llama3(r, 1.0 / powers)), 1.0
    return jnp.asarray(1.0 / powers), 1.0


def _longrope_scale(r: RopeConfig) -> float:
    if r.attention_factor is not None:
        return r.attention_factor
    if r.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(r.factor) / math.log(r.original_max_position_embeddings))


def _yarn_scale(r: RopeConfig) -> float:
    def mscale(m: float) -> float:
        return 1.0 if r.factor <= 1 else 0.1 * m * math.log(r.factor) + 1.0

    if r.attention_factor is not None:
        return r.attention_factor
    if r.mscale and r.mscale_all_dim:
        return mscale(r.mscale) / mscale(r.mscale_all_dim)
    return mscale(1.0)


def _yarn(r: RopeConfig, powers: np.ndarray, dim: int) -> np.ndarray:
    """Interpolated at low frequencies, untouched at high ones, a linear ramp between."""

    def dimension_of(rotations: float) -> float:
        ratio = r.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(r.theta))

    low, high = dimension_of(r.beta_fast or 32.0), dimension_of(r.beta_slow or 1.0)
    if r.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    ramp = ramp.astype(np.float32)
    return 1.0 / (np.float32(r.factor) * powers) * ramp + 1.0 / powers * (1 - ramp)


def _llama3(r: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, smoothed between."""
    turns = r.original_max_position_embeddings * inverse / np.float32(2 * math.pi)
    smooth = (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)
    smooth = np.clip(smooth, 0, 1).astype(np.float32)
    return (1 - smooth) * inverse / np.float32(r.factor) + smooth * inverse
