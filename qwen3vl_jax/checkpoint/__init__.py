"""Files of weights <-> the parameter tree: Orbax, Hugging Face, PEFT, FP8, int8 and int4."""

import importlib

_HOME = {
    "load": "qwen3vl_jax.loading",
    "resolve": "qwen3vl_jax.storage.hub",
    "save_params": "qwen3vl_jax.checkpoint.save",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
