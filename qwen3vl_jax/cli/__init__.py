"""What infer.py and train.py run."""
