"""Checkpoints between Hugging Face's files and Orbax: `python -m convert --help`."""
