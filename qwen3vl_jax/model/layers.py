"""What both towers are made of: weight(), linear(), norms, activations, and the loop over layers.

Dims, used in every file:
  B rows of a batch     T tokens of a row       S slots of keys (cache or row)   V vocabulary
  D hidden size         N query heads           K key/value heads, G = N / K     H head dim
  F MLP width           E experts, M their width, A experts a token              L layers
  P patches             R merged patches (rows of vision features)               C patch pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen3vl_jax.model.lora import Adapted, lora_delta
from qwen3vl_jax.model.matmul import product
from qwen3vl_jax.model.quantized import Quantized, Weight, scaled_matmul_parts
from qwen3vl_jax.model.sharding import mesh_sizes, platform

ones, zeros = nn.initializers.ones, nn.initializers.zeros

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def weight(module: Any, name: str, *dims: tuple[int, str | None], init=None) -> jax.Array:
    """Declares one parameter; dims are (size, logical axis) pairs, the only place either is written.

    init None is normal with the initializer_range of the module's cfg.
    """
    shape, axes = zip(*dims, strict=True)
    init = nn.initializers.normal(module.cfg.initializer_range) if init is None else init
    boxed = nn.with_logical_partitioning(init, axes)
    return cast(jax.Array, module.param(name, boxed, shape, jnp.float32))


def apply(module: nn.Module, params: Any, *args: Any) -> Any:
    """A module as the pure function it is."""
    return module.apply({"params": params}, *args)


def linear(
    x: jax.Array, w: Weight | Adapted, bias: jax.Array | None = None, in_dims: int = 1
) -> jax.Array:
    """x [..., in] times w [out..., in...] -> [..., out...], summed in fp32, in the dtype of x.

    `in_dims` trailing axes of w (and of x) are contracted. The weight keeps Hugging Face's axis order.
    """
    if isinstance(w, jax.Array) and _in_short(x, in_dims):
        y = product(x, w, in_dims, x.dtype)
        if bias is not None:  # a kernel of the product adds it before it rounds
            y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape).astype(x.dtype)
        return checkpoint_name(y, PRODUCT)
    y = linear_fp32(x, w, in_dims)
    y = (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)
    return checkpoint_name(y, PRODUCT)


def _in_short(x: jax.Array, in_dims: int) -> bool:
    """Whether a product of x is written in its 16 bits: a GPU otherwise writes fp32 and reads it again.

    Not one of few rows, nor on a mesh: its sum may be cut into parts, which were then added in 16 bits.
    """
    many = math.prod(x.shape[: x.ndim - in_dims]) >= MANY_ROWS
    return many and x.dtype.itemsize == 2 and platform() == "gpu" and not mesh_sizes()


def linear_fp32(x: jax.Array, w: Weight | Adapted, in_dims: int = 1) -> jax.Array:
    """`linear` whose result stays in fp32: logits, and everything before a bias."""
    if isinstance(w, Adapted):
        return linear_fp32(x, w.base, in_dims) + lora_delta(x, w, in_dims)
    dtype = x.dtype if isinstance(w, Quantized) else w.dtype
    values, factor = scaled_matmul_parts(w, dtype, range(w.ndim - in_dims, w.ndim))
    flat = (
        platform() == "cpu" and not mesh_sizes()
    )  # to merge axes that a mesh cuts would gather them
    y: Any = _flat_product(x, values, in_dims) if flat else product(x, values, in_dims)
    return y if factor is None else y * factor


def _flat_product(x: jax.Array, w: jax.Array, in_dims: int) -> jax.Array:
    """`product` in two dimensions: XLA:CPU copies a 3-D weight at every call, many times slower."""
    lead, out = x.shape[: x.ndim - in_dims], w.shape[: w.ndim - in_dims]
    rows, width = math.prod(lead), math.prod(w.shape[w.ndim - in_dims :])
    x2, w2 = x.reshape(rows, width), w.reshape(-1, width)
    if rows == 1 and x.dtype == jnp.bfloat16:
        x2 = jnp.repeat(x2, 2, axis=0)  # XLA:CPU has no fast bf16 vector-matrix product
    y: Any = product(x2, w2)
    return y[:rows].reshape(*lead, *out)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in fp32, cast to the dtype of x before the scale as in the reference."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with scale and bias, in fp32 (the vision tower's; eps has no key)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (x.shape[-1], None)
        scale, bias = (
            weight(self, "scale", width, init=ones),
            weight(self, "bias", width, init=zeros),
        )
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


MANY_ROWS = 256
PRODUCT = "product"  # what `linear` gives, to the policies of jax.checkpoint
_policies = jax.checkpoint_policies
REMAT: dict[str, Callable | None] = {  # what the backward pass finds saved of each layer
    "full": _policies.nothing_saveable,
    "dots": _policies.save_only_these_names(PRODUCT),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "none": None,  # everything
}


def run_layers(body: Callable, carry: Any, layers: Any, remat: str = "none") -> tuple[Any, Any]:
    """Runs `body(carry, layer, i) -> (carry, out)` over the layers of a tower.

    A list of per-layer parameters is a Python loop (inference: the weights stay where they are) and
    gives a list of outs; stacked parameters (`stack_layers`) are one `lax.scan` (training: compile
    time does not grow with depth) and give stacked outs. The body is the same, DeepStack inside.
    remat: a name of REMAT, what of a layer is kept for the backward pass and what computed again.
    """
    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    if isinstance(layers, (list, tuple)):
        outs = []
        for i, layer in enumerate(layers):
            carry, out = body(carry, layer, i)
            outs.append(out)
        return carry, outs
    count = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(lambda c, xs: body(c, *xs), carry, (layers, jnp.arange(count)))
