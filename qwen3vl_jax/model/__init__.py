"""The model: pure functions on parameters, no files. Start reading in transformer.py."""
