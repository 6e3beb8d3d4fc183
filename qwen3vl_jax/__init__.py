"""Qwen3-VL as small pure functions in JAX/Flax, for TPU and GPU.

Names are imported when first used, so that a command line can refuse a bad file before it spends a
second on importing jax.
"""

import importlib
from typing import TYPE_CHECKING

from qwen3vl_jax.version import __version__

if TYPE_CHECKING:
    from qwen3vl_jax.checkpoint.save import save_params
    from qwen3vl_jax.checkpoint.stacking import stack_layers, unstack_layers
    from qwen3vl_jax.config import Config
    from qwen3vl_jax.device_mesh import make_mesh
    from qwen3vl_jax.errors import InputError
    from qwen3vl_jax.inference.constraints import Constraint
    from qwen3vl_jax.inference.engine import generate_many
    from qwen3vl_jax.inference.generate import Answer, generate, stream
    from qwen3vl_jax.inference.requests import Finished, Request, Stats
    from qwen3vl_jax.inference.sampling import Sampling
    from qwen3vl_jax.inference.scoring import (
        attentions,
        embed,
        hidden_states,
        last_hidden_state,
        rerank,
        score,
        vision_states,
    )
    from qwen3vl_jax.loading import load
    from qwen3vl_jax.model.cache import decode_step, extend, grow_cache, prefill
    from qwen3vl_jax.model.structs import Batch, Features, KVCache, VisionInputs
    from qwen3vl_jax.model.transformer import forward
    from qwen3vl_jax.model.vision import vision_encode
    from qwen3vl_jax.parameters import init_params
    from qwen3vl_jax.processing.batch import make_batch, make_vision
    from qwen3vl_jax.processing.patches import drop_patches, heat_map, patch_boxes
    from qwen3vl_jax.processing.positions import rope_index
    from qwen3vl_jax.processing.processor import Processor
    from qwen3vl_jax.training.losses import loss_fn

_HOME = {
    "checkpoint.save": "save_params",
    "checkpoint.stacking": "stack_layers unstack_layers",
    "config": "Config",
    "device_mesh": "make_mesh",
    "errors": "InputError",
    "inference.constraints": "Constraint",
    "inference.engine": "generate_many",
    "inference.requests": "Finished Request Stats",
    "inference.scoring": "attentions embed hidden_states last_hidden_state rerank score vision_states",
    "inference.generate": "Answer generate stream",
    "inference.sampling": "Sampling",
    "loading": "load",
    "model.cache": "decode_step extend grow_cache prefill",
    "model.structs": "Batch Features KVCache VisionInputs",
    "model.transformer": "forward",
    "parameters": "init_params",
    "model.vision": "vision_encode",
    "processing.batch": "make_batch make_vision",
    "processing.patches": "drop_patches heat_map patch_boxes",
    "processing.positions": "rope_index",
    "processing.processor": "Processor",
    "training.losses": "loss_fn",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = ["__version__", *_MODULE]


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    hidden = {"TYPE_CHECKING", "importlib", "_HOME", "_MODULE"}
    return sorted({*globals(), *__all__} - hidden)
