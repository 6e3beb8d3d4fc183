"""The handwritten digits: 1,797 scans of 8x8 pixels, and which of them are held out."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FILE = Path(__file__).with_name("digits.npz")
SPLIT_SEED = 20251015
HELD_OUT_SHARE = 0.2
ZOOM = 8  # a scan is enlarged once, so that drawing a digit is a plain bilinear read
BORDER = 8  # empty pixels around the enlarged scan: a read outside the scan finds no ink


@dataclass(frozen=True)
class Scans:
    """Enlarged scans ``ink`` [n, 80, 80] (float32, 0 paper to 1 ink) and their ``labels`` [n]."""

    ink: np.ndarray
    labels: np.ndarray

    def of(self, digit: int) -> np.ndarray:
        """Indices of the scans that show ``digit``."""
        return np.flatnonzero(self.labels == digit)

    def draw(self, rng: np.random.Generator, digit: int) -> int:
        """Index of a random scan that shows ``digit``."""
        found = self.of(digit)
        return int(found[rng.integers(len(found))])


def split(labels: np.ndarray) -> np.ndarray:
    """Mark 20 % of each digit's scans as held out, at random with a fixed seed: bool [n]."""
    rng = np.random.default_rng(SPLIT_SEED)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        held_out[rng.permutation(rows)[: round(HELD_OUT_SHARE * len(rows))]] = True
    return held_out


@lru_cache
def load(part: str) -> Scans:
    """Read the scans of one part, ``"train"`` or ``"held_out"``; no scan is in both."""
    if part not in ("train", "held_out"):
        raise ValueError(f"part of the scans: expected train or held_out, found {part!r}")
    with np.load(FILE) as file:
        wanted = file["held_out"] == (part == "held_out")
        scans, labels = file["scans"][wanted], file["labels"][wanted]
    return Scans(np.stack([_enlarge(scan) for scan in scans]), labels)


def _enlarge(scan: np.ndarray) -> np.ndarray:
    image = Image.fromarray((scan * 15).astype(np.uint8))  # 0..16 to 0..240
    side = ZOOM * scan.shape[0]
    large = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.pad(large / 240.0, BORDER)


def write() -> None:
    """Write ``digits.npz`` again from scikit-learn, split included."""
    from sklearn.datasets import load_digits  # only the maker of the file needs scikit-learn

    digits: Any = load_digits()
    labels = digits.target.astype(np.uint8)
    np.savez_compressed(
        FILE, scans=digits.images.astype(np.uint8), labels=labels, held_out=split(labels)
    )


if __name__ == "__main__":
    write()
