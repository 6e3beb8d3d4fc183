"""Prompts that are prefilled together: packed one behind another, or padded to one width.

Packed, prompts of mixed lengths waste little, and the programs depend on the width alone, which is
PACKED_TOKENS' bucket wherever enough prompts wait. Dims as in layers.py; A prompts of a group.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.model.cache import end_prompt, fill_layers
from qwen3vl_jax.model.sharding import max_parts
from qwen3vl_jax.model.structs import Batch, KVCache, Params
from qwen3vl_jax.processing.batch import bucket, group_batch
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt

# Tokens of a packed row, a bucket; a longer prompt has a row of its own width.
PACKED_TOKENS = 4224


@dataclasses.dataclass(frozen=True)
class PromptGroup:
    """Prompts as a Batch, and where each of A prompts is; those past the last are its first token."""

    batch: Batch
    source: np.ndarray  # [A 2] int32: the row of a prompt, and its first token's index in it
    length: np.ndarray  # [A] int32: its tokens


def pack(sizes: Mapping[int, int], most: int, rows: int) -> dict[int, tuple[int, int]]:
    """{prompt: (row, first index)} of at most `most` prompts, given {prompt: tokens}, oldest first.

    The first is always placed. A row holds PACKED_TOKENS, or as many as the first has.
    """
    capacity = max(PACKED_TOKENS, next(iter(sizes.values())))
    filled, placed = [0] * rows, {}
    for prompt, size in sizes.items():
        row = min(range(rows), key=filled.__getitem__)
        if len(placed) < most and filled[row] + size <= capacity:
            placed[prompt] = row, filled[row]
            filled[row] += size
    return placed


def packed_group(cfg: Config, prompts: Sequence[EncodedPrompt], count: int) -> PromptGroup:
    """Prompts one behind another in a row for each part of the mesh's batch axis; A is `count`."""
    sizes, rows = {i: len(prompt.ids) for i, prompt in enumerate(prompts)}, max_parts("batch")
    placed = pack(sizes, count, rows)
    fill = [sum(sizes[i] for i, (row, _) in placed.items() if row == r) for r in range(rows)]
    width = bucket(max(fill))
    given: Any = group_batch(cfg, prompts, max(sizes.values()))
    tokens, segments = np.zeros((2, rows, width), np.int32)
    positions, delta = np.zeros((3, rows, width), np.int32), np.zeros(count, np.int32)
    features = None if given.vision_rows is None else np.full((rows, width), -1, np.int32)
    source, length = np.zeros((count, 2), np.int32), np.ones(count, np.int32)
    for i, (row, start) in placed.items():
        at, n = (row, slice(start, start + sizes[i])), sizes[i]
        tokens[at], segments[at] = given.tokens[i, :n], i + 1
        positions[:, *at], delta[i] = given.positions[:, i, :n], given.delta[i]
        if features is not None:
            features[at] = cast(Any, given.vision_rows)[i, :n]
        source[i], length[i] = (row, start), n
    arrays = tokens, positions, segments, features, delta
    return PromptGroup(Batch(*cast(Any, arrays)), source, length)


def padded_group(cfg: Config, prompts: Sequence[EncodedPrompt], count: int) -> PromptGroup:
    """Prompts in rows of their own, padded to the first one's bucket; A is `count`."""
    width, last = bucket(len(prompts[0].ids)), prompts[0].rest(len(prompts[0].ids) - 1)
    batch = group_batch(cfg, [*prompts, *[last] * (count - len(prompts))], width)
    source = np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.int32)
    length = np.asarray(batch.segment_ids).sum(1, dtype=np.int32)
    return PromptGroup(batch, source, length)


def prefill_packed(
    params: Params, cfg: Config, batch: Batch, source: Any, length: Any, features=None
) -> tuple[KVCache, jax.Array]:
    """`prefill` of prompts one behind another in rows [R T], a segment each, with delta [A]. Not traced.

    source [A 2], length [A] int32: each prompt's row, index of its first token, and tokens. Keys and values
    are those of the rows [R T K H]; the rest of the cache, and the logits, are [A ..].
    """
    layers, rest = params["layers"], {**params, "layers": None, "vision": None}
    slots = batch.tokens.shape[1]
    x, _, delta, k, v = fill_layers(layers, rest, cfg, batch, features, slots, len(source))
    return KVCache(k, v, length, delta), end_prompt(rest, cfg, x, length, source)
