"""What train.py runs: recipes, the loop, the train step, checkpoints of a run."""
