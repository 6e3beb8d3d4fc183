"""python -m convert HF_DIR OUT_DIR, and back: python -m convert --to-hf CKPT_DIR OUT_DIR."""

from qwen3vl_jax.cli.convert import script

if __name__ == "__main__":
    script()
