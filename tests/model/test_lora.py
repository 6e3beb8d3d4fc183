"""Adapters beside their weights: nothing changes at first, then exactly what the merged weight would do."""

import dataclasses

import adapters
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ours
import ours_train
import pytest
import released
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.checkpoint import name_map, quantize
from qwen3vl_jax.checkpoint.adapters import merge
from qwen3vl_jax.checkpoint.device_load import as_structs
from qwen3vl_jax.checkpoint.param_paths import flatten
from qwen3vl_jax.checkpoint.peft_io import save_adapter
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.layers import linear, linear_fp32
from qwen3vl_jax.model.lora import Adapted, Pair, dropout_mask, expert_leaves
from qwen3vl_jax.model.moe import experts_ragged, experts_scan
from qwen3vl_jax.model.quantized import Quantized, dequantize
from qwen3vl_jax.training import recipe
from qwen3vl_jax.training.lora_targets import first_values, split_lora, targeted

SMALL = {
    "text": {"num_hidden_layers": 2},
    "vision": {"depth": 2, "deepstack_visual_indexes": [0, 1]},
}


@pytest.fixture(scope="module")
def small():
    """(config.json, params, cfg) of two layers a tower; layers are lists."""
    raw = tiny.config_dict("base")
    raw["text_config"] |= SMALL["text"]
    raw["vision_config"] |= SMALL["vision"]
    cfg = q3.Config.from_hf(raw)
    params = jax.tree.map(jnp.asarray, released.from_hf(cfg, tiny.weights(raw, 0)))
    return raw, params, cfg


def make_recipe(lora=None, **rest):
    lora = {"rank": 4, "alpha": 6.0, "targets": ("text",), "base": "float32"} | (lora or {})
    rest = {"step": ours_train.FP32} | rest
    return recipe.Recipe(ckpt="x", steps=10, lora=recipe.Lora(**lora), **rest)


def pair(inner, outer, seed=0, experts=(), **rest):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((*experts, 3, inner)), rng.standard_normal((*experts, outer, 3))
    return Pair(*(jnp.asarray(x, jnp.float32) for x in (a, b)), jnp.float32(0.7), **rest)


SPANS = (("q", 0, 2), ("k", 2, 3), ("v", 3, 4))
LINEARS = {  # base, pairs, axis, spans, in_dims
    "one part": ((5, 8), {"o": pair(8, 5)}, None, (("o", 0, 0),), 1),
    "over heads": ((5, 2, 4), {"o": pair(8, 5)}, None, (("o", 0, 0),), 2),
    "three parts": (
        (3, 4, 2, 8),
        {"q": pair(8, 12), "k": pair(8, 6, 1), "v": pair(8, 6, 2)},
        1,
        SPANS,
        1,
    ),
    "two of three": ((3, 4, 2, 8), {"q": pair(8, 12), "v": pair(8, 6, 2)}, 1, SPANS, 1),
}
KINDS = {"float32": None, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def held(shape, kind, seed=3):
    rng = np.random.default_rng(seed)
    if kind is None:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)
    values = jnp.asarray((rng.integers(-127, 128, shape) / 8).astype(kind))
    scale = rng.uniform(0.02, 0.1, (shape[0],) + (1,) * (len(shape) - 1))
    return Quantized(values, jnp.asarray(scale, jnp.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LINEARS)
def test_linear(name, kind):
    """On activations as in the merged weight, value and gradient, over weights of every kind."""
    shape, pairs, axis, spans, in_dims = LINEARS[name]
    w = Adapted(held(shape, KINDS[kind]), pairs, axis, spans)
    x = jax.random.normal(jax.random.key(0), (6, *shape[len(shape) - in_dims :]))
    whole = merge({"norm": jnp.ones(1), "w": w})["w"]
    assert whole.shape == w.shape
    assert ours.worst(whole, dequantize(w.base, jnp.float32)) > 0.1
    assert ours.worst(linear_fp32(x, w, in_dims), linear_fp32(x, whole, in_dims)) < 1e-5
    made = jax.make_jaxpr(lambda x, w: linear_fp32(x, w, in_dims))(x, w).jaxpr.eqns
    large = {str(eqn.primitive) for eqn in made if eqn.outvars[0].aval.size == np.prod(shape)}
    assert large <= {"reshape", "convert_element_type"}  # nothing is added to the weight
    half = linear(x.astype(jnp.bfloat16), w, in_dims=in_dims)
    assert half.dtype == jnp.bfloat16
    assert ours.worst(half.astype(jnp.float32), linear_fp32(x, whole, in_dims)) < 2**-6

    def loss(x, pairs, merged):
        one = w.replace(pairs=pairs)
        y = merge({"norm": jnp.ones(1), "w": one})["w"] if merged else one
        return jnp.sum(jnp.sin(linear_fp32(x, y, in_dims)))

    want, got = (jax.grad(loss, (0, 1))(x, pairs, merged) for merged in (True, False))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.worst(a, b) < 1e-4


def test_experts():
    """Both ways through int8 experts, with dropout too: value and gradient."""
    n, d, m, e = 9, 12, 10, 5
    gate_up = Adapted(
        held((e, d, 2 * m), np.int8), {"x": pair(d, 2 * m, 1, (e,))}, None, (("x", 0, 0),)
    )
    down = Adapted(held((e, m, d), np.int8, 4), {"x": pair(m, d, 2, (e,))}, None, (("x", 0, 0),))
    merged = [merge({"norm": jnp.ones(1), "w": w})["w"] for w in (gate_up, down)]
    x = jax.random.normal(jax.random.key(0), (n, d)) / 10
    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(e), (n, 1)), axis=1)[:, :3]
    share = jnp.full((n, 3), 1 / 3)

    def ran(run, *weights):
        def loss(pairs, x):
            put = [w.replace(pairs=p) if p else w for w, p in zip(weights, pairs, strict=True)]
            y = run(x, share, jnp.asarray(chosen), *map(expert_leaves, put), "silu")
            return jnp.sum(jnp.sin(y)), y

        pairs = [w.pairs if isinstance(w, Adapted) else None for w in weights]
        (_, y), slopes = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(pairs, x)
        return y, slopes

    want, (_, slope) = ran(experts_scan, *merged)
    got, slopes = ran(experts_scan, gate_up, down)
    ragged, others = ran(experts_ragged, gate_up, down)
    assert ours.worst(got, want) < 1e-5
    assert ours.worst(ragged, want) < 1e-5
    assert ours.worst(slopes[1], slope) < 1e-4
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(others), strict=True):
        assert ours.worst(a, b) < 1e-4
    dropped = [
        w.replace(pairs={"x": w.pairs["x"].replace(key=jax.random.key(i), rate=0.5)})
        for i, w in enumerate((gate_up, down))
    ]
    args = (x, share, jnp.asarray(chosen), *map(expert_leaves, dropped), "silu")
    masks = [dropout_mask(w.pairs["x"], (len(x), w.shape[1]), x.dtype) for w in dropped]
    one, other = (run(*args, masks=masks) for run in (experts_scan, experts_ragged))
    assert ours.worst(one, other) < 1e-5 < ours.worst(one, want)


def test_dropout_has_a_key_of_its_own_in_each_module_and_layer(small):
    _, params, cfg = small
    lora = {"rank": 2, "targets": ("q_proj", "vision.blocks.mlp"), "dropout": 0.4}
    cut = split_lora(make_recipe(lora), cfg, q3.stack_layers(params))
    joined = jax.jit(cut.merge)(cut.weights, cut.frozen, jax.random.key(5))
    assert isinstance(joined, dict)
    pairs = [
        p
        for w in jax.tree.leaves(joined, is_leaf=lambda w: isinstance(w, Adapted))
        if isinstance(w, Adapted)
        for p in w.pairs.values()
    ]
    keys = np.concatenate([np.asarray(jax.random.key_data(p.key)).reshape(-1, 2) for p in pairs])
    assert len(np.unique(keys, axis=0)) == len(keys) == 2 * len(pairs)
    still = cut.merge(cut.weights, cut.frozen)
    assert len(jax.tree.leaves(still)) == len(jax.tree.leaves(joined)) - len(pairs)
    one = pair(8, 5, key=jax.random.key(1), rate=0.25)
    w, x = Adapted(jnp.zeros((5, 8)), {"o": one}, None, (("o", 0, 0),)), jnp.ones((1, 8))
    keys = jax.random.split(jax.random.key(0), 4000)
    ran = jax.jit(jax.vmap(lambda k: linear(x, w.replace(pairs={"o": one.replace(key=k)}))))(keys)
    full = linear(x, w.replace(pairs={"o": one.replace(key=None)}))
    assert ours.worst(ran.mean(0), full) < 0.05
    assert len(np.unique(np.asarray(ran)[:, 0, 0])) > 50
    assert first_values(make_recipe(lora), cfg)[0].dropout == 0.4


def rounded(params, cfg, kind):
    """The parameters with codes and scales where int8 or int4 is for."""
    rows = quantize.quantized_params(cfg)
    leaves = {}
    for path, x in flatten(params):
        found = quantize.quantize(rows[path], np.asarray(x), kind) if path in rows else None
        leaves |= {(*path, k): jnp.asarray(v) for k, v in found.items()} if found else {path: x}
    return as_structs(name_map.tree_of(cfg, leaves))


def slopes(trainable, cfg, packed, settings):
    return jax.jit(
        lambda w, f, p: ours_train.gradients(
            w, lambda w, key: trainable.merge(w, f, key), cfg, p, settings, jax.random.key(0)
        )[0]
    )(trainable.weights, trainable.frozen, packed)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_qlora(small, kind):
    """Gradients over codes are those over what they stand for; adapters alone are trained; remat too."""
    raw, params, cfg = small
    codes = rounded(params, cfg, kind)
    plain = merge(codes)
    weights, adapter = adapters.random(cfg, ("text",))
    inputs = tiny.inputs(raw, "text")
    packed = ours_train.micro(ours_train.one_by_one(cfg, inputs, inputs["input_ids"]))
    found = []
    for base, held_in, remat in ((codes, kind, "full"), (plain, "float32", "none")):
        settings = dataclasses.replace(ours_train.FP32, remat=remat)
        lora = {"targets": ("text",), "base": held_in}
        trainable = split_lora(make_recipe(lora, step=settings), cfg, q3.stack_layers(base))
        trainable = trainable._replace(weights={n: jnp.asarray(x) for n, x in weights.items()})
        assert trainable.weights.keys() == {f"{n}.{s}" for n in adapter.ranks for s in "ab"}
        found.append(slopes(trainable, cfg, packed, settings))
        held = trainable.frozen["layers.attn.o" + (".values" if held_in == kind else "")]
        assert held.dtype == held_in
    for name, want in found[1].items():
        assert np.abs(want).max() > 0, name
        assert ours.worst(found[0][name], want) < 1e-4, name


def test_targets(small):
    _, _, cfg = small
    sparse = q3.Config.from_hf(tiny.config_dict("base", True))
    assert targeted(["layers.attn.*"], cfg) == targeted(
        ["self_attn.q_proj", "k_proj", "v_proj", "o_proj"], cfg
    )
    assert set(targeted(["text"], sparse)) == set(targeted(["layers.attn.*"], sparse))
    assert set(targeted(["experts"], sparse)) == {
        "layers.mlp.gate_up.gate_up_proj",
        "layers.mlp.down.down_proj",
    }
    assert targeted(["mergers"], cfg) == targeted(["merger"], cfg)
    assert all(n.startswith(("vision.merger", "vision.deep")) for n in targeted(["mergers"], cfg))
    assert not set(targeted(["vision"], cfg)) & set(targeted(["mergers"], cfg))
    one = targeted(["model.language_model.layers.1.self_attn.q_proj", "layers.attn.o"], cfg)
    assert one == {"layers.attn.qkv.q_proj": (False, True), "layers.attn.o.o_proj": (True, True)}
    for wrong, told in (
        (["q_porj"], "q_proj"),
        (["embed"], "'embed'"),
        (["experts"], "'experts'"),
        ([], "empty"),
        (["vision", "txt"], "text"),
    ):
        with pytest.raises(InputError, match=r"lora\.targets") as error:
            targeted(wrong, cfg)
        assert told in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_is_trained_on(small, tmp_path):
    """From files: its matrices, ranks and alphas; what the recipe adds is new; what differs is told."""
    _, params, cfg = small
    weights, adapter = adapters.random(cfg, ("q_proj", "o_proj"))
    ranks = {**adapter.ranks, "layers.attn.qkv.q_proj": (0, 4)}
    adapter = dataclasses.replace(adapter, ranks=ranks)
    save_adapter(tmp_path / "a", cfg, weights, adapter)
    lora = {"targets": ("text",), "adapter": str(tmp_path / "a"), "alpha": 0.0}
    found, matrices = first_values(make_recipe(lora), cfg)
    assert found.ranks["layers.attn.qkv.q_proj"] == (0, 4)
    assert found.alphas["layers.mlp.down.down_proj"] == (6.0, 6.0)
    assert np.array_equal(matrices["layers.attn.o.o_proj.b"], weights["layers.attn.o.o_proj.b"])
    assert not matrices["layers.attn.qkv.q_proj.a"][0].any()
    assert not matrices["layers.mlp.down.down_proj.b"].any()
    stacked = q3.stack_layers(params)
    trainable = split_lora(make_recipe(lora), cfg, stacked)
    assert isinstance(
        trainable.merge(trainable.weights, trainable.frozen)["layers"]["attn"]["o"], Adapted
    )
    for change, told in (
        ({"targets": ("vision",)}, "layers.attn.qkv.q_proj"),
        ({"rank": 8}, "is 4"),
        ({"alpha": 8.0}, "is 6"),
        ({"adapter": str(tmp_path)}, "adapter_config.json"),
    ):
        with pytest.raises(InputError) as error:
            first_values(make_recipe(lora | change), cfg)
        assert told in str(error.value)
    freeze = recipe.Groups(freeze=("layers.mlp.*", "text"))
    for wrong, told in (
        (make_recipe(lora | {"base": "int8"}), "16 or 32 bits"),
        (make_recipe(lora, train=freeze), "train.freeze: 'layers.mlp.*'"),
    ):
        with pytest.raises(InputError) as error:
            split_lora(wrong, cfg, stacked)
        assert told in str(error.value)
    unstacked = q3.unstack_layers(trainable.merge(trainable.weights, trainable.frozen))
    assert unstacked["layers"][1]["attn"]["o"].pairs["o_proj"].scale == 1.5
