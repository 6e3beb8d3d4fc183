"""qwen3vl plan and infer.py --plan: compiles a decode step and a prefill for a machine that is not here."""

import argparse
import sys

from qwen3vl_jax.cli import infer, train
from qwen3vl_jax.planning.machines import prepare_environment

PLANNED_LENGTH = 32768  # tokens of prompt and answer that are planned for without --max-len


def run(args: argparse.Namespace, *_: object) -> None:
    """Prints the plan; exit code 1 where it does not fit."""
    # Before jax is imported.
    prepare_environment(args.machine)
    import jax.numpy as jnp

    from qwen3vl_jax.cli.common import DEMO
    from qwen3vl_jax.planning.command import plan_serving
    from qwen3vl_jax.planning.program import Serving, config_of

    dtype, ckpt = jnp.dtype(args.dtype or "bfloat16"), str(args.ckpt or DEMO)
    length = args.max_len
    if length is None:
        length = min(config_of(ckpt).text.max_position_embeddings, PLANNED_LENGTH)
    serving = Serving(args.rows, length, args.prefill_chunk, dtype, args.weights)
    plans = plan_serving(ckpt, args.machine, args.mesh, serving, args.save)
    if not all(plan.fits for plan in plans):
        sys.exit(1)


def script(argv: list[str], program: str) -> None:
    """Plans serving, or with --config a recipe's training step, as the whole process."""
    if argv and not argv[0].startswith("-"):
        argv = ["--plan", *argv]
    elif not {"-h", "--help", "--help-all"}.intersection(argv):
        print(f"error: the machine is missing, as in {program} h100:8 --ckpt DIR", file=sys.stderr)
        sys.exit(2)
    trains = any(word.partition("=")[0] == "--config" for word in argv)
    (train if trains else infer).script(argv, program)
