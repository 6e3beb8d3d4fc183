"""FP8 kept as it is: the same weights in memory, the same bytes on the way back, or refused."""

import functools
import json
import re
from pathlib import Path

import fp8_files as fp8
import hf_files as hf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ours
import pytest
import tiny

import qwen3vl_jax as q3
from convert.__main__ import main
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from qwen3vl_jax import InputError
from qwen3vl_jax.checkpoint.device_load import as_dicts
from qwen3vl_jax.checkpoint.name_map import param_specs
from qwen3vl_jax.checkpoint.save import save_params
from qwen3vl_jax.loading import load
from qwen3vl_jax.model.quantized import Quantized, dequantize

KINDS = {"dense": ("base", False), "moe": ("base", True), "tied": ("tied", False)}
# Ragged and across heads (16 wide), half a head, a head, larger than any side, strips of one row.
BLOCKS = [fp8.BLOCK, (8, 8), (16, 16), (128, 128), (1, 100)]
# Each block of both kinds of layers; a tied head is no matrix in blocks.
PAIRS = [(kind, block) for kind in ("dense", "moe") for block in BLOCKS] + [("tied", fp8.BLOCK)]
LAYER = "model.language_model.layers.0."
BOUND = 2e-5  # float32, as in the parity tests


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


@functools.partial(jax.jit, static_argnames="dtype")
def multiplied_out(params, dtype):
    """The tree with plain arrays in `dtype`."""
    return jax.tree.map(lambda w: dequantize(w, dtype), params, is_leaf=is_quantized)


def bits(tree):
    """Dtype, shape and bytes of every leaf, in order."""
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(as_dicts(tree))]


def write(directory, kind="dense", block=fp8.BLOCK, layout=dict, shards=1, gain=1):
    """(FP8 directory, the tensors in it) of a small model; gain multiplies the scales."""
    raw, tensors = hf.small(*KINDS[kind])
    held = fp8.quantised(layout(tensors), block)
    held |= {name: held[name] * np.float32(gain) for name in held if name.endswith("_scale_inv")}
    return hf.write(directory, fp8.config(raw, block), held, shards), held


@pytest.mark.parametrize(("kind", "block"), PAIRS)
def test_every_form_is_the_dequantised_weights(kind, block, tmp_path):
    """Files, an Orbax directory and a saved one hold one tree, which multiplied out is load's own.

    Through Orbax and back: codes, scales, config.json, and the whole file, byte for byte.
    """
    source, held = write(tmp_path / "hf", kind, block)
    assert main([str(source), str(tmp_path / "orbax"), "--weights", "fp8"]) == 0
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), held)
    for name in ("config.json", "model.safetensors", *hf.SIDE_FILES):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    config = (source / "config.json").read_bytes()
    assert (tmp_path / "orbax" / "config.json").read_bytes() == config
    params, cfg = load(source, weights="fp8")
    stored = [w for w in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(w)]
    parts = [row for row in param_specs(cfg) if fp8.QUANTISED.search(row.parts[0].name)]
    assert len(stored) == len(parts) > 5
    assert {w.values.dtype for w in stored} == {np.dtype(ml_dtypes.float8_e4m3fn)}
    assert {w.scale.dtype for w in stored} == {np.dtype(np.float32)}
    assert bits(multiplied_out(params, "bfloat16")) == bits(
        jax.tree.map(lambda w: w.astype(jnp.bfloat16), load(source)[0])
    )
    save_params(tmp_path / "saved", params, files_from=source)
    save_params(tmp_path / "again", params, json.loads(config))
    write(tmp_path / "shards", kind, block, shards=3)
    forms = [("orbax", None), ("orbax", "fp8"), ("saved", None), ("again", None), ("shards", "fp8")]
    for name, weights in forms:
        assert bits(load(tmp_path / name, weights=weights)[0]) == bits(params)
    to_hf(tmp_path / "saved", tmp_path / "saved_back")
    hf.assert_same(hf.read(tmp_path / "saved_back"), held)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_is_that_of_the_rest(kind, tmp_path):
    """Codes and scales are never cast; everything else is, and the computation follows it."""
    source, _ = write(tmp_path / "hf", kind)
    as_stored, _ = load(source, weights="fp8")
    params, cfg = load(source, weights="fp8", dtype="float32")

    def check(a, b):
        if is_quantized(a):
            assert bits(a) == bits(b)
        else:
            assert b.dtype == jnp.float32

    jax.tree.map(check, as_stored, params, is_leaf=is_quantized)
    to_orbax(source, tmp_path / "orbax", weights="fp8")
    assert bits(load(tmp_path / "orbax", dtype="float32")[0]) == bits(params)
    batch = q3.make_batch(
        cfg, **tiny.inputs(json.loads((source / "config.json").read_text()), "text")
    )
    states = jax.eval_shape(functools.partial(q3.hidden_states, cfg=cfg), params, batch=batch)
    assert states.dtype == jnp.float32


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("dense", "float32"), ("moe", "float32"), ("moe", "bfloat16"), ("tied", "bfloat16")],
)
def test_logits_of_every_entrance(kind, dtype, tmp_path):
    """forward, stacked; prefill and decode_step, not stacked: those of the weights multiplied out.

    In bf16 these are what load gives by default, the dequantised weights.
    """
    source, _ = write(tmp_path, kind, gain=60)  # so large that logits hang on the codes
    params, cfg = load(source, weights="fp8", dtype=dtype)
    raw = json.loads((source / "config.json").read_text())
    batch = q3.make_batch(cfg, **tiny.inputs(raw, "text"))
    if dtype == "float32":
        plain, bound = multiplied_out(params, dtype), BOUND
    else:  # twice what bf16 itself changes, as in the parity tests: 0 on a CPU, not where fusions differ
        plain = load(source, dtype=dtype)[0]
        exact = ours.forward(multiplied_out(params, "float32"), cfg, batch)
        bound = 2 * ours.worst(ours.forward(plain, cfg, batch), exact)
        assert bound < 0.1
    want, got = (ours.forward(p, cfg, batch) for p in (plain, params))
    assert ours.worst(got, want) <= bound
    token = jnp.asarray([7], jnp.int32)
    found = []
    for p in (plain, params):
        cache, logits = ours.prefill(p, cfg, batch, 64)
        found.append((logits, ours.decode_step(p, cfg, cache, token)[1]))
    for want, got in zip(*found, strict=True):
        assert ours.worst(got, want) <= bound
    other = jax.tree.map(
        lambda w: w.replace(scale=w.scale[::-1]) if is_quantized(w) else w,
        params,
        is_leaf=is_quantized,
    )
    assert ours.worst(ours.forward(other, cfg, batch), ours.forward(params, cfg, batch)) > 0.1


@pytest.mark.parametrize("layout", [hf.turned, hf.one_by_one])
def test_other_expert_layouts_come_back_released(layout, tmp_path):
    """Square blocks that end with each expert's matrix can be turned: scales with their codes."""
    source, held = write(tmp_path / "hf", "moe", (8, 8), layout)
    to_orbax(source, tmp_path / "orbax", weights="fp8")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    want, _ = load(source)
    back, _ = load(tmp_path / "back")
    assert bits(back) == bits(want)
    weights = load(tmp_path / "orbax")[0]
    assert bits(multiplied_out(weights, "bfloat16")) == bits(
        jax.tree.map(lambda w: w.astype(jnp.bfloat16), want)
    )
    if layout is hf.turned:
        name = LAYER + "mlp.experts.down_proj_scale_inv"
        assert np.array_equal(hf.read(tmp_path / "back")[name], held[name].transpose(0, 2, 1))


def test_whatever_a_file_quantises_is_kept(tmp_path):
    """A file may also hold its embedding, router, vision tower and positions in FP8."""
    raw, tensors = hf.small("tied", moe=True)
    held = {}
    for name, tensor in tensors.items():
        if tensor.ndim not in (2, 3):
            held[name] = tensor
            continue
        codes = fp8.quantised({LAYER + "self_attn.q_proj.weight": tensor}).values()
        held |= dict(zip((name, f"{name}_scale_inv"), codes, strict=True))
    source = hf.write(tmp_path / "hf", fp8.config(raw), held)
    params, cfg = load(source, weights="fp8", dtype="float32")
    parts = (params["embed"], params["vision"]["pos"], params["vision"]["merger"]["fc1"])
    assert all(is_quantized(w) for w in (*parts, params["layers"][1]["mlp"]["router"]))
    batch = q3.make_batch(cfg, **tiny.inputs(raw, "one_picture"))
    want = ours.forward(multiplied_out(params, "float32"), cfg, batch)
    assert ours.worst(ours.forward(params, cfg, batch), want) < BOUND

    def step(params):
        cache, _ = q3.prefill(params, cfg, batch, 64)
        return q3.decode_step(params, cfg, cache, jnp.asarray([7], jnp.int32))[1]

    assert jax.eval_shape(step, params).dtype == jnp.float32
    to_orbax(source, tmp_path / "orbax", weights="fp8")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), held)


@pytest.mark.parametrize("size", ["2b", "4b", "8b", "32b", "30b-a3b", "235b-a22b"])
def test_memory_of_released_sizes(size):
    """Codes and scales in blocks of 128 take at most 0.51 of the bf16 bytes."""
    found = [r for r in param_specs(q3.Config.named(size)) if fp8.QUANTISED.search(r.parts[0].name)]
    codes = sum(int(np.prod(row.shape)) for row in found)
    scales = 4 * sum(int(np.prod(row.scale_shape((128, 128)))) for row in found)
    assert codes + scales <= 0.51 * 2 * codes
    if size == "30b-a3b":  # the released file's own numbers: nothing is written twice
        parts = [part for row in param_specs(q3.Config.named(size)) for part in row.parts]
        count = sum(len(row.parts) for row in found)
        assert (len(parts) + count, count) == (1170, 288)
        assert (codes, scales) == (29_896_998_912, 7_299_072)


# ---- what is refused ----
def _config(directory, change):
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return directory


def _bf16(folder):
    return hf.write(folder / "hf", *hf.small())


def _bf16_orbax(folder):
    to_orbax(_bf16(folder), folder / "orbax")
    return folder / "orbax"


def _odd(layout):
    return lambda folder: write(folder / "hf", "moe", layout=layout)[0]


def _mixed(folder):
    raw, tensors = hf.small()
    held = fp8.quantised(tensors)
    name = LAYER + "self_attn.k_proj.weight"
    held[name] = tensors[name]
    del held[f"{name}_scale_inv"]
    return hf.write(folder / "hf", fp8.config(raw), held)


REFUSED = {
    "bf16": (
        _bf16,
        "hf: holds no FP8 weights, and .*or leave it out, or take .*int8$",
    ),
    "bf16_orbax": (_bf16_orbax, "orbax: holds no FP8 weights, and weights fp8 needs"),
    "turned": (
        _odd(hf.turned),
        r"blocks of .*gate_up_proj in .*: \[27, 17\] do not fit the released",
    ),
    "single": (
        _odd(hf.one_by_one),
        r"blocks of .*experts.\*: \[27, 17\] do not fit .* without weights",
    ),
    "mixed": (
        _mixed,
        "dtype of layers.0.attn.qkv: .*q_proj.weight float8_e4m3fn, .*k_proj.* bfloat16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, tmp_path, capsys):
    """What was found and what to do; the default still loads each of them."""
    make, message = REFUSED[name]
    source = make(tmp_path)
    before = hf.listing(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load(source, weights="fp8")
    assert "\n" not in str(error.value)
    if source.name == "hf":
        assert main([str(source), str(tmp_path / "out"), "--weights", "fp8"]) == 2
        assert re.search(message, capsys.readouterr().err.splitlines()[0])
    assert hf.listing(tmp_path) == before
    load(source)


def test_width_of_single_experts(tmp_path):
    """Square blocks that cross from gate into up would be blocks of no released file."""
    source, _ = write(tmp_path / "hf", "moe", (16, 16), hf.one_by_one)  # 24 wide
    with pytest.raises(
        InputError, match=r"blocks of .*: \[16, 16\] do not fit the released layout"
    ):
        load(source, weights="fp8")


KEPT = {
    "no_block": (
        lambda raw: raw.pop("quantization_config"),
        "found float8_e4m3fn, expected int8, int4, or",
    ),
    "other_block": (
        lambda raw: raw["quantization_config"].update(weight_block_size=[27, 20]),
        r"shape of layers.0.attn.o.scale: found \[40, 6, 16\], expected \[40, 6, 4\]",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_directory_needs_its_config(name, tmp_path):
    """load and the way back both see a config.json that does not say how the weights are blocked."""
    source, _ = write(tmp_path / "hf")
    to_orbax(source, tmp_path / "orbax", weights="fp8")
    change, message = KEPT[name]
    _config(tmp_path / "orbax", change)
    for use in (load, lambda orbax: to_hf(orbax, tmp_path / "back")):
        with pytest.raises(InputError, match=message):
            use(tmp_path / "orbax")


def test_save_params_needs_the_block(tmp_path):
    """A Config does not say how weights are quantised; the message does."""
    params, cfg = load(write(tmp_path / "hf")[0], weights="fp8")
    with pytest.raises(InputError, match=r"float8_e4m3fn with quantization_config in config\.json"):
        save_params(tmp_path / "out", params, cfg)
    assert not Path(tmp_path / "out").exists()
