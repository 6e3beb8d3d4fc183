"""Seconds and memory that the processor takes for a video of one hour, with the released settings.

    python -m benchmarks.long_clip [--minutes 60] [--scratch DIR]

A video of 640 x 360 pixels at 5 frames a second is written, then read and turned into a Batch by a
process of its own, whose peak of resident memory must stay under 2 GiB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, track
from rich.table import Table

GIB = 2**30
LIMIT = 2 * GIB
HEIGHT, WIDTH, FPS = 360, 640, 5
CONSOLE = Console(stderr=True)


def frames(count: int) -> Iterator[np.ndarray]:
    """RGB frames of a wave that wanders."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    base = np.stack([x + y, x - y, 2 * y], -1).astype(np.uint8)
    for number in range(count):
        yield base + np.uint8(3 * number % 256)


def write(path: Path, count: int) -> None:
    """Encodes the video (H.264)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for frame in track(frames(count), "writing the video", count, console=CONSOLE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def measure(path: str) -> None:
    """Runs the processor in this process and prints what it took as JSON."""
    from demo.evaluate import CHECKPOINT
    from qwen3vl_jax.processing.processor import Processor
    from qwen3vl_jax.processing.video_patches import VideoSettings

    demo = Processor.from_pretrained(CHECKPOINT)  # for its tokenizer; its videos are smaller
    proc = Processor(**{**vars(demo), "video_settings": VideoSettings()})
    content = [{"type": "video", "video": path}, {"type": "text", "text": "What happens?"}]
    chat = [{"role": "user", "content": content}]
    found: dict[str, Any] = {"start": _peak()}
    start = time.perf_counter()
    arrays = proc.inputs(chat)
    found |= {"seconds": time.perf_counter() - start, "inputs": _peak()}
    (used,) = arrays["video_metadata"]
    found["frames"], found["last"] = len(used.indices), used.seconds[-1]
    found["tokens"] = arrays["input_ids"].shape[1]
    found["pixels"] = arrays["pixel_values_videos"].nbytes
    found["grid"] = arrays["video_grid_thw"][0].tolist()
    del arrays
    proc(chat)
    found["batch"] = _peak()
    print(json.dumps(found))


def _peak() -> int:
    """The most memory that this process has had resident, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(path: Path) -> dict[str, Any]:
    """What `measure` prints, in a process of its own."""
    code = f"from benchmarks.long_clip import measure; measure({str(path)!r})"
    columns = (SpinnerColumn(), TextColumn("reading it"), TimeElapsedColumn())
    with Progress(*columns, console=CONSOLE) as bar:
        bar.add_task("reading it", total=None)
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> int:
    """Prints the table; the exit code is 1 if the peak is over the limit."""
    parser = argparse.ArgumentParser("python -m benchmarks.long_clip", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--scratch", type=Path, help="where 250 MB are free; default: a temporary one"
    )
    options = parser.parse_args()
    count = round(options.minutes * 60 * FPS)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = Path(folder) / "clip.mp4"
        write(path, count)
        found, size = run(path), path.stat().st_size
    table = Table("figure", "value", title=f"{options.minutes:g} minutes of {WIDTH} x {HEIGHT}")
    t, h, w = found["grid"]
    for name, value in (
        ("frames in the file", f"{count:,} ({size / 1e6:,.0f} MB)"),
        ("frames used", f"{found['frames']:,}, the last at {found['last']:,.1f} s"),
        (
            "their size",
            f"{16 * w} x {16 * h}, {t * h * w // 4:,} visual tokens of {found['tokens']:,}",
        ),
        ("seconds to read it", f"{found['seconds']:.1f}"),
        ("patches in memory", f"{found['pixels'] / GIB:.2f} GiB"),
        ("peak RSS before", f"{found['start'] / GIB:.2f} GiB"),
        ("peak RSS, arrays", f"{found['inputs'] / GIB:.2f} GiB"),
        ("peak RSS, Batch", f"{found['batch'] / GIB:.2f} GiB of {LIMIT / GIB:.0f} allowed"),
    ):
        table.add_row(name, value)
    Console().print(table)
    return int(found["batch"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
