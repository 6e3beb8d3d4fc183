"""Images a second on one core, from JPEG files to patches, beside transformers' fast processor.

    python -m benchmarks.images [--seconds 5] [--json FILE]      # needs .[test]

All three decode with Pillow, on one thread, in turns: what training packs (8-bit patches, normalised by the
step), what infer.py takes (float32), and transformers' (float32).
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from demo.evaluate import CHECKPOINT
from qwen3vl_jax.processing.encoding import MediaEncoder
from qwen3vl_jax.processing.media import MediaRules
from qwen3vl_jax.processing.messages import MediaSource
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.training.data.make_samples import eight_bit

SIZES = ((1280, 720), (640, 480))
RELEASED = {"min_pixels": 65_536, "max_pixels": 16_777_216}  # of an image, as released
TURNS = 5


def photograph(width: int, height: int) -> bytes:
    """A JPEG file of smooth colours and noise, about as large as a photograph's."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noisy = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def encoders() -> dict[str, Callable[[bytes], Any]]:
    """What makes patches of a file, by name."""
    # Beside the tests, as transformers is one of their packages alone.
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from image_peer import FastProcessor

    processor = Processor.from_pretrained(CHECKPOINT)

    def of(processor: Processor) -> Callable[[bytes], Any]:
        image = processor.image_settings.override(**RELEASED)
        encode = MediaEncoder(image, processor.video_settings, MediaRules())
        return lambda data: encode(MediaSource("image", data, {})).patches

    return {
        "training": of(eight_bit(processor)),
        "infer.py": of(processor),
        "transformers": FastProcessor(**RELEASED),
    }


def rates(data: bytes, seconds: float) -> dict[str, float]:
    """Images a second by name: medians of TURNS turns. Raises SystemExit where patches differ."""
    made = encoders()
    training, ours, theirs = (encode(data) for encode in made.values())
    if training.dtype != np.uint8 or np.abs(training / 127.5 - 1 - ours).max() > 1e-6:
        raise SystemExit("training's patches are not those of infer.py in 8 bits")
    if ours.shape != theirs.shape or np.abs(ours - theirs).max() > 4 / 255:
        raise SystemExit(f"patches differ: {ours.shape}, {theirs.shape}")
    found: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(TURNS):
        for name, encode in made.items():
            start, count = time.perf_counter(), 0
            while (passed := time.perf_counter() - start) < seconds / TURNS or not count:
                encode(data)
                count += 1
            found[name].append(count / passed)
    return {name: statistics.median(x) for name, x in found.items()}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.images", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--seconds", type=float, default=5.0, help="of each size and encoder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    table = Table("image", title="images a second on one core", title_justify="left")
    for name in ("training", "infer.py", "transformers", "training, times"):
        table.add_column(name, justify="right")
    kept = {}
    for width, height in SIZES:
        found = kept[f"{width} x {height}"] = rates(photograph(width, height), args.seconds)
        times = found["training"] / found["transformers"]
        shown = [f"{x:.1f}" for x in found.values()]
        table.add_row(f"{width} x {height}", *shown, f"{times:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
