"""The vision tower: patch embedding, ViT blocks, patch merger, DeepStack mergers. Dims as in layers.py."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.config import Config, VisionConfig
from qwen3vl_jax.model.attention import attend
from qwen3vl_jax.model.layers import (
    ACTIVATIONS,
    LayerNorm,
    apply,
    linear,
    run_layers,
    weight,
    zeros,
)
from qwen3vl_jax.model.quantized import Weight, dequantize
from qwen3vl_jax.model.rope import rotate, vision_rotary
from qwen3vl_jax.model.sharding import shard
from qwen3vl_jax.model.structs import (
    Features,
    Params,
    VisionInputs,
    check_call,
)


class PatchEmbed(nn.Module):
    """The reference's Conv3d, whose stride is its kernel, as the matrix product it is."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        d = (self.cfg.hidden_size, "vision_embed")
        kernel = weight(self, "weight", d, *((n, None) for n in self.cfg.patch_shape))
        bias = weight(self, "bias", d, init=zeros)
        x = pixels.reshape(*pixels.shape[:-1], *self.cfg.patch_shape)
        return linear(x, kernel, bias, in_dims=len(self.cfg.patch_shape))


class VisionAttention(nn.Module):
    """Attention of every patch to its own frame; q and k turned by row and column, in fp32."""

    cfg: VisionConfig
    frames: int = 0

    @nn.compact
    def __call__(self, x, rotary, lo, hi) -> jax.Array:
        d, n = (self.cfg.hidden_size, "vision_embed"), (self.cfg.num_heads, "vision_heads")
        h = (self.cfg.head_dim, None)
        qkv = linear(x, weight(self, "qkv", (3, None), n, h, d),
                     weight(self, "qkv_bias", (3, None), n, h, init=zeros))  # fmt: skip
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = (rotate(y.astype(jnp.float32), *rotary).astype(x.dtype) for y in (q, k))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        names = ("vision_rows", "patches")
        out = attend(q, k, v, lo, hi, names=names, layout="frames", segments=self.frames)
        o, bias = weight(self, "o", d, n, h), weight(self, "o_bias", d, init=zeros)
        return linear(out, o, bias, in_dims=2)


class VisionMlp(nn.Module):
    cfg: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = (self.cfg.hidden_size, "vision_embed"), (self.cfg.intermediate_size, "vision_mlp")
        x = linear(x, weight(self, "fc1", f, d), weight(self, "fc1_bias", f, init=zeros))
        x = ACTIVATIONS[self.cfg.hidden_act](x)
        return linear(x, weight(self, "fc2", d, f), weight(self, "fc2_bias", d, init=zeros))


class VisionBlock(nn.Module):
    """One ViT layer, pre-LN: x [W P D] -> [W P D]."""

    cfg: VisionConfig
    frames: int = 0

    @nn.compact
    def __call__(self, x, rotary, lo, hi) -> jax.Array:
        y = LayerNorm(name="ln1")(x)
        x = x + VisionAttention(self.cfg, self.frames, name="attn")(y, rotary, lo, hi)
        return x + VisionMlp(self.cfg, name="mlp")(LayerNorm(name="ln2")(x))


class PatchMerger(nn.Module):
    """Every merge_size^2 patches become one token: [W P Dv] -> [W R D]. The GELU is the exact one.

    The main merger normalises patches and then groups them; a DeepStack merger the other way round.
    """

    cfg: VisionConfig
    norm_after_grouping: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.cfg.hidden_size * self.cfg.merge_unit
        grouped = (*x.shape[:-2], -1, wide)
        if self.norm_after_grouping:
            x = LayerNorm(name="norm")(x.reshape(grouped))
        else:
            x = LayerNorm(name="norm")(x).reshape(grouped)
        d, f, out = (
            (wide, "vision_mlp"),
            (wide, "vision_embed"),
            (self.cfg.out_hidden_size, "embed"),
        )
        x = linear(x, weight(self, "fc1", d, f), weight(self, "fc1_bias", d, init=zeros))
        x = ACTIVATIONS["gelu"](x)
        return linear(x, weight(self, "fc2", out, d), weight(self, "fc2_bias", out, init=zeros))


def position_embedding(table: Weight, vis: VisionInputs) -> jax.Array:
    """Learned positions [W P Dv] in fp32, bilinear between the four neighbours in the table."""
    table = shard(
        dequantize(table, jnp.float32), None, None
    )  # small, and looked up by every device
    return jnp.einsum("wpad,wpa->wpd", table[vis.pos_index], vis.pos_weight)


def vision_encode(
    params: Params, cfg: Config, vis: VisionInputs, *, dtype: Any = None, remat: str = "none"
) -> Features:
    """Runs the vision tower over P patches: merged embeddings [R D] and DeepStack taps [n R D].

    Fields of `vis` may have a leading axis [W P ..] of rows that are attended each by itself, with
    ranges counted inside the row; R counts over all of them. dtype: of the computation, None is that
    of the parameters. remat: a name of `layers.REMAT`.
    Tap k is the residual stream right after block deepstack_visual_indexes[k], through its own merger.
    `params` is the whole tree or its "vision" part.
    """
    check_call(params, cfg, vision=vis)
    p, c = params.get("vision", params), cfg.vision
    if vis.lo.ndim == 1:
        vis = jax.tree.map(lambda x: x[None], vis)
    dtype = p["patch"]["weight"].dtype if dtype is None else dtype
    x = apply(PatchEmbed(c), p["patch"], vis.pixels.astype(dtype))
    x = _cut_by_pictures(x + position_embedding(p["pos"], vis).astype(x.dtype))
    rotary = vision_rotary(c.head_dim, c.rope_theta, vis.coords)
    count = len(c.deepstack_visual_indexes)
    slot = np.full(c.depth, count)  # past the end: dropped
    slot[list(c.deepstack_visual_indexes)] = np.arange(count)
    slot = jnp.asarray(slot)

    def body(carry, layer, i):
        x, taps = carry
        x = _cut_by_pictures(apply(VisionBlock(c, vis.frames), layer, x, rotary, vis.lo, vis.hi))
        return (x, taps.at[slot[i]].set(x, mode="drop") if count else taps), None

    (x, taps), _ = run_layers(body, (x, jnp.zeros((count, *x.shape), x.dtype)), p["blocks"], remat)

    def merge(last: bool, p: Params, x: jax.Array) -> jax.Array:
        y = apply(PatchMerger(c, last), p, x)
        return _cut_by_pictures(y).reshape(-1, y.shape[-1])

    merged = merge(False, p["merger"], x)
    deep = [merge(True, q, t) for q, t in zip(p["deepstack"], taps, strict=True)]
    return Features(
        merged, jnp.stack(deep) if deep else jnp.zeros((0, *merged.shape), merged.dtype)
    )


def _cut_by_pictures(x: jax.Array) -> jax.Array:
    return shard(x, "vision_rows", "patches", None)
