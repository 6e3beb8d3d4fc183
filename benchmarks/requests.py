"""Mixed requests: 0 to 3 images, 50 to 800 tokens of text, answers of 20 to 300 tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.work import Work, prompt_arrays
from qwen3vl_jax.config import Config

SIDES = (16, 32, 48, 64)  # patches a side
SEED = 7


def mixed_requests(cfg: Config, count: int) -> Iterator[tuple[dict[str, Any], int]]:
    """(arrays of a processor, tokens of the answer) of each; always the same ones."""
    rng = np.random.default_rng(SEED)
    tiny = cfg.text.hidden_size < 1024
    for i in range(count):
        sides = rng.choice(SIDES, (int(rng.integers(0, 4)), 2)) // (8 if tiny else 1)
        text, answer = int(rng.integers(50, 800)), int(rng.integers(20, 300))
        text, answer = (text // 8, answer // 8) if tiny else (text, answer)
        grids = tuple((1, int(h), int(w)) for h, w in sides)
        yield prompt_arrays(cfg, Work("request", "prefill", 1, text, grids), seed=i), answer
