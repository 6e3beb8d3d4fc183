"""Live transformers: what its save_pretrained writes converts, and what --to-hf writes it loads."""

import hf_files as hf
import numpy as np
import pytest
import reference
import torch
from transformers import AutoModelForImageTextToText

from convert.mapping import to_hf as to_released
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from qwen3vl_jax.checkpoint import load

KINDS = {"dense": ("base", False), "moe": ("base", True), "tied": ("tied", False),
         "tied_moe": ("tied", True), "biases": ("attention_bias", False)}  # fmt: skip


def state(model) -> dict[str, np.ndarray]:
    """Every parameter of a torch model as float32."""
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_pretrained_to_orbax_and_back(kind, dtype, tmp_path):
    """A saved model has the same parameters after the round trip, and its files the same bytes."""
    ref = reference.build(*KINDS[kind])
    model = ref.model(dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    to_orbax(tmp_path / "saved", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", shard_size=150_000)
    assert len(list((tmp_path / "back").glob("model-*"))) > 2
    saved = hf.read(tmp_path / "saved")
    hf.assert_same(hf.read(tmp_path / "back"), hf.turned(saved) if ref.moe else saved)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    hf.assert_same(state(again), state(model))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_base_model_and_its_prefixes(kind, tmp_path):
    """The model under the head, saved alone, has no head and other prefixes: it loads without one."""
    ref = reference.build(*KINDS[kind])
    ref.model().model.save_pretrained(tmp_path)
    params, cfg = load(tmp_path)
    want = {name: tensor for name, tensor in ref.weights.items() if name != "lm_head.weight"}
    hf.assert_same(to_released(cfg, params), want)
