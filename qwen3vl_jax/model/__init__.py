"""The model: pure functions on parameters, no files. Start reading in transformer.py."""

import importlib

_HOME = dict.fromkeys(
    (
        "forward",
        "hidden_states",
        "last_hidden_state",
        "attentions",
        "init_params",
        "stack_layers",
        "unstack_layers",
        "logical_axes",
    ),
    "qwen3vl_jax.model.transformer",
)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
