"""The structs that model functions take and return. Dims as in layers.py.

The host fills Batch and VisionInputs with numpy arrays; they become jax arrays at their first use.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import brief, check_types

# Segments in a row of packed samples or images that a program of a GPU is compiled for.
FEW, MANY = 8, 64
# Nested dict of arrays; "layers" and "blocks" are lists (inference) or stacked dicts (training).
Params = dict[str, Any]


class Struct(flax.struct.PyTreeNode, repr=False):
    """A struct whose repr tells shapes, not numbers."""

    __repr__ = brief


class VisionInputs(Struct, repr=False):
    """Patches of images and videos in merge order, padded to P patches.

    All that depends on an image's size is a table made on the host, so one compiled program serves
    every mix of sizes with the same P. Padding attends to nothing (lo = hi = 0).
    """

    pixels: jax.Array  # [P C] float32, or in training uint8: channel, frame, row, column
    pos_index: jax.Array  # [P 4] int32: the four neighbours in the table of learned positions
    pos_weight: jax.Array  # [P 4] float32: bilinear weights of those neighbours
    coords: jax.Array  # [P 2] int32: row and column inside the frame, for the 2-D rotary embedding
    lo: jax.Array  # [P] int32: a patch attends to patches lo <= s < hi, those of its own frame
    hi: jax.Array
    # Upper bound of images and frames in one row of patches; 0: unknown.
    frames: int = flax.struct.field(pytree_node=False, default=0)


class Features(Struct, repr=False):
    """Output of the vision tower, one row per merged patch: R = P / merge_size^2."""

    merged: jax.Array  # [R D]: replaces the embeddings of placeholder tokens
    taps: jax.Array  # [n R D]: DeepStack, added to the residual after decoder layers 0 .. n-1


class Batch(Struct, repr=False):
    """A batch of token sequences with everything the decoder needs."""

    tokens: jax.Array  # [B T] int32
    positions: jax.Array  # [3 B T] int32: MRoPE ids (T, H, W)
    segment_ids: jax.Array  # [B T] int32: 0 is padding; a token attends inside its own segment
    # [B T] int32: index into Features of a placeholder token, -1 elsewhere
    vision_rows: jax.Array | None
    delta: jax.Array  # [B] int32: next position minus attended length
    vision: VisionInputs | None = None
    labels: jax.Array | None = None  # [B T] int32: -100 is not counted
    embeds: jax.Array | None = None  # [B T D]: replaces the token embeddings
    # Equal parts of the batch, each with its own slice of features, inside which vision_rows counts.
    groups: int = flax.struct.field(pytree_node=False, default=1)
    # Upper bound of segments in one row (more give NaN), by `segment_bound`; 0: unknown.
    segments: int = flax.struct.field(pytree_node=False, default=0)


def segment_bound(count: int) -> int:
    """FEW, MANY or 0 (unknown) for rows of at most `count` segments: each is a program of its own."""
    return FEW if count <= FEW else MANY if count <= MANY else 0


class KVCache(Struct, repr=False):
    """Keys and values of every layer, and how far each sequence is filled.

    One array per layer, never stacked: `lax.scan` would copy a stacked cache. Sequence b holds its
    tokens in slots 0 .. length[b] - 1, whichever side its prompt was padded on.
    """

    k: list[jax.Array]  # L arrays [B S K H] each
    v: list[jax.Array]
    length: jax.Array  # [B] int32: filled slots
    delta: jax.Array  # [B] int32: the next token's position is length + delta

    @property
    def slots(self) -> int:
        return self.k[0].shape[1]


# Argument name -> (type, how a user gets one)
_ARGUMENTS: dict[str, tuple[type, str]] = {
    "params": (Mapping, "the dict that load or init_params gives"),
    "cfg": (Config, "a Config"),
    "batch": (Batch, "a Batch, which make_batch gives"),
    "vision": (VisionInputs, "VisionInputs, which make_vision gives (a batch's `vision`)"),
    "cache": (KVCache, "a KVCache, which prefill gives"),
}


def check_call(params: Any, cfg: Any, **given: Any) -> None:
    """Raises InputError for an argument of another type than in _ARGUMENTS; give them in call order."""
    check_types(_ARGUMENTS, {"params": params, "cfg": cfg, **given})
