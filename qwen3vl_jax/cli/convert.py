"""Hugging Face files -> Orbax, and back (--to-hf), also of a training run.

--verify checks that a checkpoint, or every step of a run, is as it was written.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qwen3vl_jax.checkpoint.config_files import PARAMS
from qwen3vl_jax.checkpoint.digests import DamagedError, saved_trees
from qwen3vl_jax.checkpoint.hf_reader import LAYOUTS
from qwen3vl_jax.checkpoint.validate import WEIGHTS
from qwen3vl_jax.config import is_run
from qwen3vl_jax.convert import SHARD_SIZE, Progress
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import console
from qwen3vl_jax.runtime.console import EXPECTED, signals_later
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.storage.paths import argument

_STOPPED = 143  # the exit code after SIGTERM
EXAMPLES = """examples:
  %(prog)s Qwen/Qwen3-VL-8B-Instruct ORBAX_DIR
  %(prog)s --to-hf RUN_DIR HF_DIR --step best
  %(prog)s --verify RUN_DIR
"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB, 500MB or 2GiB")
    return size


def _parser(program: str) -> argparse.ArgumentParser:
    parser = console.Parser(program, description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    from_what = "Hugging Face directory or Hub id; with --to-hf an Orbax directory or a RUN_DIR"
    add("source", help=from_what)
    add("out", type=argument, nargs="?", help="directory to write")
    add("--verify", action="store_true", help="read SOURCE, write nothing")
    add("--to-hf", action="store_true", help="Orbax -> safetensors")
    add("--force", action="store_true", help="replace OUT once the new one is complete")
    add("--revision", help="branch, tag or commit of a Hub id")
    ambiguous = "layout of fused experts whose shape is ambiguous"
    add("--expert-layout", choices=LAYOUTS, help=ambiguous)
    add("--weights", choices=WEIGHTS, help="fp8 keeps FP8, int8 and int4 round (default: neither)")
    add("--merge", type=argument, metavar="PEFT_DIR", help="a LoRA adapter to add to the weights")
    shard = "most bytes of a safetensors file (default: 5GB)"
    add("--max-shard-size", type=_size, default=SHARD_SIZE, metavar="SIZE", help=shard)
    add = parser.add_argument_group("a run's directory (--to-hf)").add_argument
    add("--step", help="best (lowest evaluation loss), last, or a number; default: best if any")
    add("--adapter", action="store_true", help="a LoRA run's adapter for PEFT, nothing merged")
    add("--raw", action="store_true", help="the weights of the step, not their average")
    return parser


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich import progress as rich
    from rich.console import Console

    units = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    bar = rich.Progress(title, rich.BarColumn(), *units, console=Console(stderr=True))
    task = bar.add_task(title, total=None)

    def progress(done: int, total: int) -> None:
        # Only now, so that a refusal is a line of its own.
        bar.start()
        bar.update(task, advance=done, total=total)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def _verify(directory: Path) -> None:
    """Reads a checkpoint, or all steps of a run, against the digests of its tensors."""
    with signals_later():
        from qwen3vl_jax.checkpoint.orbax_io import verify_tree

    trees, problems, count, total = [directory / PARAMS], [], 0, 0
    if is_run(directory):
        from qwen3vl_jax.training.run_dir import CHECKPOINTS, saved_steps

        steps = [directory / CHECKPOINTS / str(step) for step in saved_steps(directory)]
        trees = [step / name for step in steps for name in saved_trees(step)]
    if not trees or not trees[0].is_dir():
        raise InputError(f"{directory}: holds no {PARAMS}, expected an Orbax checkpoint or a run")
    for tree in trees:
        try:
            found = verify_tree(tree)
            count, total = count + found[0], total + found[1]
        except DamagedError as error:
            problems += [f"{tree.relative_to(directory)}: {problem}" for problem in error.problems]
    if problems:
        raise DamagedError(directory, problems)
    print(f"{directory}: {count} tensors, {total / 1e6:,.1f} MB, as they were saved")


def _run(options: argparse.Namespace) -> None:
    source = resolve(options.source, options.revision)
    if options.verify:
        _verify(source)
        return
    start = time.perf_counter()
    with _bar("to Hugging Face" if options.to_hf else "to Orbax") as progress:
        count, total, what = _convert(options, source, progress)
    seconds, size = time.perf_counter() - start, total / 1e6
    speed = f"{size:,.1f} MB in {seconds:.1f} s ({size / seconds:,.0f} MB/s)"
    print(f"{options.out}: {what}{count} tensors, {speed}")


def _convert(options: argparse.Namespace, source: Path, progress: Progress):
    """(tensors, bytes, a text of what was written) of either direction."""
    out, force, size = options.out, options.force, options.max_shard_size
    idle = {"--weights": options.weights, "--merge": options.merge} if options.to_hf else {}
    if option := next((name for name, given in idle.items() if given), ""):
        raise InputError(f"{option}: the way back writes what CKPT_DIR holds; leave it out")
    if options.to_hf and is_run(source):
        with signals_later():
            from qwen3vl_jax.convert.from_run import run_to_hf
            from qwen3vl_jax.training.run_params import SavedStep

        wanted = SavedStep(options.step, options.adapter, options.raw)
        return run_to_hf(source, out, wanted, force, size, progress)
    if options.step or options.adapter or options.raw:
        what = "--step, --adapter and --raw are for --to-hf and a run's directory"
        raise InputError(f"{options.source}: {what}")
    if is_run(source):
        advice = "export it by --to-hf RUN_DIR HF_DIR, and convert HF_DIR"
        raise InputError(f"{source}: got a run of train.py, expected a checkpoint; {advice}")
    with signals_later():
        from qwen3vl_jax.convert.to_hf import to_hf
        from qwen3vl_jax.convert.to_orbax import to_orbax

    if options.to_hf:
        return *to_hf(source, out, force, size, progress), ""
    layout, weights, merge = options.expert_layout, options.weights, options.merge
    return *to_orbax(source, out, force, layout, progress, weights, merge), ""


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the process for options that do not go together."""
    if not options.verify and options.out is None:
        parser.error("OUT_DIR is missing")
    idle = ("expert_layout",) if options.to_hf else ("max_shard_size",)
    if options.verify:
        idle = vars(options).keys() - {"source", "verify", "revision"}
    mode = "with --verify" if options.verify else f"with{'' if options.to_hf else 'out'} --to-hf"
    for name in idle:
        if getattr(options, name) != parser.get_default(name):
            said = "OUT_DIR" if name == "out" else f"--{name.replace('_', '-')}"
            parser.error(f"{said}: means nothing {mode}, leave it out")


def main(arguments: list[str] | None = None, program: str = "python -m convert") -> int:
    """Runs the command line: 0, or 2 with one line on stderr and a list of tensors that do not fit."""
    parser = _parser(program)
    options = parser.parse_args(arguments)
    _check(parser, options)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # No accelerator is needed.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        _run(options)
    except EXPECTED as e:
        return console.report(e, options.out or options.source, "interrupted: nothing was written")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else _STOPPED
    return 0


def _stop(*_: Any) -> NoReturn:
    """Ends the command at SIGTERM. Unfinished output is removed."""
    console.hide_complaints()
    sys.exit(_STOPPED)


def script(argv: list[str] | None = None, program: str = "python -m convert") -> None:
    """`main` as the whole process."""
    signal.signal(signal.SIGTERM, _stop)
    # At once, without waiting for threads.
    console.run_script(lambda: console.end_process(main(argv, program)))
