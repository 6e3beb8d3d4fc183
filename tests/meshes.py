"""Meshes over the eight fake devices, tiny models on them, and what one device answers."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import ours
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax import device_mesh
from qwen3vl_jax.checkpoint.device_load import path_shardings
from qwen3vl_jax.checkpoint.param_paths import flatten, nest

# Eight query heads, so that four devices can share two key/value heads; one layer of each kind.
TEXT = {"num_attention_heads": 8, "num_hidden_layers": 1, "intermediate_size": 112}
VISION = {"depth": 1, "deepstack_visual_indexes": [0]}


def mesh_of(**sizes):
    """A mesh of these sizes over the first devices."""
    return device_mesh.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def on_mesh(params, cfg, mesh):
    """Parameters of one device laid out as the rules say."""
    leaves = dict(flatten(params))
    where = path_shardings(mesh, cfg, leaves)
    return nest((path, jax.device_put(x, where[path])) for path, x in leaves.items())


class Model:
    """A tiny model, dense or of eight experts, on one device."""

    def __init__(self, sparse: bool):
        self.raw = tiny.config_dict("golden", sparse)
        self.raw["text_config"] |= TEXT | ({"num_experts": 8} if sparse else {})
        self.raw["vision_config"] |= VISION
        ref = SimpleNamespace(config=self.raw, weights=tiny.weights(self.raw, 0))
        self.params, self.cfg = ours.build(ref)

    def batch(self, *names):
        """A batch of rows of tiny.ROWS, padded on the left."""
        rows = [tiny.inputs(self.raw, name, seed) for seed, name in enumerate(names)]
        return q3.make_batch(self.cfg, **tiny.pad_batch(rows, "left"))


model = functools.cache(Model)
