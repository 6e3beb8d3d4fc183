"""How many parameters a recipe trains and what a device would hold, from shapes alone."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3vl_jax.checkpoint import quantize
from qwen3vl_jax.checkpoint.device_load import as_structs
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, device_bytes
from qwen3vl_jax.checkpoint.param_paths import nest, parse_path
from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import layout_mesh
from qwen3vl_jax.model.structs import FEW, Params
from qwen3vl_jax.training import param_groups, state_sharding, train_model
from qwen3vl_jax.training.param_groups import Flat, MergeParams
from qwen3vl_jax.training.recipe import Recipe, few_bits
from qwen3vl_jax.training.stacked_load import stacked

# In fp32, or in 16 bits beside a copy of their weights in 16 bits: as many bytes.
GRADIENTS = "gradients"
# What remat "auto" chooses from, the fastest first, and the share of a device that its estimate may fill.
AUTO, AUTO_SHARE = ("dots", "narrow", "full"), 0.9


class Held(NamedTuple):
    """Shapes and dtypes of what a run holds: ShapeDtypeStructs by name."""

    weights: Flat
    frozen: Flat
    state: Any  # TrainState
    merge: Any = None  # param_groups.MergeParams

    def by_group(self, recipe: Recipe, cfg: Config) -> dict[str, tuple[int, int, tuple]]:
        """{group: (parameters trained, parameters frozen, factors of the learning rate)}."""
        sparse = bool(cfg.text.num_experts)
        rates = param_groups.learning_rates(list(self.weights), recipe.train.rates, sparse)
        # The scales of 8-bit weights are no parameters.
        scales = {n.removesuffix(VALUES) + SCALE for n in self.frozen if n.endswith(VALUES)}
        out = {}
        for group in param_groups.GROUPS:
            trained = param_groups.matching(self.weights, group, sparse)
            frozen = param_groups.matching(self.frozen.keys() - scales, group, sparse)
            if trained or frozen:
                count = sum(math.prod(self.weights[n].shape) for n in trained)
                left = sum(math.prod(self.frozen[n].shape) for n in frozen)
                out[group] = count, left, tuple(sorted({rates[n] for n in trained}))
        return out


def held(recipe: Recipe, cfg: Config) -> Held:
    """What a run of this recipe would hold. Raises InputError as `train_model.split_trainable` does."""
    # It knows names and no arrays.
    merges: list[MergeParams] = []

    def split(params: Params) -> tuple[Flat, Flat]:
        weights, frozen, merge = train_model.split_trainable(recipe, cfg, params)
        merges.append(merge)
        return weights, frozen

    weights, frozen = jax.eval_shape(split, _params(recipe, cfg))
    optimizer = train_model.build_optimizer(recipe, cfg, weights)
    state = train_model.shape_of_state(recipe, cfg, optimizer, weights, None)
    return Held(weights, frozen, state, merges[0])


def _params(recipe: Recipe, cfg: Config) -> Params:
    """The shapes of the parameters that a run reads, those of few bits as values and scales."""
    leaves = {parse_path(name): x for name, x in train_model.shapes(cfg).items()}
    if base := few_bits(recipe):
        # The scales of FP8, in blocks, are about as many.
        kind = "int8" if base == "fp8" else base
        for path, param in quantize.quantized_params(cfg).items():
            name, shape = stacked(cfg, path, param.shape)
            leaves.pop(name, None)
            code = quantize.CODES[quantize.kind_of(param, kind)][0]
            code = jnp.dtype(jnp.float8_e4m3fn) if base == "fp8" else code
            leaves[(*name, VALUES)] = jax.ShapeDtypeStruct(shape, code)
            scales = stacked(cfg, path, quantize.scale_shape(param, kind))[1]
            leaves[(*name, SCALE)] = jax.ShapeDtypeStruct(scales, jnp.float32)
    taps = cfg.vision.deepstack_visual_indexes
    return as_structs(nest(leaves.items(), empty=() if taps else [("vision", "deepstack")]))


def on_mesh(recipe: Recipe, cfg: Config, parts: Held, mesh: Any) -> dict[str, Any]:
    """{part: arrays with their shardings} of all that a run holds between steps."""
    of_state = state_sharding.state_shardings(mesh, cfg, parts.state)
    of_frozen = state_sharding.params_shardings(mesh, cfg, parts.frozen)
    state = state_sharding.with_shardings(parts.state, of_state)
    gradients = {n: x.update(dtype=jnp.float32) for n, x in state.weights.items()}
    return {
        f"trained weights ({recipe.step.weights})": state.weights,
        "frozen weights": state_sharding.with_shardings(parts.frozen, of_frozen),
        GRADIENTS: gradients,
        f"optimizer ({recipe.optimizer.name})": state.optimizer,
        "compensation": state.compensation,
        "moving average": state.average,
    }


def held_bytes(held: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a device's part of each tree, empty ones left out."""

    def size(x: Any) -> int:
        return device_bytes(math.prod(x.sharding.shard_shape(x.shape)), jnp.dtype(x.dtype))

    found = {name: sum(map(size, jax.tree.leaves(tree))) for name, tree in held.items()}
    return {name: size for name, size in found.items() if size}


def memory(recipe: Recipe, cfg: Config, parts: Held) -> dict[str, int]:
    """Bytes on each device by part: weights, gradients and optimizer exactly, the rest an estimate."""
    found = held_bytes(on_mesh(recipe, cfg, parts, layout_mesh(recipe.mesh.sizes)))
    if GRADIENTS in found and recipe.step.accumulate > 1:
        found[GRADIENTS] *= 2
    found[f"activations (remat {recipe.step.remat}), about"] = _activations(recipe, cfg, parts)
    found["weights of few bits as they are multiplied, about"] = _dequantized(recipe, cfg, parts)
    # Of some words for all tokens, and their gradient, in fp32.
    tokens = recipe.pack.rows * recipe.pack.length / recipe.mesh.devices
    logits = round(2 * 4 * tokens * min(recipe.step.loss_chunk, cfg.text.vocab_size))
    found["logits of a chunk of the loss"] = logits
    return {name: size for name, size in found.items() if size}


def with_remat(recipe: Recipe, cfg: Config, room: int) -> Recipe:
    """The recipe with a policy in place of remat "auto": the fastest that devices of `room` bytes hold.

    0 bytes, which are not known, give "full".
    """
    if recipe.step.remat != "auto":
        return recipe
    parts, tried = held(recipe, cfg), recipe
    for remat in AUTO:
        tried = dataclasses.replace(recipe, step=dataclasses.replace(recipe.step, remat=remat))
        if sum(memory(tried, cfg, parts).values()) <= AUTO_SHARE * room:
            break
    return tried


def _dequantized(recipe: Recipe, cfg: Config, parts: Held) -> int:
    """Bytes in 16 bits of the head and of three layers, if they have few bits. Found in compiled steps."""
    sizes = {n: math.prod(x.shape) for n, x in parts.frozen.items() if n.endswith(VALUES)}
    layers = {n for n in sizes if n.startswith("layers.")}
    head = max((sizes[n] for n in sizes.keys() - layers), default=0)
    of_layer = sum(sizes[n] for n in layers) // cfg.text.num_hidden_layers
    return jnp.dtype(recipe.step.dtype).itemsize * (head + 3 * of_layer)


def _activations(recipe: Recipe, cfg: Config, parts: Held) -> int:
    """Bytes kept from the forward pass of one micro batch, and of one layer that is computed again."""
    t, v, split = cfg.text, cfg.vision, recipe.mesh.devices
    item = jnp.dtype(recipe.step.dtype).itemsize
    width = t.num_experts_per_tok * t.moe_intermediate_size or t.intermediate_size
    heads = (t.num_attention_heads + 2 * t.num_key_value_heads) * t.head_dim
    # (stream, narrow products: q k v, o, down, and wide ones: gate and up; attention with its sums in fp32
    # for each of FEW segments) values a token and layer
    attended = t.num_attention_heads * (t.head_dim + 2 * FEW)
    text = (t.hidden_size, heads + 2 * t.hidden_size, 2 * width, attended)
    seen_by = v.hidden_size + 2 * FEW * v.num_heads
    image = (v.hidden_size, 5 * v.hidden_size, v.intermediate_size, seen_by)
    tokens = recipe.pack.rows * recipe.pack.length / split
    patches = recipe.pack.vision_rows * recipe.pack.vision_length / split
    # What is frozen keeps nothing.
    seen, merged = (
        param_groups.matching(parts.weights, group, bool(t.num_experts))
        for group in ("vision", "merger")
    )
    towers = (tokens, t.num_hidden_layers, text), (patches, v.depth if seen else 0, image)
    # A merger's inputs and products, in part in fp32, whatever remat is.
    mergers = 1 + len(v.deepstack_visual_indexes) if merged else 0
    total, most = patches * item * mergers * 5.5 * v.hidden_size, 0.0
    for places, layers, (stream, narrow, wide, attended) in towers:
        kept = {
            "full": stream,
            "offload": 0,
            "narrow": stream + narrow + attended,
            "dots": stream + narrow + wide + attended,
            # With norms and activations.
            "none": 3 * stream + 1.5 * (narrow + wide),
        }[recipe.step.remat]
        total += places * item * layers * kept
        # One layer at a time, with its gradients.
        most = max(most, places * item * (2 * stream + 3 * (narrow + wide)))
    if recipe.lora.rank and recipe.lora.dropout:
        # A mask and an input of its own for each of seven modules of a layer.
        layers = t.num_hidden_layers if recipe.step.remat == "none" else 1
        total += tokens * item * layers * 2 * (6 * t.hidden_size + width)
    return round(total + most)
