"""int8 weights: the formula, what it is for, the same from every form, and a measured logit error."""

import functools
import json
import re
from pathlib import Path

import fp8_files as fp8
import hf_files as hf
import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tiny
from released import from_hf

import qwen3vl_jax as q3
from benchmarks import int8_error
from benchmarks.int8_error import logit_error
from qwen3vl_jax import Config, InputError
from qwen3vl_jax.checkpoint import quantize
from qwen3vl_jax.checkpoint.device_load import as_dicts
from qwen3vl_jax.checkpoint.lazy_tensor import eight_bit
from qwen3vl_jax.checkpoint.name_map import param_specs
from qwen3vl_jax.checkpoint.param_paths import flatten
from qwen3vl_jax.checkpoint.save import save_params
from qwen3vl_jax.cli.convert import main
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.loading import load
from qwen3vl_jax.model.quantized import Quantized, dequantize

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "dense": {},
    "moe": {"moe": True},
    "tied with biases": {"variant": "tied", "attention_bias": True},
}
# For each quantised array of a tree the axes that its scales do not have (their size is 1); experts are
# [E, in, out], gate and up of a dense model [2, out, in].
SUMMED = {"embed": (1,), "head": (1,), "qkv": (3,), "o": (1, 2), "gate_up": (2,), "down": (1,)}
EXPERTS = {"gate_up": (1,)}
LINE = (
    r"int8: logits differ by (\d+\.\d\d)% rms \((\d+\.\d\d)% of the largest at most\), the "
    r"likeliest token agrees at (\d+) of 64 places"
)
BOUND = 2e-5


def at_path(tree, path):
    """The subtree at a path."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


def bits(tree):
    """Place, dtype, shape and bytes of every leaf."""
    leaves = sorted(flatten(as_dicts(tree)), key=lambda leaf: tuple(map(str, leaf[0])))
    return [(path, x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in leaves]


@jax.jit
def multiplied_out(params):
    """The tree with plain float32 arrays."""
    return jax.tree.map(lambda w: dequantize(w, jnp.float32), params, is_leaf=is_quantized)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(config, weights, Hugging Face directory, int8 directory, what was logged) of a small model."""
    raw, tensors = hf.small(**KINDS[request.param])
    folder = tmp_path_factory.mktemp("kind")
    source = hf.write(folder / "hf", raw, tensors, 2)
    to_orbax(source, folder / "int8", weights="int8")
    return raw, tensors, source, folder / "int8"


def test_formula_and_what_it_is_for(kind):
    """The decoder's matrices as rounded by a formula of the test's own; all else as stored."""
    raw, tensors, _, directory = kind
    cfg = Config.from_hf(raw)
    summed = SUMMED | EXPERTS if cfg.text.num_experts else SUMMED
    params, _ = load(directory)
    plain = dict(flatten(from_hf(cfg, tensors)))
    held = {p: w for p, w in plain.items() if p[0] != "vision" and p[-1] in SUMMED}
    assert {p[-1] for p in held} == SUMMED.keys() - ({"head"} if cfg.tie_word_embeddings else set())
    for path, stored in held.items():
        w, got = stored.astype(np.float64), at_path(params, path)
        scale = np.abs(w).max(summed[path[-1]], keepdims=True) / 127
        assert (got.values.dtype, got.scale.dtype) == (np.int8, np.float32)
        assert got.scale.shape == scale.shape
        np.testing.assert_allclose(got.scale, scale, rtol=1e-6)
        assert np.abs(np.asarray(got.values) - w / scale).max() <= 0.5 + 1e-4
        assert np.abs(np.asarray(got.values)).max() == 127
    for path in plain.keys() - held.keys():
        got = np.asarray(at_path(params, path))
        assert (got.dtype, got.tobytes()) == (plain[path].dtype, plain[path].tobytes()), path


def test_every_form_gives_the_same(kind, tmp_path):
    """Rounded while loading files or an Orbax directory, loaded as int8, saved and loaded."""
    _, _, source, directory = kind
    params, cfg = load(directory)
    to_orbax(source, tmp_path / "bf16")
    for form in (source, tmp_path / "bf16"):
        assert bits(load(form, weights="int8")[0]) == bits(params)
    save_params(tmp_path / "saved", params, cfg)
    assert bits(load(tmp_path / "saved", weights="int8")[0]) == bits(params)


def test_logits_and_dtype(kind):
    """Of every entrance those of the weights multiplied out, and near those of the files.

    forward stacks its layers, prefill and decode_step take them in lists.
    """
    raw, tensors, _, directory = kind
    params, cfg = load(directory, dtype="float32")
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    assert {w.values.dtype if is_quantized(w) else w.dtype for w in leaves} == {
        np.dtype("int8"),
        np.dtype("float32"),
    }
    plain = multiplied_out(params)
    batch = q3.make_batch(cfg, **tiny.inputs(raw, "text"))
    want = ours.forward(plain, cfg, batch)
    assert ours.worst(ours.forward(params, cfg, batch), want) < BOUND
    found = []
    for p in (plain, params):
        cache, logits = ours.prefill(p, cfg, batch, 64)
        found += [logits, ours.decode_step(p, cfg, cache, jnp.asarray([7], jnp.int32))[1]]
    assert ours.worst(found[2], found[0]) < BOUND
    assert ours.worst(found[3], found[1]) < BOUND
    stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), from_hf(cfg, tensors))
    rms = np.sqrt(np.mean((want - ours.forward(stored, cfg, batch)) ** 2) / np.mean(want**2))
    assert 1e-4 < rms < 0.1
    half, _ = load(directory, dtype="bfloat16")
    states = jax.eval_shape(functools.partial(q3.hidden_states, cfg=cfg), half, batch=batch)
    assert states.dtype == jnp.bfloat16


def test_pictures_chunked_prefill_and_generate(tmp_path):
    """A picture's rows, the scan over a prompt's pieces and the loop over new tokens, in 8 bits."""
    params, cfg = load(_int8(tmp_path), dtype="float32")
    batch = q3.make_batch(cfg, **tiny.inputs(hf.small()[0], "one_picture"))
    whole, pieces = (q3.prefill(params, cfg, batch, 64, chunk=chunk)[1] for chunk in (None, 8))
    assert ours.worst(pieces, whole) < BOUND
    answer = q3.generate(params, cfg, batch, max_new_tokens=5, stop_ids=())
    assert answer.tokens.tolist() == ours.greedy(params, cfg, batch, 5)[0].tolist()


@pytest.mark.parametrize("size", ["2b", "4b", "8b", "32b", "30b-a3b", "235b-a22b"])
def test_memory_of_released_sizes(size):
    """Codes and scales take at most 0.51 of the bf16 bytes."""
    found = quantize.quantized_params(Config.named(size)).values()
    codes = sum(int(np.prod(row.shape)) for row in found)
    scales = 4 * sum(int(np.prod(row.channels)) for row in found)
    assert codes + scales <= 0.51 * 2 * codes


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_strips_are_the_whole(kind, monkeypatch):
    """An array larger than a strip is rounded as in one piece, whichever axis is summed."""
    cfg = Config.from_hf(hf.small(moe=True)[0])
    by_path = {row.path: row for row in param_specs(cfg)}
    rng = np.random.default_rng(0)
    for path in (("embed",), ("layers", 0, "attn", "qkv"), ("layers", 0, "mlp", "gate_up")):
        array = rng.standard_normal(by_path[path].shape).astype(np.float32)
        array[:1] = 0  # channels of zeros
        want = quantize.quantize(by_path[path], array, kind)
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "_STRIP", 100)
            got = quantize.quantize(by_path[path], array, kind)
        assert all(np.array_equal(got[key], want[key]) for key in want)
        assert (got["scale"][:1] == 1).all() and not got["values"][:1].any()


# ---- the measured error ----
def reader(tree, seen=None):
    """How `logit_error` reads a tree; `seen` notes the places in order."""

    def read(path):
        if seen is not None:
            seen.append(path)
        # The optional head alone may not be there.
        return tree.get("head") if path == ("head",) else at_path(tree, path)

    return read


def test_error_is_that_of_whole_models(kind):
    """rms, largest and agreeing tokens, as computed from two whole models in the test."""
    raw, tensors, _, directory = kind
    cfg = Config.from_hf(raw)
    stored = from_hf(cfg, tensors)
    params, _ = load(directory)
    seen = []
    error = logit_error(cfg, reader(stored), reader(params, seen))
    tokens = jnp.asarray(np.random.default_rng(0).integers(cfg.text.vocab_size, size=(1, 64)))
    positions = jnp.broadcast_to(jnp.arange(64), (3, 1, 64))
    batch = q3.Batch(tokens, positions, jnp.ones((1, 64), int), None, delta=jnp.zeros(1, int))
    whole = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stored), multiplied_out(params))
    want, got = (np.asarray(ours.forward(p, cfg, batch))[0] for p in whole)
    assert error.rms == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-2)
    assert error.largest == pytest.approx(ours.worst(got, want), rel=1e-2)
    assert (error.agreeing, error.tokens) == ((want.argmax(1) == got.argmax(1)).sum(), 64)
    end = "embed" if cfg.tie_word_embeddings else "head"
    layers = [("layers", i) for i in range(cfg.text.num_hidden_layers)]
    assert seen == [("embed",), *layers, ("norm",), (end,)]  # a layer at a time


def test_error_grows_with_the_difference():
    """None between equals, and much of it for one wrong scale."""
    raw, tensors = hf.small()
    cfg = Config.from_hf(raw)
    tree = from_hf(cfg, tensors)
    none = logit_error(cfg, reader(tree), reader(tree))
    assert (none.rms, none.largest, none.agreeing) == (0, 0, 64)
    attn = {**tree["layers"][1]["attn"], "o": 3 * tree["layers"][1]["attn"]["o"]}
    other = {**tree, "layers": [tree["layers"][0], {**tree["layers"][1], "attn": attn}]}
    much = logit_error(cfg, reader(tree), reader(other))
    assert much.rms > 0.05
    assert re.fullmatch(LINE.removeprefix("int8: "), str(much))


def test_without_a_head_hidden_states_are_compared():
    """A base model has no logits; the line says so."""
    raw, tensors = hf.small()
    head = tensors.pop("lm_head.weight")
    cfg = Config.from_hf(raw)
    tree = from_hf(cfg, tensors | {"lm_head.weight": head})
    del tree["head"]
    changed = {**tree, "norm": tree["norm"] * 1.1}
    line = str(logit_error(cfg, reader(tree), reader(changed)))
    assert re.fullmatch(
        r"final hidden states differ by \S+% rms \(\S+ of the largest at most\)", line
    )


def test_command_line_rounds_and_keeps_the_config(tmp_path, capsys):
    """python -m convert --weights int8 writes 8-bit weights; the benchmark prints their error."""
    raw, tensors = hf.small()
    source = hf.write(tmp_path / "hf", raw, tensors)
    assert main([str(source), str(tmp_path / "int8"), "--weights", "int8"]) == 0
    assert (tmp_path / "int8" / "config.json").read_text() == (source / "config.json").read_text()
    assert eight_bit(dict(flatten(as_dicts(load(tmp_path / "int8")[0]))))
    capsys.readouterr()
    int8_error.main(str(source))
    assert re.fullmatch(LINE.removeprefix("int8: ") + "\n", capsys.readouterr().out)


# ---- what is refused ----
def _fp8(folder):
    raw, tensors = hf.small()
    return hf.write(folder / "hf", fp8.config(raw), fp8.quantised(tensors))


def _fp8_orbax(folder):
    to_orbax(_fp8(folder), folder / "orbax", weights="fp8")
    return folder / "orbax"


def _int8(folder):
    to_orbax(hf.write(folder / "hf", *hf.small()), folder / "orbax", weights="int8")
    return folder / "orbax"


def _infinite(folder):
    raw, tensors = hf.small()
    tensors["lm_head.weight"][3, 5] = np.inf
    return hf.write(folder / "hf", raw, tensors)


REFUSED = {
    "fp8": (
        _fp8,
        "int8",
        "hf: holds fp8 weights, which int8 would round again; take fp8 ",
    ),
    "fp8_orbax": (_fp8_orbax, "int8", "orbax: holds fp8 weights, which int8 would round again"),
    "int8": (_int8, "fp8", "orbax: holds int8 weights, and .* FP8 release; .* leave it out$"),
    "again": (_int8, "int4", "orbax: holds int8 weights, which int4 would round again"),
    "unknown": (_int8, "nf4", "weights: got 'nf4', expected None, fp8, int8 or int4; leave it out"),
    "infinite": (
        _infinite,
        "int8",
        "head: holds NaN or infinite weights, .*without int8$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, tmp_path):
    """What was found and what to do, from files and from an Orbax directory."""
    make, weights, message = REFUSED[name]
    source = make(tmp_path)
    before = hf.listing(tmp_path)
    uses = [functools.partial(load, source)]
    if source.name == "hf":
        uses.append(functools.partial(to_orbax, source, tmp_path / "out"))
    for use in uses:
        with pytest.raises(InputError, match=message) as error:
            use(weights=weights)
        assert "\n" not in str(error.value)
    assert hf.listing(tmp_path) == before


def test_no_way_back_to_hugging_face(tmp_path, capsys):
    """Files have no form for int8, and what was rounded off is gone: one line that says so."""
    source = _int8(tmp_path)
    assert main(["--to-hf", str(source), str(tmp_path / "back")]) == 2
    err = capsys.readouterr().err
    assert re.search(
        "orbax: got int8 weights, which .* take the checkpoint that they were made from$", err
    )
    assert err.count("\n") == 1
    assert main(["--to-hf", str(source), str(tmp_path / "back"), "--weights", "int8"]) == 2
    assert capsys.readouterr().err.startswith("error: --weights: the way back writes what CKPT_DIR")
    assert not (tmp_path / "back").exists()


def test_damaged_directories(tmp_path):
    """Scales of another shape or dtype, codes that are neither int8 nor FP8, and a vector of codes."""
    params, cfg = load(_int8(tmp_path))
    head = params["head"]
    for changed, message in (
        (
            head.replace(scale=head.scale[:, 0]),
            r"shape of head.scale: found \[320\], expected \[320, 1\]",
        ),
        (
            head.replace(scale=head.scale.astype(jnp.bfloat16)),
            "head.scale: found bfloat16, expected float32",
        ),
        (
            head.replace(values=head.values.astype(jnp.int32)),
            "head.values: found int32, expected int8, int4",
        ),
    ):
        with pytest.raises(InputError, match=message):
            save_params(tmp_path / "out", {**params, "head": changed}, cfg)
    with pytest.raises(InputError, match=r"missing norm \[40\]"):
        save_params(tmp_path / "out", {**params, "norm": head}, cfg)
    assert json.loads((tmp_path / "orbax" / "config.json").read_text()) == hf.small()[0]
