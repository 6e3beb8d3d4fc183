"""Fine-tunes Qwen3-VL from a TOML file; the same command again resumes.

RUN_DIR holds metrics.csv, evaluation.csv, checkpoints/, config.toml, tensorboard/, answers/, refused.csv
and curves.png. `qwen3vl convert --to-hf RUN_DIR OUT` makes Hugging Face files of it.
"""

import argparse
import sys

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning import machines
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.chips import allow_gpu_memory
from qwen3vl_jax.runtime.compile_cache import HELP, KEPT_PROGRAMS, PROGRAMS, keep_programs
from qwen3vl_jax.runtime.console import EXPECTED, Parser, end_process, report
from qwen3vl_jax.runtime.native_output import tidy_output
from qwen3vl_jax.storage.paths import argument, kind
from qwen3vl_jax.training.environment import COST, make_deterministic
from qwen3vl_jax.training.recipe import Recipe, check_run, read_recipe
from qwen3vl_jax.training.toml_tables import FOREIGN

USAGE = "%(prog)s --config NAME|FILE [--out RUN_DIR] [key=value ...] [options]"
EXAMPLES = """examples:
  %(prog)s --config sft_2b --out RUN_DIR data.sources.0.path=chats.jsonl
  %(prog)s --config sft_8b_lora --dry-run data.sources.0.path=chats.jsonl lora.base=int8
  %(prog)s --config sft_235b_pod --plan v5p:4x8x8
"""


def arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    """The options; ends the process for unknown ones and for --help."""
    keys = {f"--{name.replace('_', '-')}": f"did you mean {key}?" for name, key in FOREIGN.items()}
    common = "config out dry_run plan changes"
    parser = Parser(program, common, keys, usage=USAGE, description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    of_recipe = "the recipe: a TOML file, or the bare name of one in configs/, as sft_2b"
    add("--config", type=argument, required=True, metavar="NAME|FILE", help=of_recipe)
    add("--out", type=argument, metavar="RUN_DIR", help="a new directory, or a run to resume")
    add("--dry-run", action="store_true", help="print memory, steps and a sample; train nothing")
    add("--no-compile-cache", action="store_true", help=HELP)
    keys = "change keys of the recipe, as steps=200 data.sources.0.path=chats.jsonl"
    add("changes", nargs="*", metavar="key=value", help=keys)
    distributed.add_arguments(parser)
    add = machines.add_plan_arguments(parser).add_argument
    tries = "with --plan: compiles for the largest batch, or --search (default: %(default)s)"
    add("--tries", type=int, default=4, metavar="N", help=tries)
    add("--search", action="store_true", help="with --plan: try meshes and remat policies")
    args = parser.parse_intermixed_args(argv)
    if args.dry_run and args.plan:
        parser.error("--dry-run and --plan: give one of them")
    if args.no_compile_cache and (args.dry_run or args.plan):
        parser.error("--no-compile-cache: means something only for a run that trains")
    if not args.out and not args.dry_run and not args.plan:
        parser.error("the following arguments are required: --out (or --dry-run, or --plan)")
    return args


def plan(args: argparse.Namespace, recipe: Recipe) -> bool:
    """Compiles the recipe's step for a machine that is not here; whether it, or one of a search, fits."""
    # Before jax is imported.
    machines.prepare_environment(args.machine)
    from qwen3vl_jax.planning import command

    if args.search:
        found = command.search_training(recipe, args.machine, args.tries)
        return not args.tries or any(plan.fits for _, plan in found)
    return command.plan_training(recipe, args.machine, args.save, args.tries).fits


def train(args: argparse.Namespace, recipe: Recipe) -> None:
    """Checks all that can be checked without jax, joins the other processes, and runs the recipe."""
    processes = distributed.asked_of(args)
    check_run(recipe)
    if kind(args.out) == "file":
        raise InputError(f"--out {args.out}: is a file, expected a directory")
    if recipe.deterministic:
        make_deterministic()
        print(COST, file=sys.stderr)
    allow_gpu_memory()
    index, _ = distributed.start(processes)

    def run() -> None:
        distributed.check_joined()
        keep_programs(not args.no_compile_cache, str(args.out / KEPT_PROGRAMS) if processes else "")
        from qwen3vl_jax.training import loop

        loop.train(recipe, args.out)

    distributed.end_together(run)
    if not index:
        print(PROGRAMS, file=sys.stderr)


def main(argv: list[str] | None = None, program: str = "train.py") -> int:
    """The command line; 0, 1 for a plan that does not fit, 2 for bad input, 130 for Ctrl-C.

    SIGTERM and the first Ctrl-C save what was done; SIGTERM gives 0, and a second Ctrl-C ends at once.
    """
    args = arguments(argv, program)
    try:
        machines.check_plan_arguments(args)
        recipe = read_recipe(args.config, args.changes)
        if args.plan:
            return 0 if plan(args, recipe) else 1
        if args.dry_run:
            from qwen3vl_jax.training.reporting.dry_run import dry_run

            dry_run(recipe)
        else:
            train(args, recipe)
    except EXPECTED as error:
        message = "interrupted: the same command goes on from the last checkpoint"
        return report(error, args.out or args.config, message)
    return 0


def script(argv: list[str] | None = None, program: str = "train.py") -> None:
    """`main` as the whole process."""
    tidy_output(distributed.lost_line, distributed.LOST)
    code = main(argv, program)
    # After a save that failed, threads of Orbax may still run and crash the interpreter's own end.
    end_process(code) if code == 2 else sys.exit(code)
