"""Asks a Qwen3-VL checkpoint about images and videos. Without arguments: the demo on its image.

python infer.py --ckpt DIR --image a.jpg --image b.jpg --prompt "What differs?" --stream
"""

import contextlib
import importlib
import sys
import time

from qwen3vl_jax.cli.infer_arguments import arguments, check
from qwen3vl_jax.runtime.chips import allow_gpu_memory, quiet_libtpu
from qwen3vl_jax.runtime.compile_cache import PROGRAMS
from qwen3vl_jax.runtime.console import Status, one_line_errors, run_script
from qwen3vl_jax.runtime.native_output import tidy_output


def main(argv: list[str] | None = None) -> None:
    """The command line; exits 2 with one line for bad input."""
    start = time.perf_counter()
    with one_line_errors(), Status() as status, contextlib.ExitStack() as scope:
        args = arguments(argv, (__doc__ or "").split("\n")[0])
        check(args)
        allow_gpu_memory()
        if not args.plan:
            if __name__ == "__main__":
                quiet_libtpu()
                tidy_output(stdout=not args.chat)
            status.show(f"loading {args.ckpt or 'the bundled demo'}", line=False)
        importlib.import_module(f"qwen3vl_jax.cli.{args.mode}").run(args, scope, status)
    if not args.plan:
        print(PROGRAMS, file=sys.stderr)
    print(f"total {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
