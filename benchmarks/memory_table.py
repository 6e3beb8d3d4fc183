"""The longest training row that a GPU holds: by model, by what is trained, by memory.

    python -m benchmarks.memory_table [--only "8b,LoRA r64"]

One row of tokens with two patches a token, up to 131,072 tokens, remat "full", by the estimate that
--dry-run prints; 5 % of what jax may take is left free. Compiled steps of the 2B and the 8B
(`train.py --plan h200:1`) are within 5 % of it.
"""

import argparse
import bisect
import dataclasses
import sys

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.scaling_cases import config
from qwen3vl_jax.config import Config
from qwen3vl_jax.runtime.chips import GPU_SHARE
from qwen3vl_jax.training.recipe import Recipe, read_recipe
from qwen3vl_jax.training.reporting import memory_estimate

# GiB that such cards have.
CARDS = {"16 GB": 15.0, "24 GB": 22.5, "40 GB": 39.4, "80 GB": 79.1}
SIZES = ("2b", "4b", "8b", "32b", "30b-a3b")
WAYS = {
    "all weights": ("sft_2b", ()),
    "all weights in bfloat16": ("sft_2b", ("step.weights=bfloat16",)),
    "LoRA r64": ("sft_8b_lora", ()),
    "QLoRA r64 int4": ("sft_8b_lora", ("lora.base=int4",)),
}
STEP, MOST, FREE = 1024, 131_072, 0.95


def longest(recipe: Recipe, cfg: Config, room: float) -> int:
    """The most tokens of a row, in whole STEPs up to MOST, that `room` bytes hold; 0 for none."""
    parts = memory_estimate.held(recipe, cfg)

    def needed(length: int) -> int:
        pack = dataclasses.replace(
            recipe.pack, rows=1, length=length, vision_rows=1, vision_length=2 * length
        )
        asked = dataclasses.replace(recipe, pack=pack)
        return sum(memory_estimate.memory(asked, cfg, parts).values())

    return STEP * bisect.bisect(range(STEP, MOST + 1, STEP), room, key=needed)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.memory_table", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--only", default="", help="sizes and ways, as far as they are named")
    args = parser.parse_args()
    wanted = [name.strip() for name in args.only.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in (*SIZES, *WAYS)]:
        known = ", ".join((*SIZES, *WAYS))
        parser.error(f"--only: got {unknown[0]!r}, expected some of {known}; commas divide them")
    sizes = [size for size in SIZES if size in wanted] or list(SIZES)
    ways = [way for way in WAYS if way in wanted] or list(WAYS)
    table = Table("model", "trained", title="tokens of a row", title_justify="left")
    for card in CARDS:
        table.add_column(card, justify="right")
    cells = [(size, way) for size in sizes for way in ways]
    for size, way in track(cells, "estimating", console=Console(stderr=True)):
        name, changes = WAYS[way]
        recipe = read_recipe(name, ["init=normal", "steps=1000", "step.remat=full", *changes])
        cfg = config(size)
        found = [longest(recipe, cfg, FREE * GPU_SHARE * gib * 2**30) for gib in CARDS.values()]
        table.add_row(size, way, *(f"{tokens:,}" if tokens else "-" for tokens in found))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
