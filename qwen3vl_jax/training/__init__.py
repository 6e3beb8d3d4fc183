"""Fine-tuning: data, packing, the step, checkpoints. `train.py` runs it; the parts are importable."""
