"""A batch file three ways on this machine: ``python -m benchmarks.batch`` (needs the test extra).

The same prompts (images in most of them, some the same, and text), float32 and greedy, with answers
of unequal length: one at a time through generate, through the engine's rows, and through transformers'
generate, 16 at a time. The model is random, of the real architecture and --layers x
--hidden wide; answers end where they are told to, since a random model never stops by itself: a batch of
transformers runs until its longest answer ends. All three are run twice and timed the second time.
The exit code is 1 if an answer differs or the engine is slower than it must be.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

PEER_ROWS = 16
TIMES_ALONE, TIMES_PEER, BUSY = 3.0, 2.0, 0.85  # the least that the engine must reach


def config(layers: int, hidden: int) -> dict:
    """The demo's config.json with a larger decoder."""
    from demo.evaluate import CHECKPOINT

    raw = json.loads((CHECKPOINT / "config.json").read_text())
    raw["text_config"] |= {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64,
    }
    raw["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    raw["text_config"]["dtype"] = "float32"  # transformers would make a bfloat16 model of it
    raw["vision_config"]["out_hidden_size"] = hidden
    return raw


def prompts(proc, count: int):
    """(arrays of each prompt, tokens that each answer has)."""
    import numpy as np
    import prompt_lines

    with tempfile.TemporaryDirectory() as folder:
        lines = prompt_lines.mixed(Path(folder), 120)[:count]
        arrays = [proc.inputs(line["messages"]) for line in lines]
    return arrays, [int(n) for n in np.random.default_rng(0).integers(8, 128, len(lines))]


def one_at_a_time(params, cfg, arrays, counts) -> list[list[int]]:
    """Each prompt by itself through generate."""
    import qwen3vl_jax as q3

    found = []
    for a, count in zip(arrays, counts, strict=True):
        batch = q3.make_batch(cfg, **a)
        found.append(q3.generate(params, cfg, batch, max_new_tokens=count, stop_ids=()).tokens[0])
    return [tokens.tolist() for tokens in found]


def engine(params, cfg, arrays, counts, rows, stats) -> list[list[int]]:
    """All of them through generate_many."""
    import qwen3vl_jax as q3

    asked = (q3.Request(i, a, n) for i, (a, n) in enumerate(zip(arrays, counts, strict=True)))
    many = q3.generate_many(params, cfg, asked, stop_ids=(), rows=rows, stats=stats)
    return [one.tokens for one in sorted(many, key=lambda one: one.key)]


def faults(alone: float, ours: float, theirs: float, busy: float, differ: int) -> list[str]:
    """What is not as it must be: tokens/s, the share of busy rows, answers that differ."""
    found = {
        f"{ours / alone:.2f}x one at a time, expected {TIMES_ALONE}": ours < TIMES_ALONE * alone,
        f"{ours / theirs:.2f}x transformers, expected {TIMES_PEER}": ours < TIMES_PEER * theirs,
        f"rows busy {busy:.1%}, expected {BUSY:.0%}": busy < BUSY,
        f"{differ} answers differ": differ > 0,
    }
    return [text for text, wrong in found.items() if wrong]


def timed_twice(way: Callable[[], Any], before: Callable[[], Any]) -> tuple[Any, list[float]]:
    """What `way` gives, and the seconds of its first run, which compiles, and of its second."""
    found, seconds = None, []
    for _ in range(2):
        before()
        start = time.perf_counter()
        found = way()
        seconds.append(time.perf_counter() - start)
    return found, seconds


def arguments() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description="One at a time, the engine, transformers.")
    parser.add_argument("--prompts", type=int, default=200, help="at most 300")
    parser.add_argument("--rows", type=int, default=32, help="of the engine")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    return parser.parse_args()


def small_model(layers: int, hidden: int) -> tuple[dict[str, Any], Any, Any]:
    """(config.json, Config, random parameters) of a small model, in float32."""
    import jax

    import qwen3vl_jax as q3

    raw = config(layers, hidden)
    cfg = q3.Config.from_hf(raw)
    params = jax.jit(functools.partial(q3.init_params, cfg=cfg))(jax.random.key(0))
    # Wide enough that greedy answers vary: at 0.02 every prompt gets the same token for ever.
    return raw, cfg, jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)


def main() -> int:
    """Runs the three, prints the table and what is not as it must be."""
    args = arguments()
    import batch_peer
    import jax
    from rich.console import Console
    from rich.table import Table

    import qwen3vl_jax as q3
    from demo.evaluate import CHECKPOINT
    from qwen3vl_jax.inference.requests import Stats

    raw, cfg, params = small_model(args.layers, args.hidden)
    proc = q3.Processor.from_pretrained(CHECKPOINT)
    arrays, counts = prompts(proc, args.prompts)
    model, stats = batch_peer.build(raw, cfg, params), []
    ways = {
        "one at a time": lambda: one_at_a_time(params, cfg, arrays, counts),
        f"engine, {args.rows} rows": lambda: engine(
            params, cfg, arrays, counts, args.rows, stats[-1]
        ),
        f"transformers, batch {PEER_ROWS}": lambda: batch_peer.answers(
            model, arrays, counts, PEER_ROWS, proc.tokenizer.pad_id
        ),
    }
    title = f"{len(arrays)} prompts, {sum(counts)} tokens, {args.layers} x {args.hidden}, float32, "
    title += jax.devices()[0].device_kind
    names = ("", "tokens/s", "seconds", "first run", "answers of one at a time")
    table = Table(*names, title=title)
    reference, rates, differ = None, {}, 0
    for name, way in ways.items():
        found, seconds = timed_twice(way, lambda: stats.append(Stats()))
        reference = found if reference is None else reference
        same = sum(a == b for a, b in zip(found, reference, strict=True))
        differ += len(found) - same
        rates[name] = sum(counts) / seconds[1]
        times = f"{rates[name]:.0f}", f"{seconds[1]:.1f}", f"{seconds[0]:.1f} s"
        table.add_row(name, *times, f"{same} of {len(found)}")
        if name.startswith("engine"):
            busy = stats[-1].busy
    Console(width=100).print(table)
    alone, ours, theirs = rates.values()
    print(
        f"the engine is {ours / alone:.1f}x one at a time and {ours / theirs:.1f}x transformers; rows "
        f"busy {busy:.0%}"
    )
    missed = faults(alone, ours, theirs, busy, differ)
    print(*(f"MISSED: {text}" for text in missed), sep="\n", end="\n" if missed else "")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
