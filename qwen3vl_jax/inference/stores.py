"""What the engine keeps for later prompts: features of images, and shared beginnings of prompts."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.requests import Stats
from qwen3vl_jax.model.cache import prefill
from qwen3vl_jax.model.structs import Features, KVCache, Params
from qwen3vl_jax.model.vision import vision_encode
from qwen3vl_jax.processing import encoded_prompt
from qwen3vl_jax.processing.batch import bucket, group_batch, make_vision
from qwen3vl_jax.processing.encoded_prompt import EncodedImage, EncodedPrompt, in_feature_order

# Of features, on the host.
KEPT_BYTES = 1 << 30
# On the device.
MAX_PREFIXES, MAX_BYTES = 4, 1 << 30
# Of one call of the vision tower: a bucket, so that calls that are almost full are one program.
VISION_PATCHES = 4 * 4224
# Fewer are not worth a program of their own.
MIN_TOKENS = 64
# The width of a prompt -> its prefill chunk, None where it is filled at once.
ChunkOf = Callable[[int], int | None]


class Prefix(NamedTuple):
    """The first tokens of prompts, and the cache of one row that holds them."""

    prompt: EncodedPrompt
    length: int
    cache: KVCache


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
        if not (images := in_feature_order(prompts)):
            return None
        for call in self._calls(images, in_feature_order(ahead)):
            self.stats.encoded += len(call)
            patches = np.concatenate([x.patches for x in call])
            inputs = make_vision(self.cfg, patches, [x.grid for x in call])
            out = vision_encode(self.params, self.cfg, inputs)
            # Cut on the host: on the device each count of rows would be a program of its own.
            merged, taps = np.asarray(out.merged), np.asarray(out.taps)
            ends = np.cumsum([len(x.patches) // self.cfg.vision.merge_unit for x in call])
            for image, start, end in zip(call, [0, *ends], ends):
                cut: Any = merged[start:end].copy(), taps[:, start:end].copy()
                self.images[image.digest] = Features(*cut)
        found = [self.images[image.digest] for image in images]
        for image in images:
            self.images.move_to_end(image.digest)
        while len(self.images) > 1 and _bytes(*self.images.values()) > KEPT_BYTES:
            self.images.popitem(last=False)
        merged = np.concatenate([f.merged for f in found])
        taps = np.concatenate([f.taps for f in found], axis=1)
        fill = (0, rows - len(merged)), (0, 0)
        padded: Any = np.pad(merged, fill), np.pad(taps, ((0, 0), *fill))
        return Features(*padded)

    def _calls(self, images: Sequence[EncodedImage], ahead: Sequence[EncodedImage]):
        """Images that are not kept yet, in calls of at most VISION_PATCHES patches or of one image."""
        missing = {x.digest: x for x in (*images, *ahead) if x.digest not in self.images}
        needed, calls = {x.digest for x in images}, list[list[EncodedImage]]()
        for image in missing.values():
            room = VISION_PATCHES - len(image.patches)
            fits = (call for call in calls if sum(len(x.patches) for x in call) <= room)
            if (call := next(fits, None)) is not None:
                call.append(image)
            elif image.digest in needed:
                calls.append([image])
        return calls

    def lookup(self, prompt: EncodedPrompt) -> Prefix | None:
        """The longest prefix that the prompt begins with."""
        shared = [encoded_prompt.shared_start(prompt, p.prompt, True) for p in self.prefixes]
        found = [p for p, n in zip(self.prefixes, shared) if n == p.length and self.fits(prompt, n)]
        return max(found, key=lambda p: p.length, default=None)

    def fits(self, prompt: EncodedPrompt, start: int = 0) -> bool:
        """Whether the tokens from `start` on are prefilled at once: behind a prefix there are no chunks."""
        return self.chunk_of(bucket(len(prompt.ids) - start)) is None

    def best(self, prompt: EncodedPrompt, others: Sequence[EncodedPrompt]) -> Prefix | None:
        """The prefix to prefill a prompt behind: one in the store, or a new one that others share too."""
        found = self.lookup(prompt)
        # The length that spares most tokens beyond those that are kept already.
        there = 0 if found is None else found.length
        shared = sorted((encoded_prompt.shared_start(prompt, x) for x in others), reverse=True)
        spared = [(length - there) * count for count, length in enumerate(shared, 1)]
        length = shared[int(np.argmax(spared))] if spared else 0
        if length - there >= MIN_TOKENS and self.fits(prompt, length):
            first, width = prompt.first(length), bucket(length)
            batch, features = group_batch(self.cfg, [first], width), self.features([first], width)
            how = {"features": features, "chunk": self.chunk_of(width)}
            cache, _ = prefill(self.params, self.cfg, batch, width, **how)
            self.stats.prefixes += 1
            self.stats.prefilled += length
            found = Prefix(first.without_patches(), length, cache)
        if found is not None:
            kept = [*(p for p in self.prefixes if p is not found), found][-MAX_PREFIXES:]
            while len(kept) > 1 and _bytes(*(p.cache for p in kept)) > MAX_BYTES:
                kept = kept[1:]
            self.prefixes = kept
        return found


def _bytes(*held: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(held))
