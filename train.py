"""Fine-tunes Qwen3-VL: python train.py --config configs/NAME.toml --out RUN_DIR [key=value ...]"""

from qwen3vl_jax.cli.train import main, script

__all__ = ["main"]

if __name__ == "__main__":
    script()
