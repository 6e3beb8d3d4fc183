"""Random parameters, and the logical axes of all of them, from what the model's modules declare.

Each module says its parameters' sizes and logical axes by `weight` (model/layers.py); Tables are those
outside the layers. sharding.RULES maps the axes to a mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen3vl_jax.config import Config, TextConfig, VisionConfig
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.layers import ones, weight
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.model.text import Block, split_heads
from qwen3vl_jax.model.vision import PatchEmbed, PatchMerger, VisionBlock


class Tables(nn.Module):
    """Parameters outside the layers: {name: its dims as in `weight`}. One of a single dim is a norm."""

    cfg: TextConfig | VisionConfig
    dims: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> None:
        for name, dims in self.dims.items():
            weight(self, name, *dims, init=ones if len(dims) == 1 else None)


def init_params(key: jax.Array, cfg: Config, dtype=jnp.float32) -> Params:
    """Random parameters: normal(initializer_range), unit norms, zero biases; layers are lists. Jit it.

    `jax.eval_shape(functools.partial(init_params, cfg=cfg), key)` gives the shapes for free.
    """
    if not isinstance(cfg, Config):
        found = "an array" if isinstance(cfg, jax.Array) else type(cfg).__name__
        raise InputError(f"cfg: got {found}, expected a Config; the order is (key, cfg, dtype)")
    return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(_boxed_params(key, cfg)))


def _boxed_params(key: jax.Array, cfg: Config) -> Params:
    """Parameters in the Flax boxes that hold their logical axis names."""
    keys = iter(jax.random.split(key, 8 + cfg.text.num_hidden_layers + 2 * cfg.vision.depth))
    t, c = cfg.text, cfg.vision

    def init(count: int, module: nn.Module, *inputs: Any) -> list[Any]:
        traced_once = jax.jit(lambda key: module.lazy_init(key, *inputs)["params"])
        return [traced_once(next(keys)) for _ in range(count)]

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    # Inputs are shapes alone: no layer is computed.
    x, rotary = shape(1, 1, t.hidden_size), (shape(1, 1, 1, t.head_dim // 2),) * 2
    patches, angles = shape(c.merge_unit, c.hidden_size), (shape(1, 1, 1, c.head_dim // 2),) * 2
    row, ranges = shape(1, 1, c.hidden_size), (shape(1, 1, dtype=jnp.int32),) * 2
    positions = (c.num_position_embeddings, None), (c.hidden_size, "vision_embed")
    vision = {
        "patch": init(1, PatchEmbed(c), shape(1, math.prod(c.patch_shape)))[0],
        **init(1, Tables(c, {"pos": positions}))[0],
        "blocks": init(c.depth, VisionBlock(c), row, angles, *ranges),
        "merger": init(1, PatchMerger(c, False), patches)[0],
        "deepstack": init(len(c.deepstack_visual_indexes), PatchMerger(c, True), patches),
    }
    layers = init(t.num_hidden_layers, Block(t), x, rotary, lambda *y: (split_heads(*y)[0], None))
    words = (t.vocab_size, "vocab"), (t.hidden_size, "embed")
    tables = {"embed": words, "norm": ((t.hidden_size, None),)}
    tables |= {} if cfg.tie_word_embeddings else {"head": words}
    return {**init(1, Tables(t, tables))[0], "layers": layers, "vision": vision}


def logical_axes(cfg: Config) -> dict[str, tuple[str | None, ...]]:
    """{"layers.attn.qkv": ("kv_heads", None, None, "embed"), ..}, of a model of one layer per tower."""
    text = dataclasses.replace(cfg.text, num_hidden_layers=1)
    vision = dataclasses.replace(cfg.vision, depth=1)
    small = dataclasses.replace(cfg, text=text, vision=vision)
    boxed = jax.eval_shape(functools.partial(_boxed_params, cfg=small), jax.random.key(0))
    boxed = {**boxed, "layers": boxed["layers"][0]}
    boxed["vision"] = {**boxed["vision"], "blocks": boxed["vision"]["blocks"][0]}
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x.names for path, x in leaves}
