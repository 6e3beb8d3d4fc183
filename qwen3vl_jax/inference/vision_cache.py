"""Vision features in host memory, so that an image shown again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.requests import Stats
from qwen3vl_jax.model.structs import Features, Params
from qwen3vl_jax.model.vision import vision_encode
from qwen3vl_jax.processing.batch import make_vision
from qwen3vl_jax.processing.encoded_prompt import EncodedImage, EncodedPrompt, in_feature_order

KEPT_BYTES = 1 << 30


class FeatureStore:
    """What the vision tower gave for the images and videos seen last, by digest.

    Each is encoded by itself, so that programs depend on its bucket alone. `stats` counts them.
    """

    def __init__(self, params: Params, cfg: Config, stats: Stats, kept: int = KEPT_BYTES):
        self.params, self.cfg, self.stats, self.kept, self.size = params, cfg, stats, kept, 0
        self.store: OrderedDict[bytes, Features] = OrderedDict()

    def of(self, prompts: list[EncodedPrompt], rows: int) -> Features | None:
        """Features of all images and videos of a group, padded to `rows` rows; None without any."""
        images = in_feature_order(prompts)
        if not images:
            return None
        found = [self._one(image) for image in images]
        merged = np.concatenate([f.merged for f in found])
        taps = np.concatenate([f.taps for f in found], axis=1)
        fill = (0, rows - len(merged))
        merged, taps = np.pad(merged, (fill, (0, 0))), np.pad(taps, ((0, 0), fill, (0, 0)))
        return Features(cast(Any, merged), cast(Any, taps))

    def _one(self, image: EncodedImage) -> Features:
        if (found := self.store.get(image.digest)) is None:
            self.stats.encoded += 1
            inputs = make_vision(self.cfg, image.patches, [image.grid])
            count = len(image.patches) // self.cfg.vision.merge_unit
            out = vision_encode(self.params, self.cfg, inputs)
            # Cut on the host: on the device each count of rows would be a program of its own.
            merged, taps = np.asarray(out.merged)[:count], np.asarray(out.taps)[:, :count]
            found = Features(cast(Any, merged.copy()), cast(Any, taps.copy()))
            self.store[image.digest] = found
            self.size += _bytes(found)
        self.store.move_to_end(image.digest)
        while self.size > self.kept and len(self.store) > 1:
            self.size -= _bytes(self.store.popitem(last=False)[1])
        return found


def _bytes(features: Features) -> int:
    return features.merged.nbytes + features.taps.nbytes
