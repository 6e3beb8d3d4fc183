"""The vision tower: patches, ViT blocks, mergers, DeepStack. Dims as in layers.py; W rows of P patches."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config, VisionConfig
from qwen3vl_jax.model.attention import attend, host_bound
from qwen3vl_jax.model.layers import ACTIVATIONS, LayerNorm, linear, run_layers, weight, zeros
from qwen3vl_jax.model.quantized import dequantize
from qwen3vl_jax.model.rope import rotate, vision_rotary
from qwen3vl_jax.model.sharding import jit_wide, shard
from qwen3vl_jax.model.structs import Features, Params, VisionInputs, check_call

# Logical axes of patches [W P D].
PATCHES = ("vision_batch", "patches", None)


class PatchEmbed(nn.Module):
    """Patch embedding [.. C] -> [.. D]: the reference's Conv3d as a product, since stride = kernel."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        d = (self.cfg.hidden_size, "vision_embed")
        kernel = weight(self, "weight", d, *((n, None) for n in self.cfg.patch_shape))
        bias = weight(self, "bias", d, init=zeros)
        x = pixels.reshape(*pixels.shape[:-1], *self.cfg.patch_shape)
        return linear(x, kernel, bias, in_dims=len(self.cfg.patch_shape))


class VisionAttention(nn.Module):
    """Attention of every patch to its own frame; q and k are rotated by row and column in fp32."""

    cfg: VisionConfig
    segments: int = 0

    @nn.compact
    def __call__(self, x, rotary, lo, hi) -> jax.Array:
        d, n = (self.cfg.hidden_size, "vision_embed"), (self.cfg.num_heads, "vision_heads")
        h = (self.cfg.head_dim, None)
        w = weight(self, "qkv", (3, None), n, h, d)
        qkv = linear(x, w, weight(self, "qkv_bias", (3, None), n, h, init=zeros))
        q, k, v = (y[:, :, 0] for y in jnp.split(qkv, 3, axis=2))
        q, k = (rotate(y.astype(jnp.float32), *rotary).astype(x.dtype) for y in (q, k))
        out = attend(q, k, v, lo, hi, layout="frames", segments=self.segments)
        o, bias = weight(self, "o", d, n, h), weight(self, "o_bias", d, init=zeros)
        return linear(out, o, bias, in_dims=2)


class VisionMlp(nn.Module):
    cfg: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = (self.cfg.hidden_size, "vision_embed"), (self.cfg.intermediate_size, "vision_mlp")
        bias = weight(self, "fc1_bias", f, init=zeros)
        x = ACTIVATIONS[self.cfg.hidden_act](linear(x, weight(self, "fc1", f, d), bias, wide=True))
        return linear(x, weight(self, "fc2", d, f), weight(self, "fc2_bias", d, init=zeros))


class VisionBlock(nn.Module):
    """One ViT layer, pre-LN: x [W P D] -> [W P D]."""

    cfg: VisionConfig
    segments: int = 0

    @nn.compact
    def __call__(self, x, rotary, lo, hi) -> jax.Array:
        y = LayerNorm(name="ln1")(x)
        x = x + VisionAttention(self.cfg, self.segments, name="attn")(y, rotary, lo, hi)
        return x + VisionMlp(self.cfg, name="mlp")(LayerNorm(name="ln2")(x))


class PatchMerger(nn.Module):
    """Merges merge_size^2 patches into one token: [W P Dv] -> [W R D]. Its GELU is the exact one.

    The main merger normalises each patch and then groups; a DeepStack merger groups first.
    """

    cfg: VisionConfig
    norm_after_grouping: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.cfg.hidden_size * self.cfg.merge_unit
        grouped = (*x.shape[:-2], -1, wide)
        x = x.reshape(grouped) if self.norm_after_grouping else x
        x = LayerNorm(name="norm")(x).reshape(grouped)
        d, f = (wide, "vision_mlp"), (wide, "vision_embed")
        out = (self.cfg.out_hidden_size, "embed")
        x = linear(x, weight(self, "fc1", d, f), weight(self, "fc1_bias", d, init=zeros))
        x = ACTIVATIONS["gelu"](x)
        return linear(x, weight(self, "fc2", out, d), weight(self, "fc2_bias", out, init=zeros))


def vision_encode(
    params: Params, cfg: Config, vis: VisionInputs, *, dtype: Any = None, remat: str = "none"
) -> Features:
    """Runs the vision tower over P patches: merged features [R D] and DeepStack features [n R D].

    DeepStack level k is the residual after block deepstack_visual_indexes[k], through a merger of its own.
    Fields of `vis` may have a leading axis [W P ..]; each row is attended by itself, its ranges count
    inside the row, R over all rows. `params` is the whole tree or its "vision" part. dtype: of the
    computation, None for the parameters'. remat: a name of layers.REMAT.
    """
    check_call(params, cfg, vision=vis)
    p, c = params.get("vision", params), cfg.vision
    rest, taken = {**p, "blocks": None}, c.deepstack_visual_indexes
    dtype = p["patch"]["weight"].dtype if dtype is None else dtype
    segments = host_bound(vis.lo, vis.hi, vis.frames)
    x, *given = embed_patches(rest, c, vis, jnp.dtype(dtype).name)
    if isinstance(p["blocks"], (list, tuple)) and remat == "none":
        kept = {}
        for i, layer in enumerate(p["blocks"]):
            x = run_block(c, segments, layer, x, *given)
            kept |= {i: x} if i in taken else {}
        return _merge(rest, c, x, [kept[i] for i in taken])
    # DeepStack level of each block; blocks without one write past the end, which is dropped.
    levels = [taken.index(i) if i in taken else len(taken) for i in range(c.depth)]
    level_of = jnp.asarray(levels)

    def body(carry, layer, i):
        x, deepstack = carry
        x = run_block(c, segments, layer, x, *given)
        return (x, deepstack.at[level_of[i]].set(x, mode="drop") if len(taken) else deepstack), None

    none = jnp.zeros((len(taken), *x.shape), x.dtype)
    (x, deepstack), _ = run_layers(body, (x, none), p["blocks"], remat)
    return _merge(rest, c, x, list(deepstack))


@functools.partial(jit_wide, static_argnames=("c", "dtype"))
@jax.named_scope("vision")
def embed_patches(p, c, vis, dtype):
    """Patches [W P Dv] with their positions, and what every block takes: angles, lo, hi."""
    if vis.lo.ndim == 1:
        vis = jax.tree.map(lambda x: x[None], vis)
    x: Any = PatchEmbed(c).apply({"params": p["patch"]}, vis.pixels.astype(dtype))
    # Learned positions, replicated: the table is small, and every device looks up in it.
    table = shard(dequantize(p["pos"], jnp.float32), None, None)
    positions = jnp.einsum("wpad,wpa->wpd", table[vis.pos_index], vis.pos_weight)
    x = shard(x + positions.astype(x.dtype), *PATCHES)
    return x, vision_rotary(c.head_dim, c.rope_theta, vis.coords), vis.lo, vis.hi


@functools.partial(jit_wide, static_argnames=("c", "segments"))
def run_block(c, segments, layer, x, rotary, lo, hi):
    """One block: one program for all blocks, if not traced."""
    out: Any = VisionBlock(c, segments).apply({"params": layer}, x, rotary, lo, hi)
    return shard(out, *PATCHES)


@functools.partial(jit_wide, static_argnames="c")
def _merge(p, c, x, deepstack):
    def merge(norm_after_grouping: bool, merger: Params, x: jax.Array) -> jax.Array:
        y: Any = PatchMerger(c, norm_after_grouping).apply({"params": merger}, x)
        return shard(y, *PATCHES).reshape(-1, y.shape[-1])

    merged = merge(False, p["merger"], x)
    levels = [merge(True, q, y) for q, y in zip(p["deepstack"], deepstack, strict=True)]
    none = jnp.zeros((0, *merged.shape), merged.dtype)
    return Features(merged, jnp.stack(levels) if levels else none)
