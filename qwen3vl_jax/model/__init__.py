"""The model: pure functions on parameters, no files. Start reading in transformer.py."""

import importlib

_NAMES = (
    "forward hidden_states last_hidden_state attentions init_params stack_layers unstack_layers"
)


def __getattr__(name: str):
    if name not in (*_NAMES.split(), "logical_axes"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("qwen3vl_jax.model.transformer"), name)
