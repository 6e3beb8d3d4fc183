"""The commands of `qwen3vl`; infer.py, train.py and `python -m convert` run them too."""
