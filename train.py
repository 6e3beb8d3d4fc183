"""Fine-tunes Qwen3-VL: python train.py --config configs/NAME.toml --out RUN_DIR [key=value ...]"""

import sys

from qwen3vl_jax.cli.train import main
from qwen3vl_jax.runtime.console import end_process
from qwen3vl_jax.runtime.distributed import LOST, lost_line
from qwen3vl_jax.runtime.native_output import tidy_output

if __name__ == "__main__":
    tidy_output(lost_line, LOST)
    code = main()
    # After a save that failed, threads of Orbax may still run and crash the interpreter's own end.
    end_process(code) if code == 2 else sys.exit(code)
