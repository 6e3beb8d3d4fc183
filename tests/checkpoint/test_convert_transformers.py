"""Live transformers: what its save_pretrained writes converts, and what --to-hf writes it loads."""

import json

import fp8_files as fp8
import hf_files as hf
import numpy as np
import ours
import pytest
import reference
import torch
from released import to_hf as to_released
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qwen3vl_jax import make_batch
from qwen3vl_jax.checkpoint.save import save_params
from qwen3vl_jax.config import TIED
from qwen3vl_jax.convert.to_hf import to_hf
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.loading import load

KINDS = {
    "dense": ("base", False),
    "moe": ("base", True),
    "tied": ("tied", False),
    "tied_moe": ("tied", True),
    "biases": ("attention_bias", False),
}


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


@pytest.mark.parametrize("kind", ["dense", "moe", "tied"])
def test_fp8_to_orbax_to_bf16_in_transformers(kind, tmp_path):
    """torch's own float8 arithmetic gives the same bits, and transformers loads the result as bf16."""
    raw, tensors = hf.small(*KINDS[kind])
    held = fp8.quantised(tensors)
    to_orbax(hf.write(tmp_path / "hf", fp8.config(raw), held, 3), tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    back, stored = load_file(tmp_path / "back" / "model.safetensors"), {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        stored |= load_file(path)
    for name, tensor in list(stored.items()):
        if tensor.dtype == torch.float8_e4m3fn:
            scales = stored.pop(f"{name}_scale_inv")
            for axis, width in zip((-2, -1), fp8.BLOCK):
                scales = scales.repeat_interleave(width, axis).narrow(axis, 0, tensor.shape[axis])
            stored[name] = (tensor.float() * scales).bfloat16()
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)
    assert all(back[name].dtype == stored[name].dtype for name in stored)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    want = state(model)
    got = {name: tensor.bfloat16().float().numpy() for name, tensor in back.items()}
    if "lm_head.weight" not in got:
        got["lm_head.weight"] = got["model.language_model.embed_tokens.weight"]
    assert want.keys() == got.keys()
    hf.assert_same(hf.turned(got) if kind == "moe" else got, want)


# tie_word_embeddings at the top and in text_config, as files have them, and whether a head is stored.
TIES = (
    (True, None, False),
    (None, True, False),
    (False, True, False),
    (False, True, True),
    (False, None, True),
)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("top, text, head", TIES)
def test_every_file_we_write_has_the_same_head_in_every_version(top, text, head, moe, tmp_path):
    """Converted, saved and exported: both keys say what is true, and the logits are the reference's."""
    raw, tensors = hf.small("base" if head else "tied", moe)
    raw["tie_word_embeddings"] = top
    raw["text_config"]["tie_word_embeddings"] = text
    to_orbax(hf.write(tmp_path / "hf", raw, tensors), tmp_path / "orbax")
    params, cfg = load(tmp_path / "hf", dtype="float32")
    save_params(tmp_path / "saved", params, cfg)
    save_params(tmp_path / "raw", params, raw)
    to_hf(tmp_path / "orbax", tmp_path / "back")
    to_hf(tmp_path / "saved", tmp_path / "saved_back")
    to_hf(tmp_path / "raw", tmp_path / "raw_back")
    for name in ("orbax", "saved", "raw", "back", "saved_back", "raw_back"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        keys = {bool(part.get(TIED)) for part in (written, written["text_config"])}
        assert keys == {not head} == {cfg.tie_word_embeddings}, name
    ids = np.arange(1, 9)[None]
    want = ours.forward(params, cfg, make_batch(cfg, input_ids=ids))[:, :8]
    for name in ("back", "saved_back", "raw_back"):
        model = reference.open_hf(tmp_path / name, moe)
        with torch.no_grad():
            got = model(input_ids=torch.from_numpy(ids)).logits
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)
