"""The pytrees that functions take and return. Dims as in layers.py.

The host fills Batch and VisionInputs with numpy arrays; they become jax's when first used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError

Params = dict[str, Any]  # nested dict of arrays; "layers" and "blocks" are lists, or stacked dicts


_EXPECTED = {
    "params": "the dict that load or init_params gives",
    "cfg": "a Config",
    "batch": "a Batch, which make_batch gives",
    "vision": "VisionInputs, which make_vision gives (a batch's `vision`)",
    "cache": "a KVCache, which prefill gives",
}


def check_call(params: Any, cfg: Any, **given: Any) -> None:
    """Raises InputError for arguments of another kind than their names in _EXPECTED say.

    The order of the arguments is that of a call, so that the message can say it.
    """
    kinds = {
        "params": Mapping,
        "cfg": Config,
        "batch": Batch,
        "vision": VisionInputs,
        "cache": KVCache,
    }
    given = {"params": params, "cfg": cfg, **given}
    for name, value in given.items():
        if not isinstance(value, kinds[name]):
            found = "an array" if isinstance(value, jax.Array) else type(value).__name__
            raise InputError(
                f"{name}: got {found}, expected {_EXPECTED[name]}; the order is ({', '.join(given)}, ..)"
            )


def _brief(value: Any) -> str:
    """Arrays by dtype and shape, lists of alike ones by how many there are."""
    if isinstance(value, (list, tuple)) and value:
        found = [_brief(x) for x in value]
        return f"{len(found)} x {found[0]}" if len(set(found)) == 1 else f"[{', '.join(found)}]"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{dtype}[{','.join(map(str, shape))}]"
    return repr(value)


def brief(self: Any) -> str:
    """A struct as the dtypes and shapes of its arrays, absent ones left out."""
    fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
    shown = (f"{name}={_brief(value)}" for name, value in fields if value is not None)
    return f"{type(self).__name__}({', '.join(shown)})"


class VisionInputs(flax.struct.PyTreeNode):
    """Patches of any mix of pictures and clips, in merge order, padded to a bucket of P rows.

    Everything that depends on a picture's size is a table made on the host, so one compiled program
    serves every mix of sizes in a bucket. Padding rows attend to nothing (lo = hi = 0).
    """

    __repr__ = brief

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

    __repr__ = brief

    merged: jax.Array  # [R D]: written over the placeholder rows
    taps: jax.Array  # [n R D]: DeepStack, added after decoder layer 0 .. n-1


class Batch(flax.struct.PyTreeNode):
    """Rows of tokens with everything the decoder needs to know of them."""

    __repr__ = brief

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

    __repr__ = brief

    k: list[jax.Array]  # L arrays [B K S H]
    v: list[jax.Array]  # L arrays [B K S H]
    length: jax.Array  # [B] int32: filled slots
    delta: jax.Array  # [B] int32: the next token's position is length + delta

    @property
    def slots(self) -> int:
        return self.k[0].shape[2]
