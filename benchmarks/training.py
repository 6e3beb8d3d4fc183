"""Training beside transformers on this machine: tokens a second, share of the matmul rate, memory.

    python -m benchmarks.training [2b 8b] [--only NAME] [--remat POLICY] [--no-peer] [--tiny] [--json FILE]

Random weights of released sizes, random samples, ours by the recipes of configs/ and transformers (with
peft for LoRA) with gradient checkpointing and fused AdamW, in processes of their own, one after the
other. Useful FLOPs: forward and backward of real tokens and patches, nothing twice. The peer cannot pack
rows: beside packed rows it has rows of the same length with one sample, an image in each. Ours keeps what
the device's memory allows (remat "auto"); both peaks are in the table.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.inference import child


@dataclasses.dataclass(frozen=True)
class Run:
    """A training step that is timed.

    packed: rows hold several samples with an image each; else one sample of text. lora: the rank of
    adapters on the whole decoder, 0 trains all weights, the vision tower too. base: its lora.base.
    """

    name: str
    rows: int
    length: int
    packed: bool
    lora: int = 0
    base: str = "bfloat16"


RUNS: dict[str, tuple[Run, ...]] = {
    "2b": (
        Run("full, 8 x 2,048 text, a sample a row", 8, 2048, False),
        Run("full, 8 x 2,048 packed, images, ViT trained", 8, 2048, True),
        Run("full, 8 x 4,096 packed, images, ViT trained", 8, 4096, True),
        Run("full, 2 x 32,768 packed, images, ViT trained", 2, 32768, True),
    ),
    "8b": (
        Run("LoRA r64 on the decoder, 8 x 2,048 text", 8, 2048, False, 64),
        Run("LoRA r64 on the decoder, 4 x 4,096 packed, images", 4, 4096, True, 64),
        Run("QLoRA r64 in 4 bits, 1 x 2,048 text", 1, 2048, False, 64, "int4"),
    ),
    "tiny": (
        Run("full, 2 x 128 packed", 2, 128, True),
        Run("LoRA, 2 x 128", 2, 128, False, 4),
    ),
}
PEER_LENGTH = 8192  # longer rows do not fit beside the peer's activations


def table_of(
    size: str, runs: list[Run], with_peer: bool, remat: str
) -> tuple[Table, dict[str, Any]]:
    """The table of one size, and everything that was found."""
    asked = {"size": size, "remat": remat, "works": [dataclasses.asdict(run) for run in runs]}
    # Each in a process of its own: what an earlier one held may leave no room in one piece.
    ours: list[dict[str, Any]] = []
    for work in asked["works"]:
        found = child("benchmarks.training_ours", {**asked, "works": [work]})
        ours += found[bool(ours) :]
    known = [run for run in runs if run.length <= PEER_LENGTH and run.base == "bfloat16"]
    works = [dataclasses.asdict(run) for run in known]
    peer = child("tests.training_peer", {**asked, "works": works}) if with_peer else []
    head = f"{size}, {ours[0]['device']}, {ours[0]['versions']}"
    head += f"; {peer[0]['versions']}" if peer else ""
    table = Table(title=head, title_justify="left")
    columns = ["step", "tokens/s", "real tokens", "of the matmul rate", "transformers", "times"]
    columns += ["compile, s", "peak, GiB", "planned", "transformers' peak", "loss"]
    for name in columns:
        table.add_column(name, justify="left" if name == "step" else "right")
    rate, theirs = ours[0]["matmul"], {line["run"]: line for line in peer[1:]}
    for line in ours[1:]:
        table.add_row(*_cells(line, theirs.get(line["run"], {}), rate))
    return table, {"size": size, "ours": ours, "peer": peer}


def _cells(line: dict[str, Any], other: dict[str, Any], rate: float) -> list[str]:
    """A row of the table."""
    if line.get("error"):
        return [line["run"], line["error"]]
    speed, beside = line["tokens"] / line["seconds"], other.get("error", "")[:40]
    if other.get("seconds"):
        beside = f"{other['tokens'] / other['seconds']:,.0f}"
    times = f"{speed * other['seconds'] / other['tokens']:.2f}" if other.get("seconds") else ""
    gib = 2**30
    return [
        f"{line['run']}, remat {line['remat']}",
        f"{speed:,.0f}",
        f"{line['tokens'] / line['padded']:.0%}",
        f"{line['flops'] / line['seconds'] / rate:.0%}",
        beside,
        times,
        f"{line['compile']:.0f}",
        f"{line['peak'] / gib:.1f}",
        f"{line['planned'] / gib:.1f}",
        f"{other['peak'] / gib:.1f}" if other.get("peak") else "",
        f"{line['losses'][0]:.3f} to {line['losses'][-1]:.3f}",
    ]


def main() -> int:
    """The command; the exit code is 1 if a step of ours failed."""
    name, raw = "python -m benchmarks.training", argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=raw)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name holds it")
    parser.add_argument("--remat", default="auto", metavar="POLICY", help="step.remat of ours")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    sizes = ["tiny"] if args.tiny else args.sizes or ["2b", "8b"]
    if unknown := set(sizes) - set(RUNS):
        parser.error(f"SIZE: got {', '.join(unknown)}, expected some of {', '.join(RUNS)}")
    kept = []
    for size in sizes:
        if runs := [run for run in RUNS[size] if args.only in run.name]:
            table, found = table_of(size, runs, not args.no_peer, args.remat)
            Console(width=170).print(table)
            kept.append(found)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return int(any(line.get("error") for part in kept for line in part["ours"]))


if __name__ == "__main__":
    sys.exit(main())
