"""Asks a Qwen3-VL checkpoint about images and videos. Without arguments: the demo on its image.

python infer.py --ckpt DIR --image a.jpg --image b.jpg --prompt "What differs?" --stream
"""

from qwen3vl_jax.cli.infer import main, script

__all__ = ["main"]

if __name__ == "__main__":
    script()
