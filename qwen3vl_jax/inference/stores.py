"""What the engine keeps for later prompts: features of images, and shared beginnings of prompts."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.requests import Stats
from qwen3vl_jax.model.cache import prefill
from qwen3vl_jax.model.structs import Features, KVCache, Params
from qwen3vl_jax.model.vision import vision_encode
from qwen3vl_jax.processing.batch import bucket, group_batch, make_vision
from qwen3vl_jax.processing.encoded_prompt import (
    EncodedImage,
    EncodedPrompt,
    in_feature_order,
    shared_start,
)

KEPT_BYTES = 1 << 30
MAX_PREFIXES, MAX_BYTES = 4, 1 << 30  # on the device
# Of one call of the vision tower: a bucket, so that calls that are almost full are one program.
VISION_PATCHES = 4 * 4224
MIN_TOKENS = 64  # fewer are not worth a program of their own
# The width of a prompt -> its prefill chunk, None where it is filled at once.
ChunkOf = Callable[[int], int | None]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The first tokens of prompts, and the cache of one row that holds them."""

    prompt: EncodedPrompt
    cache: KVCache

    @property
    def length(self) -> int:
        return len(self.prompt.ids)


class Stores:
    """What the vision tower gave for the images and videos seen last, and the prefixes used last.

    Images of one prompt, and of others that wait, are encoded together. `stats` counts both.
    """

    def __init__(self, params: Params, cfg: Config, chunk_of: ChunkOf, stats: Stats):
        self.params, self.cfg, self.chunk_of, self.stats = params, cfg, chunk_of, stats
        self.images: OrderedDict[bytes, Features] = OrderedDict()
        self.prefixes: list[Prefix] = []  # the last used one last

    def features(
        self, prompts: Sequence[EncodedPrompt], rows: int, ahead: Sequence[EncodedPrompt] = ()
    ) -> Features | None:
        """Features of all images and videos of a group, padded to `rows` rows; None without any.

        ahead: prompts that come later. Their images are encoded in the same call as far as they fit.
        """
        images = in_feature_order(prompts)
        if not images:
            return None
        for group in self._calls(images, in_feature_order(ahead)):
            self._encode(group)
        found = [self.images[image.digest] for image in images]
        for image in images:
            self.images.move_to_end(image.digest)
        while len(self.images) > 1 and _bytes(*self.images.values()) > KEPT_BYTES:
            self.images.popitem(last=False)
        merged = np.concatenate([f.merged for f in found])
        taps = np.concatenate([f.taps for f in found], axis=1)
        fill = (0, rows - len(merged))
        merged, taps = np.pad(merged, (fill, (0, 0))), np.pad(taps, ((0, 0), fill, (0, 0)))
        return Features(cast(Any, merged), cast(Any, taps))

    def _calls(self, images: Sequence[EncodedImage], ahead: Sequence[EncodedImage]):
        """Images that are not kept yet, in calls of at most VISION_PATCHES patches or of one image."""
        missing = {x.digest: x for x in (*images, *ahead) if x.digest not in self.images}
        needed, calls = {x.digest for x in images}, list[list[EncodedImage]]()
        for image in missing.values():
            room = (c for c in calls if _patches(c) + len(image.patches) <= VISION_PATCHES)
            if (call := next(room, None)) is not None:
                call.append(image)
            elif image.digest in needed:
                calls.append([image])
        return calls

    def _encode(self, images: Sequence[EncodedImage]) -> None:
        """Runs the vision tower over images of one call, and keeps what it gives on the host."""
        self.stats.encoded += len(images)
        patches = np.concatenate([x.patches for x in images])
        inputs, unit = (
            make_vision(self.cfg, patches, [x.grid for x in images]),
            self.cfg.vision.merge_unit,
        )
        out = vision_encode(self.params, self.cfg, inputs)
        # Cut on the host: on the device each count of rows would be a program of its own.
        merged, taps = np.asarray(out.merged), np.asarray(out.taps)
        ends = np.cumsum([len(x.patches) // unit for x in images])
        for image, start, end in zip(images, [0, *ends], ends):
            one = Features(
                cast(Any, merged[start:end].copy()), cast(Any, taps[:, start:end].copy())
            )
            self.images[image.digest] = one

    def lookup(self, prompt: EncodedPrompt) -> Prefix | None:
        """The longest prefix that the prompt begins with."""
        found = [p for p in self.prefixes if self._begins(p, prompt)]
        return max(found, key=lambda p: p.length, default=None)

    def _begins(self, prefix: Prefix, prompt: EncodedPrompt) -> bool:
        shared = shared_start(prompt, prefix.prompt, all_of_b=True)
        return shared == prefix.length and self._fits(prompt, shared)

    def _fits(self, prompt: EncodedPrompt, length: int) -> bool:
        """Whether the rest is prefilled at once: behind a prefix there are no chunks."""
        return self.chunk_of(bucket(len(prompt.ids) - length)) is None

    def best(self, prompt: EncodedPrompt, others: Sequence[EncodedPrompt]) -> Prefix | None:
        """The prefix to prefill a prompt behind: one in the store, or a new one that others share too."""
        found = self.lookup(prompt)
        # The length that spares most tokens beyond those that are kept already.
        there = 0 if found is None else found.length
        shared = sorted((shared_start(prompt, other) for other in others), reverse=True)
        spared = [(length - there) * count for count, length in enumerate(shared, 1)]
        length = shared[int(np.argmax(spared))] if spared else 0
        if length - there >= MIN_TOKENS and self._fits(prompt, length):
            first, width = prompt.first(length), bucket(length)
            batch, chunk = group_batch(self.cfg, [first], width), self.chunk_of(width)
            features = self.features([first], width)
            cache, _ = prefill(self.params, self.cfg, batch, width, features=features, chunk=chunk)
            self.stats.prefixes += 1
            self.stats.prefilled += length
            found = Prefix(first.without_patches(), cache)
        if found is not None:
            kept = [*(p for p in self.prefixes if p is not found), found][-MAX_PREFIXES:]
            while len(kept) > 1 and _bytes(*(p.cache for p in kept)) > MAX_BYTES:
                kept = kept[1:]
            self.prefixes = kept
        return found


def _patches(images: Sequence[EncodedImage]) -> int:
    return sum(len(x.patches) for x in images)


def _bytes(*held: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(held))
