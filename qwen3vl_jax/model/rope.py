"""Rotary embeddings: interleaved MRoPE with its scaling types, 2-D rotary of the ViT. Dims: layers.py."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax import rope_config
from qwen3vl_jax.config import TextConfig

Rotary = tuple[jax.Array, jax.Array]  # cos and sin of the angles


def mrope_axes(section: tuple[int, ...], half: int) -> np.ndarray:
    """Position axis (T, H, W = 0, 1, 2) of each of the `half` frequencies: interleaved MRoPE, int32.

    [4, 2, 2] gives 0 1 2 0 1 2 0 0: H at 1, 4, .. below 3 * section[1], W at 2, 5, .. below
    3 * section[2], T elsewhere. Source: Qwen3-VL report, arXiv 2511.21631.
    """
    axes = np.zeros(half, np.int32)
    axes[1 : 3 * section[1] : 3] = 1
    axes[2 : 3 * section[2] : 3] = 2
    return axes


def mrope(cfg: TextConfig, positions: jax.Array, dtype, longest: jax.Array | None = None) -> Rotary:
    """MRoPE ids [3 B T] -> cos and sin [B T 1 H/2] of their angles, computed in fp32, cast to dtype.

    longest: the largest position of the whole sequences when `positions` is one chunk of them.
    """
    inverse, scale = inverse_frequencies(cfg, jnp.max(positions) if longest is None else longest)
    axes = mrope_axes(cfg.rope.mrope_section, cfg.head_dim // 2)
    angles = jnp.moveaxis(positions.astype(jnp.float32)[axes], 0, -1) * inverse
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    return cos[:, :, None].astype(dtype), sin[:, :, None].astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + H/2]) of x [.. H] by the angles whose cos and sin are [.. H/2]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def vision_rotary(head_dim: int, theta: float, coords: jax.Array) -> Rotary:
    """coords [.. 2] (row, column in the frame) -> cos and sin [.. 1 H/2] fp32: rows, then columns."""
    quarter = head_dim // 4
    exponents = np.arange(quarter, dtype=np.float32) / np.float32(quarter)
    inverse = 1.0 / np.float32(theta) ** exponents
    angles = coords.astype(jnp.float32)[..., None] * inverse  # [.. 2 H/4]
    angles = angles.reshape(*coords.shape[:-1], 1, 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


def inverse_frequencies(cfg: TextConfig, longest: jax.Array) -> tuple[jax.Array, float]:
    """The H/2 inverse frequencies in fp32, and the factor on cos and sin.

    Only dynamic and longrope use the largest position: as in the reference, that of the whole batch.
    Sources: linear, dynamic NTK (transformers), YaRN 2309.00071, LongRoPE 2402.13753, Llama 3.1.
    """
    r, dim = cfg.rope, cfg.head_dim
    exponents, powers = rope_config.powers_of(r, dim)
    if r.rope_type == "dynamic":
        limit = cfg.max_position_embeddings
        length = jnp.maximum(longest + 1, limit).astype(jnp.float32)
        stretch = r.factor * length / limit - (r.factor - 1)
        return 1.0 / (r.theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
    if r.rope_type == "longrope":
        short, long = (np.asarray(f, np.float32) * powers for f in (r.short_factor, r.long_factor))
        beyond = longest + 1 > r.original_max_position_embeddings
        return 1.0 / jnp.where(beyond, long, short), rope_config.longrope_scale(r)
    inverse, scale = rope_config.fixed_frequencies(r, dim)
    return jnp.asarray(inverse), scale
