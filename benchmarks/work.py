"""The work that benchmarks.inference times, ours and transformers alike: sizes, inputs, floors."""

import dataclasses
import math
from typing import Any

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.training.reporting.flops import Counts, forward_flops

TEXT_IDS = (10, 400)  # random tokens of prompts lie between
PROMPT = 512  # tokens of text beside an image
SIDE = 64  # patches a side of an image of 1024 x 1024


@dataclasses.dataclass(frozen=True)
class Work:
    """One call that is timed.

    kind: vision, prefill or decode. grids: frames, rows and columns of patches of each image or video
    of one row (vision: of the call). filled: tokens in the cache when a decode begins.
    weights: "" for bf16, int8 or fp8.
    """

    name: str
    kind: str
    rows: int = 1
    text: int = 0
    grids: tuple[tuple[int, int, int], ...] = ()
    filled: int = 0
    weights: str = ""

    def width(self, cfg: Config) -> int:
        """Tokens of a row's prompt."""
        merged = (math.prod(grid) // cfg.vision.merge_unit + 2 for grid in self.grids)
        return 8 + sum(merged) + self.text


def mixed_grids(count: int) -> tuple[tuple[int, int, int], ...]:
    """Images of 256 to 1,536 pixels a side."""
    sides = np.random.default_rng(3).integers(8, 49, (count, 2)) * 2
    return tuple((1, int(h), int(w)) for h, w in sides)


def _image(side: int = SIDE) -> tuple[tuple[int, int, int], ...]:
    return ((1, side, side),)


def _decode(rows: int, filled: int = 1546, weights: str = "") -> Work:
    name = f"decode, {rows} x {filled:,} filled" + (f", {weights}" if weights else "")
    return Work(name, "decode", rows, filled=filled, weights=weights)


_IMAGE_PROMPTS = tuple(
    Work(f"prefill, {rows} x 1,546, an image each", "prefill", rows, PROMPT, _image())
    for rows in (1, 8)
)
WORKS: dict[str, tuple[Work, ...]] = {
    "8b": (
        Work("ViT, 8 images of 1024 x 1024", "vision", grids=_image() * 8),
        Work("ViT, 16 images of 256 to 1,536 a side", "vision", grids=mixed_grids(16)),
        Work("ViT, a video of 64 frames of 448 x 448", "vision", grids=((32, 28, 28),)),
        *_IMAGE_PROMPTS,
        Work("prefill, 1 x 8,200", "prefill", 1, 8192),
        Work("prefill, 8 x 2,056", "prefill", 8, 2048),
        *map(_decode, (1, 8, 32)),
        _decode(1, 131_000),
        _decode(1, weights="int8"),
    ),
    "2b": (_IMAGE_PROMPTS[1], _decode(1), _decode(32)),
    "30b-a3b": (_IMAGE_PROMPTS[1], *map(_decode, (1, 8, 32))),
    "tiny": (
        Work("ViT, 2 images of 8 x 8 patches", "vision", grids=_image(8) * 2),
        Work("prefill, 2 x 42, an image each", "prefill", 2, 16, _image(8)),
        _decode(2, 64),
        _decode(2, 64, "int8"),
    ),
}
CPU_WORKS = (Work("prefill, 1 x 330, an image", "prefill", 1, 64, _image(32)), _decode(1, 330))


def prompt_arrays(cfg: Config, work: Work, seed: int = 0) -> dict[str, Any]:
    """input_ids, and pixel_values and image_grid_thw if there are images, of random numbers."""
    rng = np.random.default_rng(seed)
    row = [1] * 8
    for grid in work.grids:
        count = math.prod(grid) // cfg.vision.merge_unit
        row += [cfg.vision_start_token_id, *[cfg.image_token_id] * count, cfg.vision_end_token_id]
    ids = np.tile(np.array(row, np.int64), (work.rows, 1))
    ids = np.concatenate([ids, rng.integers(*TEXT_IDS, (work.rows, work.text))], axis=1)
    if not work.grids:
        return {"input_ids": ids}
    grids = np.array(work.grids * work.rows)
    shape = (int(grids.prod(1).sum()), math.prod(cfg.vision.patch_shape))
    # Bytes, normalized: normal numbers would take longer to draw than the images to be answered.
    pixels = rng.integers(0, 256, shape, np.uint8) / np.float32(127.5) - 1
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grids}


def floor_seconds(cfg: Config, work: Work, matmul_rate: float, read_rate: float) -> float:
    """The least seconds of a call: arithmetic at the measured rate of products (FLOP/s), or for a
    decode step the bytes that it must read at the measured rate of memory (byte/s)."""
    if work.kind == "decode":
        width = 1 if work.weights else 2
        return step_bytes(cfg, work.rows, work.filled, width) / read_rate
    frames = [h * w for t, h, w in work.grids for _ in range(t)]
    width, rows = work.width(cfg), work.rows
    pairs = rows * width * (width + 1) // 2
    counts = Counts(
        rows * width, pairs, rows * sum(frames), rows * sum(patches**2 for patches in frames)
    )
    parts = forward_flops(cfg, counts)
    vision = sum(parts[name] for name in ("vision", "vision_attention", "merger"))
    if work.kind == "vision":
        return vision / matmul_rate
    decoder = sum(parts.get(name, 0.0) for name in ("text", "attention", "router", "experts"))
    head = 2.0 * rows * cfg.text.vocab_size * cfg.text.hidden_size
    return (decoder + head + vision * bool(frames)) / matmul_rate


def step_bytes(cfg: Config, rows: int, filled: float, width: float = 2) -> float:
    """Bytes that a decode step must read: weights of `width` bytes, of experts those that are hit on
    average, and keys and values in bf16."""
    text = cfg.text
    d, h = text.hidden_size, text.head_dim
    heads, kv = text.num_attention_heads, text.num_key_value_heads
    mlp: float = 3 * d * text.intermediate_size
    if text.num_experts:
        missed = (1 - text.num_experts_per_tok / text.num_experts) ** rows
        hit = text.num_experts * (1 - missed)
        mlp = 3 * d * text.moe_intermediate_size * hit + d * text.num_experts
    layer = d * h * (2 * heads + 2 * kv) + mlp
    cache = 2 * kv * h * rows * filled
    layers = text.num_hidden_layers
    return width * (layers * layer + d * text.vocab_size) + 2 * layers * cache


@dataclasses.dataclass
class Figure:
    """What a process found of one work."""

    work: str
    seconds: list[float]
    first: float = 0.0  # seconds of the first call, compilation included
    peak: float = 0.0  # bytes of the device's memory
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a line of a child's stdout."""
        return dataclasses.asdict(self)

    @property
    def median(self) -> float:
        """Of `seconds`, sorted."""
        return sorted(self.seconds)[len(self.seconds) // 2]
