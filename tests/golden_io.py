"""Reads tests/golden/*.npz; tests/golden/make.py says what is in them."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import toy_checkpoint as toy

SEED = 3
PROMPT_KEYS = ("input_ids", "image_grid_thw", "video_grid_thw")
FILES = {"dense": False, "moe": True}  # file name -> is it the mixture of experts


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file: config.json, weights by released name, inputs, and 4.57.1's outputs."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def load(name: str) -> Golden:
    """The golden file of a name in FILES; raises if this machine makes other weights."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config")))
    weights = tiny.weights(config, int(arrays.pop("seed")))
    kept, found = int(arrays.pop("weights_crc32")), checksum(weights)
    if kept != found:
        raise ValueError(
            f"golden/{name}.npz: weights have checksum {found:#x}, its maker's had {kept:#x}"
        )
    inputs = {key[3:]: arrays.pop(key) for key in list(arrays) if key.startswith("in.")}
    return Golden(config, weights, inputs, arrays)


def checksum(weights: dict[str, np.ndarray]) -> int:
    """A checksum of names and values to six digits, blind to the last bit of a libm."""
    crc = 0
    for name in sorted(weights):
        rounded = np.round(weights[name].astype(np.float64), 6) + 0.0
        crc = zlib.crc32(name.encode() + rounded.tobytes(), crc)
    return crc


def load_prompts() -> dict[str, dict[str, np.ndarray]]:
    """Name in chats.FILMED -> arrays of prompts.npz; raises if the tokenizer is another here."""
    with np.load(Path(__file__).parent / "golden" / "prompts.npz") as file:
        arrays = dict(file)
    kept, found = int(arrays.pop("tokenizer_crc32")), tokenizer_checksum()
    if kept != found:
        raise ValueError(
            f"golden/prompts.npz: the tokenizer's checksum was {kept:#x}, not {found:#x}"
        )
    prompts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        name, _, field = key.partition(".")
        prompts.setdefault(name, {})[field] = array
    return prompts


def tokenizer_checksum() -> int:
    """A checksum of the toy tokenizer's vocabulary and merges, which are trained where they are used."""
    model = json.loads(toy.tokenizer_json())["model"]
    return zlib.crc32(json.dumps([model["vocab"], model["merges"]]).encode())
