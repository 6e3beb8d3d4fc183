"""Fine-tunes Qwen3-VL from a TOML file; the same command again resumes.

    python train.py --config configs/NAME.toml --out RUN_DIR [key=value ...]

RUN_DIR holds metrics.csv, evaluation.csv, checkpoints/, config.toml, tensorboard/, answers/, refused.csv
and curves.png. `python -m convert --to-hf RUN_DIR OUT` makes Hugging Face files of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning.machines import (
    add_plan_arguments,
    check_plan_arguments,
    prepare_environment,
    read_machine,
)
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.chips import allow_gpu_memory
from qwen3vl_jax.runtime.compile_cache import HELP, PROGRAMS, keep_programs
from qwen3vl_jax.runtime.console import EXPECTED, end_process, report
from qwen3vl_jax.runtime.native_output import tidy_output
from qwen3vl_jax.storage.paths import argument, kind
from qwen3vl_jax.training.checks import check_run
from qwen3vl_jax.training.determinism import COST, make_deterministic
from qwen3vl_jax.training.recipe import Recipe, read_recipe


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=argument, required=True, help="a recipe, see configs/")
    parser.add_argument("--out", type=argument, help="the run's directory, new or of this run")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory, steps and one sample with its mask; train nothing",
    )
    add_plan_arguments(parser)
    parser.add_argument(
        "--tries",
        type=int,
        default=4,
        metavar="N",
        help="with --plan: compiles spent on the largest batch that fits, or on --search; 0: none",
    )
    parser.add_argument(
        "--search", action="store_true", help="with --plan: try meshes and remat policies"
    )
    parser.add_argument("--no-compile-cache", action="store_true", help=HELP)
    distributed.add_arguments(parser)
    parser.add_argument(
        "changes", nargs="*", metavar="key=value", help="instead of what the recipe says"
    )
    args = parser.parse_intermixed_args(argv)
    if args.dry_run and args.plan:
        parser.error("--dry-run and --plan: give one of them")
    if args.no_compile_cache and (args.dry_run or args.plan):
        parser.error("--no-compile-cache: means something only for a run that trains")
    if not args.out and not args.dry_run and not args.plan:
        parser.error("the following arguments are required: --out (or --dry-run, or --plan)")
    return args


def plan(args: argparse.Namespace, recipe: Recipe) -> bool:
    """Compiles the recipe's step for a machine that is not here; whether it fits, or one of a search."""
    machine = read_machine(args.plan, args.slices)
    prepare_environment(machine)
    from qwen3vl_jax.planning import command

    if args.search:
        found = command.search_training(recipe, machine, args.tries)
        return not args.tries or any(each.fits for _, each in found)
    return command.plan_training(recipe, machine, args.save, args.tries).fits


def train(
    recipe: Recipe, out: Path, asked: distributed.Asked | None = None, cache: bool = True
) -> None:
    """Checks what can be checked without jax, joins the other processes, then runs the recipe."""
    check_run(recipe)
    if kind(out) == "file":
        raise InputError(f"--out {out}: is a file, expected a directory")
    if recipe.deterministic:
        make_deterministic()
        print(COST, file=sys.stderr)
    allow_gpu_memory()
    index, _ = distributed.start(asked)

    def run() -> None:
        keep_programs(cache)
        from qwen3vl_jax.training.loop import train

        train(recipe, out)

    distributed.end_together(run)
    if not index:
        print(PROGRAMS, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0, 1 for a plan that does not fit, 2 for bad input, 130 for Ctrl-C.

    SIGTERM and the first Ctrl-C save what was done; SIGTERM gives 0, and a second Ctrl-C ends at once.
    """
    args = arguments(argv)
    try:
        check_plan_arguments(args)
        recipe = read_recipe(args.config, args.changes)
        if args.plan:
            return 0 if plan(args, recipe) else 1
        if args.dry_run:
            from qwen3vl_jax.training.reporting.dry_run import dry_run

            dry_run(recipe)
        else:
            train(recipe, args.out, distributed.asked_of(args), not args.no_compile_cache)
    except EXPECTED as error:
        told = "interrupted: the same command goes on from the last checkpoint"
        return report(error, args.out or args.config, told)
    return 0


if __name__ == "__main__":
    tidy_output(distributed.lost_line, distributed.LOST)
    ended = main()
    end_process(ended) if ended == 2 else sys.exit(ended)  # of a save that failed, Orbax left work
