"""Times the feed: python -m benchmarks.feed [WORKERS]. Samples are ready, so packing is what costs.

Batches are those of a small model, 128 rows of 256 tokens and 40 rows of 256 patches. Prints the
milliseconds that this process computes for a batch, and those that pass.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.processing.encoded_prompt import EncodedImage
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.training.data.loader import DataLoader
from qwen3vl_jax.training.data.sample import Sample
from qwen3vl_jax.training.recipe import Data, Pack, Source

CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"
BATCHES, POOL = 20, 256


class Ready:
    """Samples of one image each that cost nothing to make."""

    def __init__(self, count: int):
        self.count, self.made, self.config = count, {}, Config.from_hf(CHECKPOINT)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        index %= POOL
        if index not in self.made:
            self.made[index] = _sample(self.config, index)
        return dataclasses.replace(self.made[index])


def _sample(config: Config, index: int) -> Sample:
    rng = np.random.default_rng(index)
    h, w = (int(side) for side in rng.integers(2, 8, 2) * 2)
    count, words = h * w // 4, [rng.integers(300, 400, int(n)) for n in rng.integers(10, 240, 2)]
    ids = np.concatenate([words[0][:9], np.full(count, config.image_token_id), words[1]])
    learned = np.arange(len(ids)) > len(ids) - 10
    channels, frames, *size = config.vision.patch_shape
    pixels = rng.integers(0, 256, (h * w, channels, 1, *size)).astype(np.uint8)
    pixels = pixels.repeat(frames, 2).reshape(h * w, -1)
    return Sample(
        f"ready:{index}",
        ids.astype(np.int32),
        np.where(learned, ids, -100).astype(np.int32),
        learned.astype(np.float32),
        np.tile(np.arange(len(ids), dtype=np.int32), (3, 1)),
        (EncodedImage(pixels, (1, h, w), 9, 9 + count),),
    )


def main(workers: int) -> None:
    """Draws batches and prints what they cost."""
    proc = Processor.from_pretrained(CHECKPOINT)
    pack = Pack(rows=128, length=256, vision_rows=40, vision_length=256)
    source = Source("python:benchmarks.feed:Ready", options={"count": 10**9})
    feed = DataLoader(Data(sources=(source,), workers=workers), pack, proc, 0)
    for _ in range(8):
        drawn = next(feed)
    start, computed = time.perf_counter(), time.process_time()
    for _ in range(BATCHES):
        drawn = next(feed)
    passed, computed = time.perf_counter() - start, time.process_time() - computed
    feed.close()
    per = f"{1e3 * computed / BATCHES:.1f} ms computed, {1e3 * passed / BATCHES:.1f} ms passed"
    print(f"{workers} workers: {per} a batch; {drawn.stats}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
