"""Building blocks of both towers: weight(), linear(), norms, activations, the loop over layers.

Dims, used in every file:
  B sequences           T tokens of a sequence   S key slots (cache or sequence)  V vocabulary
  D hidden size         N query heads            K key/value heads, G = N / K     H head dim
  F MLP width           E experts, M their width, A experts per token             L layers
  P patches             R merged patches (vision features)                        C pixels per patch
"""

import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen3vl_jax.model.attention_gpu import ATTENTION
from qwen3vl_jax.model.lora import Adapted, lora_delta
from qwen3vl_jax.model.matmul import product
from qwen3vl_jax.model.quantized import Quantized, Weight, dequantize, matmul_parts
from qwen3vl_jax.model.sharding import max_parts, mesh_sizes, platform
from qwen3vl_jax.model.structs import FEW

# Rows from which `linear` on a GPU writes 16-bit products.
MANY_ROWS = 256
# Names in the policies of jax.checkpoint: of what `linear` gives, and of cuDNN's primitive.
MATMUL, WIDE = "product", "wide product"
CUDNN = "dot_product_attention_fwd_wrapper"
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
    """Declares one parameter, float32; dims are (size, logical axis) pairs.

    Sizes and logical axes are written here and nowhere else; sharding.RULES maps the axes to the
    mesh. init None: normal(initializer_range of the module's cfg).
    """
    shape, axes = zip(*dims, strict=True)
    init = nn.initializers.normal(module.cfg.initializer_range) if init is None else init
    boxed = nn.with_logical_partitioning(init, axes)
    return cast(jax.Array, module.param(name, boxed, shape, jnp.float32))


def linear(x: jax.Array, w: Weight | Adapted, bias=None, in_dims=1, wide=False) -> jax.Array:
    """x [.. in..] times w [out.. in..] plus bias [out..] -> [.. out..] in the dtype of x, summed in fp32.

    The `in_dims` trailing axes of both are contracted. wide: an MLP's first product, for REMAT.
    """
    # On a GPU in the 16 bits of x, which otherwise writes and reads fp32. Not for few rows, and not on a
    # mesh, where partial sums would be added in 16 bits.
    many = math.prod(x.shape[: x.ndim - in_dims]) >= MANY_ROWS
    if many and x.dtype.itemsize == 2 and platform() == "gpu" and not mesh_sizes():
        base = w.base if isinstance(w, Adapted) else w
        base = dequantize(base, x.dtype) if isinstance(base, Quantized) else base
        y = product(x, base, in_dims, x.dtype)
        y = y + lora_delta(x, w, in_dims, x.dtype) if isinstance(w, Adapted) else y
    else:
        y = linear_fp32(x, w, in_dims)
    # XLA adds the bias inside the product's kernel, before it rounds to 16 bits.
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape).astype(y.dtype)
    return checkpoint_name(y.astype(x.dtype), WIDE if wide else MATMUL)


def linear_fp32(x: jax.Array, w: Weight | Adapted, in_dims: int = 1) -> jax.Array:
    """`linear` without bias that returns fp32, as logits need. LoRA is added here."""
    if isinstance(w, Adapted):
        return linear_fp32(x, w.base, in_dims) + lora_delta(x, w, in_dims)
    dtype = x.dtype if isinstance(w, Quantized) else w.dtype
    values, scale = matmul_parts(w, dtype, range(len(w.shape) - in_dims, len(w.shape)))
    # XLA:CPU copies a 3-D weight at every call, many times slower. On a mesh, merging axes gathers them.
    if platform() == "cpu" and not mesh_sizes():
        lead, out = x.shape[: x.ndim - in_dims], w.shape[: len(w.shape) - in_dims]
        width = math.prod(w.shape[len(out) :])
        y = product(x.reshape(-1, width), values.reshape(-1, width)).reshape(*lead, *out)
    else:
        y = product(x, values, in_dims)
    return y if scale is None else y * scale


def repeat_one(x: jax.Array) -> jax.Array:
    """One bf16 row x [1 ..] several times, since XLA has no fast product of one; other x as they are.

    A TPU's matrix unit takes 8 rows; a GPU's norms are one kernel for 8; on a CPU 2 are fast.
    """
    alone = x.dtype == jnp.bfloat16 and len(x) == 1 == max_parts("decode_batch")
    return jnp.repeat(x, 2 if platform() == "cpu" else 8, axis=0) if alone else x


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis in fp32; cast to the dtype of x before the scale, as the reference."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm of the vision tower over the last axis, in fp32. Its eps is no config key."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = weight(self, "scale", (x.shape[-1], None), init=ones)
        bias = weight(self, "bias", (x.shape[-1], None), init=zeros)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


_policies = jax.checkpoint_policies


def _save(*names: str) -> Callable:
    """The policy that saves what has these names, and attention; cuDNN's of few segments [B M] alone."""

    def few(primitive, *args, **_) -> bool:
        return primitive.name == CUDNN and args[4].shape[-1] <= FEW

    named = _policies.save_only_these_names(*names, ATTENTION)
    return _policies.save_from_both_policies(few, named)


# Rematerialization policies: what each layer saves for the backward pass. "none" saves everything.
REMAT: dict[str, Callable | None] = {
    "full": _policies.nothing_saveable,
    "dots": _save(MATMUL, WIDE),
    "narrow": _save(MATMUL),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[MATMUL, WIDE],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "none": None,
}


def run_layers(body: Callable, carry: Any, layers: Any, remat: str = "none") -> tuple[Any, Any]:
    """Runs `body(carry, layer, i) -> (carry, out)` over all layers: (last carry, outs).

    A list of layers is a Python loop with a list of outs (inference: weights are not copied). Stacked
    layers are one `lax.scan` with stacked outs (training: one is compiled). remat: a name of REMAT.
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
