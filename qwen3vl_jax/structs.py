"""The pytrees that functions take and return. Dims as in layers.py.

The host fills Batch and VisionInputs with numpy arrays; they become jax's when first used.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

Params = dict[str, Any]  # nested dict of arrays; "layers" and "blocks" are lists, or stacked dicts


class VisionInputs(flax.struct.PyTreeNode):
    """Patches of any mix of pictures and clips, in merge order, padded to a bucket of P rows.

    Everything that depends on a picture's size is a table made on the host, so one compiled program
    serves every mix of sizes in a bucket. Padding rows attend to nothing (lo = hi = 0).
    """

    pixels: jax.Array  # [P C] float32: channel, frame, row, column
    pos_index: jax.Array  # [P 4] int32: the four neighbours in the table of learned positions
    pos_weight: jax.Array  # [P 4] float32: their bilinear weights
    coords: jax.Array  # [P 2] int32: row and column inside the frame, for the 2-D rotary
    lo: jax.Array  # [P] int32: a patch attends to patches lo <= s < hi, those of its own frame
    hi: jax.Array  # [P] int32
    # At most so many images and frames lie in a row; 0: nobody has counted them.
    frames: int = flax.struct.field(pytree_node=False, default=0)


class Features(flax.struct.PyTreeNode):
    """What the vision tower gives: one row a merged patch, R = P / merge_size^2."""

    merged: jax.Array  # [R D]: written over the placeholder rows
    taps: jax.Array  # [n R D]: DeepStack, added after decoder layer 0 .. n-1


class Batch(flax.struct.PyTreeNode):
    """Rows of tokens with everything the decoder needs to know of them."""

    tokens: jax.Array  # [B T] int32
    positions: jax.Array  # [3 B T] int32: MRoPE ids (T, H, W)
    segment_ids: jax.Array  # [B T] int32: 0 is padding; tokens attend inside their own segment
    vision_rows: jax.Array | None  # [B T] int32: row of Features for a placeholder, else -1
    delta: jax.Array  # [B] int32: next position minus attended length
    vision: VisionInputs | None = None
    labels: jax.Array | None = None  # [B T] int32, -100 is not counted
    embeds: jax.Array | None = None  # [B T D]: in place of the embedded tokens
    # Rows lie in so many groups, one behind another, each with an equal part of the features, which
    # vision_rows counts from 0: a device then has the pictures of its own rows.
    groups: int = flax.struct.field(pytree_node=False, default=1)


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer with their own bookkeeping; nothing about it lives elsewhere.

    One array a layer, never stacked: a cache that meets a scan is copied whole. Row b holds its tokens
    in slots 0 .. length[b] - 1 whichever way the prompt was padded.
    """

    k: list[jax.Array]  # L arrays [B K S H]
    v: list[jax.Array]  # L arrays [B K S H]
    length: jax.Array  # [B] int32: filled slots
    delta: jax.Array  # [B] int32: the next token's position is length + delta

    @property
    def slots(self) -> int:
        return self.k[0].shape[2]
