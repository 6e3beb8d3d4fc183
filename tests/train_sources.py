"""Sources of ready samples for the tests of training data and for its benchmark."""

import numpy as np
import tiny

from qwen3vl_jax.config import Config
from qwen3vl_jax.processing.encoded_prompt import EncodedImage, EncodedVideo, grids_of
from qwen3vl_jax.processing.positions import rope_index
from qwen3vl_jax.training.data.sample import Sample

KINDS = ((), ((1, 4, 6),), ((2, 4, 4),), ((1, 4, 4), (3, 6, 4)), ((1, 6, 6), (1, 2, 2)))


class Ready:
    """Samples of text, pictures and clips, each a function of its index alone."""

    def __init__(self, count: int, seed: int = 0, kinds: int = len(KINDS), clips: bool = True):
        self.count, self.seed, self.kinds = count, seed, KINDS[:kinds]
        self.config = Config.from_hf(tiny.config_dict())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index))
        return make(self.config, rng, self.kinds[index % len(self.kinds)], f"ready:{index}")


def make(config: Config, rng: np.random.Generator, grids, name: str) -> Sample:
    """A sample with an image or video for each grid: pictures of one frame, clips of several."""
    ids, images = list(rng.integers(*tiny.TEXT_IDS, int(rng.integers(2, 6)))), []
    for t, h, w in grids:
        clip, start = t > 1, 0
        for frame in range(t):
            ids += [*rng.integers(*tiny.TEXT_IDS, 2 * clip), tiny.VISION_START]
            start = len(ids) if frame == 0 else start
            ids += [tiny.VIDEO_PAD if clip else tiny.IMAGE_PAD] * (h * w // 4)
            end = len(ids)
            ids.append(tiny.VISION_END)
        width = int(np.prod(config.vision.patch_shape))
        pixels = rng.integers(0, 256, (t * h * w, width)).astype(np.uint8)
        kind = EncodedVideo if clip else EncodedImage
        images.append(kind(pixels, (t, h, w), start, end))
    answer = int(rng.integers(2, 8))
    ids = np.array([*ids, *rng.integers(*tiny.TEXT_IDS, answer)], np.int32)
    labels = np.full_like(ids, -100)
    labels[-answer:] = ids[-answer:]
    weights = np.where(labels == -100, 0, rng.uniform(0.5, 2, len(ids))).astype(np.float32)
    positions, _ = rope_index(config, ids[None], **grids_of(images))
    return Sample(name, ids, labels, weights, positions[:, 0], tuple(images))
