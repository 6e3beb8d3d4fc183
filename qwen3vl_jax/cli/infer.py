"""qwen3vl ask, chat and batch, and infer.py, which is all of them and --plan: one command line."""

import contextlib
import functools
import importlib
import sys
import time

from qwen3vl_jax.cli.infer_arguments import arguments, check
from qwen3vl_jax.runtime.chips import allow_gpu_memory, quiet_libtpu
from qwen3vl_jax.runtime.compile_cache import PROGRAMS
from qwen3vl_jax.runtime.console import Status, one_line_errors, run_script
from qwen3vl_jax.runtime.native_output import tidy_output


def main(argv: list[str] | None = None, program: str = "infer.py", as_script: bool = False) -> None:
    """The command line; exits 2 with one line for bad input. as_script: it is the process's only work."""
    start = time.perf_counter()
    with one_line_errors(), Status() as status, contextlib.ExitStack() as scope:
        args = arguments(argv, program)
        check(args)
        allow_gpu_memory()
        if not args.plan:
            if as_script:
                quiet_libtpu()
                tidy_output(stdout=not args.chat)
            status.show(f"loading {args.ckpt or 'the bundled demo'}", line=False)
        importlib.import_module(f"qwen3vl_jax.cli.{args.mode}").run(args, scope, status)
    if not args.plan:
        print(PROGRAMS, file=sys.stderr)
    print(f"total {time.perf_counter() - start:.1f} s", file=sys.stderr)


def script(argv: list[str] | None = None, program: str = "infer.py") -> None:
    """`main` as the whole process."""
    run_script(functools.partial(main, argv, program, as_script=True))
