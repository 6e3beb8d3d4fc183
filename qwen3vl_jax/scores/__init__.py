"""Scores of answers against references. Imports the package's errors alone, and no jax."""
