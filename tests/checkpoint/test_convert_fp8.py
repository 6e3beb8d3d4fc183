"""FP8 checkpoints: dequantised to bf16 bit for bit in every layout, in strips, or refused in one line."""

import json
import re
import tracemalloc

import fp8_files as fp8
import hf_files as hf
import ml_dtypes
import numpy as np
import pytest
from released import to_hf as to_released

from qwen3vl_jax import Config, InputError
from qwen3vl_jax.checkpoint.fp8 import dequantize_into
from qwen3vl_jax.checkpoint.hf_reader import open_hf
from qwen3vl_jax.checkpoint.save import save_params
from qwen3vl_jax.cli.convert import main
from qwen3vl_jax.convert.to_hf import to_hf
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.loading import load

LAYER = "model.language_model.layers.0."
Q, NORM = LAYER + "self_attn.q_proj.weight", LAYER + "input_layernorm.weight"
KINDS = {"dense": ("base", False), "moe": ("base", True), "tied": ("tied", False)}
BLOCKS = [fp8.BLOCK, (128, 128), (1, 100)]  # ragged, larger than any side, strips of one row


@pytest.fixture(params=KINDS)
def kind(request):
    """(config.json, bf16 weights) of a small model."""
    return hf.small(*KINDS[request.param])


def same_config(directory, raw):
    """Whether a directory's config.json is `raw`, which says nothing of quantised weights."""
    assert "quantization_config" not in json.dumps(raw)
    return json.loads((directory / "config.json").read_text()) == raw


@pytest.mark.parametrize("block", BLOCKS)
def test_round_trip_is_bf16(kind, block, tmp_path):
    """Orbax, load and the way back give the formula's weights; configs no longer speak of FP8."""
    raw, tensors = kind
    held = fp8.quantised(tensors, block)
    want = fp8.dequantised(held, block)
    source = hf.write(tmp_path / "hf", fp8.config(raw, block), held, 3)
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), want)
    for directory in (source, tmp_path / "orbax"):
        params, cfg = load(directory)
        hf.assert_same(to_released(cfg, params), want)
    save_params(tmp_path / "saved", params, files_from=source)
    save_params(tmp_path / "again", params, fp8.config(raw))
    assert all(same_config(tmp_path / name, raw) for name in ("orbax", "back", "saved", "again"))


@pytest.mark.parametrize("layout", [hf.turned, hf.one_by_one])
def test_other_expert_layouts(layout, tmp_path):
    """transformers 5's memory layout and single experts have scales in the order of their axes."""
    raw, tensors = hf.small(moe=True)
    held = fp8.quantised(layout(tensors))
    to_orbax(hf.write(tmp_path / "hf", fp8.config(raw), held, 2), tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(layout(hf.read(tmp_path / "back")), fp8.dequantised(held))


def test_key_in_text_config_and_other_prefixes(tmp_path):
    """The key may stand in text_config, without fmt; scales follow their weights' names."""
    raw, tensors = hf.small()
    held = fp8.quantised(tensors)
    quantised = fp8.config(raw)["quantization_config"]
    del quantised["fmt"]
    nested = raw | {"text_config": {**raw["text_config"], "quantization_config": quantised}}
    renamed = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    assert main([str(hf.write(tmp_path / "hf", nested, renamed)), str(tmp_path / "orbax")]) == 0
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), fp8.dequantised(held))
    assert same_config(tmp_path / "back", raw)


def test_stored_dtypes_decide(tmp_path):
    """A config with the key beside bf16 weights alone is a bf16 checkpoint with a stale key."""
    raw, tensors = hf.small()
    params, cfg = load(hf.write(tmp_path, fp8.config(raw), tensors))
    hf.assert_same(to_released(cfg, params), tensors)


def test_tied_file_may_repeat_quantised_embedding(tmp_path):
    """An equal head is dropped with its scales; one whose scales differ is refused."""
    raw, tensors = hf.small("tied")
    embed = "model.language_model.embed_tokens.weight"
    codes = fp8.quantised({Q: tensors[embed]})
    scales = codes[Q + "_scale_inv"]
    held = {**tensors, embed: codes[Q], embed + "_scale_inv": scales}
    held |= {"lm_head.weight": codes[Q], "lm_head.weight_scale_inv": scales}
    params, cfg = load(hf.write(tmp_path, fp8.config(raw), held))
    want = tensors | {embed: fp8.dequantised(codes)[Q]}
    hf.assert_same(to_released(cfg, params), want)
    held["lm_head.weight_scale_inv"] = 2 * scales
    with pytest.raises(InputError, match=r"lm_head.weight differs from"):
        load(hf.write(tmp_path, fp8.config(raw), held))


def test_every_code():
    """All 256 codes, not-a-numbers too, in a block each of several scales."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (6, 1)).view(ml_dtypes.float8_e4m3fn)
    scales = np.float32([[1, 2**-9, 3.3e-5], [0, 1e-40, 1e30]])
    out = np.empty(codes.shape, ml_dtypes.bfloat16)
    dequantize_into(codes, scales, (3, 100), out)
    want = codes.astype(np.float32) * fp8.spread(scales, codes.shape, (3, 100))
    want = want.astype(ml_dtypes.bfloat16)
    assert np.isnan(want).sum() == 12
    assert np.array_equal(np.isnan(out), np.isnan(want))
    assert out[~np.isnan(want)].tobytes() == want[~np.isnan(want)].tobytes()


@pytest.mark.parametrize("layout", [dict, hf.turned, hf.one_by_one])
def test_experts_take_little_more_than_their_result(layout, tmp_path):
    """No float32 copy of an expert tensor: beside the bf16 result there is a strip of blocks."""
    raw, tensors = hf.small(moe=True, moe_intermediate_size=600)
    held = fp8.quantised(layout(tensors), (8, 16))
    source = hf.write(tmp_path, fp8.config(raw, (8, 16)), held)
    leaf = open_hf(source, Config.from_hf(raw))["layers", 0, "mlp", "gate_up"]
    leaf.load()
    tracemalloc.start()
    array = leaf.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 2 * 7 * 40 * 1200
    assert peak < array.nbytes + 300_000 < 3 * array.nbytes


def _keys(**changes):
    def change(raw, held):
        raw["quantization_config"] |= changes

    return change


def _held(**changes):
    names = {"q": Q, "norm": NORM, "scales": Q + "_scale_inv", "alone": NORM + "_scale_inv"}

    def change(raw, held):
        for key, new in changes.items():
            tensor = held.pop(names[key], None)
            if new is not None:
                held[names[key]] = new(tensor)

    return change


REFUSED = {
    "method": (
        _keys(quant_method="gptq"),
        "hf: quantization_config.quant_method: got 'gptq', expected 'fp8'; take",
    ),
    "no_object": (
        lambda raw, held: raw.update(quantization_config="fp8"),
        "hf: quantization_config: got 'fp8', expected an object; take the bf16 release$",
    ),
    "no_method": (_keys(quant_method=None), "quant_method: got None, expected 'fp8'; take"),
    "fmt": (
        _keys(fmt="e5m2"),
        r"quantization_config.fmt: got 'e5m2', expected 'e4m3'; take the bf16",
    ),
    "no_block": (_keys(weight_block_size=None), "weight_block_size: got None, expected two sizes"),
    "bad_block": (
        _keys(weight_block_size=[128, 0]),
        r"weight_block_size: got \[128, 0\], expected",
    ),
    "no_config": (
        lambda raw, held: raw.pop("quantization_config"),
        "in model.safetensors: F8_E4M3, but config.json has no quantization_config .* fetch config",
    ),
    "no_scales": (
        _held(scales=None),
        rf"missing {Q}_scale_inv F32 \[4, 3\], the scales of {Q} in model.safetensors; fetch it again",
    ),
    "scale_shape": (
        _held(scales=lambda s: s.T.copy()),
        rf"shape of {Q}_scale_inv in model.safetensors: found \[3, 4\], expected \[4, 3\] for "
        r"\[96, 40\] in blocks of \[27, 17\]; take the bf16 release$",
    ),
    "scale_dtype": (
        _held(scales=lambda s: s.astype(ml_dtypes.bfloat16)),
        rf"dtype of {Q}_scale_inv in .*: found BF16, expected F32; take the bf16 release$",
    ),
    "scales_of_bf16": (
        _held(q=lambda q: q.astype(ml_dtypes.bfloat16)),
        rf"scales {Q}_scale_inv in .* that is BF16, expected F8_E4M3; take both from one release$",
    ),
    "scales_alone": (_held(q=None), rf"missing {Q} \[96, 40\] \(only its scales: {Q}_scale_inv in"),
    "scales_of_nothing": (
        lambda raw, held: held.update({"x.weight_scale_inv": np.ones((1, 1), np.float32)}),
        r"unknown x.weight_scale_inv in model.safetensors \[1, 1\]$",
    ),
    "vector": (
        _held(norm=lambda x: x.astype(ml_dtypes.float8_e4m3fn)),
        rf"dtype of {NORM} in .*: found F8_E4M3, expected BF16 \(it has no blocks\)$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, tmp_path, capsys):
    """What was found, what was expected and what to do, exit code 2, and nothing written."""
    raw, tensors = hf.small()
    raw, held = fp8.config(raw), fp8.quantised(tensors)
    change, message = REFUSED[name]
    change(raw, held)
    source = hf.write(tmp_path / "hf", raw, held)
    assert main([str(source), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(InputError, match=message):
        load(source)
