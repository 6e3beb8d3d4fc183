"""The optimizer by itself: rules, schedules, factors, and updates that reach bf16 weights."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ours
import pytest
from ours_train import FAST

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training import param_groups
from qwen3vl_jax.training.optimizer import (
    apply_update,
    exact,
    make_optimizer,
    make_schedule,
    round_by_chance,
    split_bits,
)
from qwen3vl_jax.training.recipe import Optimizer, Step
from qwen3vl_jax.training.train_step import init_state, updated

SHAPES = {
    "embed": (11, 6),
    "layers.attn.qkv": (2, 2, 3, 4, 6),  # [L K G+2 H D]
    "layers.attn.o": (2, 6, 2, 4),  # [L D N H]
    "layers.mlp.gate_up": (2, 3, 6, 8),  # [L E D 2M]
    "layers.ln1": (2, 6),
    "vision.blocks.attn.qkv_bias": (2, 3, 2, 4),
}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


@pytest.mark.parametrize(
    ("name", "rate", "held"),
    [
        ("adamw", 0.05, "float32"),
        ("adamw", 0.05, "stochastic"),
        ("adafactor", 0.05, "compensated"),
        ("muon", 0.2, "stochastic"),
        ("sgd", 0.3, "compensated"),
    ],
)
def test_every_rule_lowers_the_loss(name, rate, held):
    """Ten steps towards a target, from fp32 weights and from bf16 ones rounded either way."""
    goal = weights(1)

    def loss(w):
        return sum(jnp.sum((w[n].astype(jnp.float32) - goal[n]) ** 2) for n in w) / 2

    settings = Step() if held == "float32" else Step(weights="bfloat16", rounding=held)
    rule = Optimizer(name=name, learning_rate=rate, schedule="constant", clip=0.0, ema=0.9)
    start = {n: x.astype(settings.weights) for n, x in weights().items()}
    optimizer = make_optimizer(rule, 10, dict.fromkeys(SHAPES, 1.0))
    state = init_state(jax.random.key(0), start, optimizer, settings, rule.ema)

    @functools.partial(jax.jit, compiler_options=FAST)
    def train(state):
        grads = {n: g.astype(jnp.float32) for n, g in jax.grad(loss)(state.weights).items()}
        return updated(state, grads, optimizer, rule.ema, jax.random.key(state.step))

    for _ in range(10):
        state = train(state)
    assert loss(state.weights) < 0.75 * loss(start)
    assert loss(state.weights) < loss(state.average) < loss(start)
    for n, x in state.weights.items():
        assert x.dtype == settings.weights and x.shape == SHAPES[n]
        assert np.abs(np.asarray(x - start[n], np.float32)).max() > 0.01, n
    assert (state.compensation is None) == (held != "compensated")


def test_muon_takes_each_matrix_of_a_stack_alone():
    """Every matrix gets what optax's Muon gives it by itself; tables, norms and biases get NAdam's."""
    grads, settings = (
        weights(2),
        Optimizer(name="muon", learning_rate=1.0, schedule="constant", clip=0),
    )
    optimizer = make_optimizer(settings, 10, dict.fromkeys(SHAPES, 1.0))
    got, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
    alone = optax.contrib.muon(1.0, beta=0.9, consistent_rms=0.2)

    def single(matrix):
        own = {"w": matrix}
        return alone.update(own, alone.init(own), own)[0]["w"]

    flat = {
        "layers.attn.qkv": lambda x: x.reshape(-1, 4, 6),
        "layers.attn.o": lambda x: x.reshape(-1, 6, 8),
        "layers.mlp.gate_up": lambda x: x.reshape(-1, 6, 8),
    }
    for name, cut in flat.items():
        want = jax.jit(jax.vmap(single))(cut(grads[name]))
        assert ours.worst(cut(got[name]), want) < 1e-4, name
    adam = optax.nadam(1.0, settings.b1, settings.b2, settings.eps)
    rest = {name: grads[name] for name in SHAPES.keys() - flat}
    want, _ = adam.update(rest, adam.init(rest))
    assert all(ours.worst(got[name], x) < 1e-5 for name, x in want.items())


def test_schedules():
    """Warm-up from 0 to the peak, then down to `final` of it at the last step, or flat."""
    rule = Optimizer(learning_rate=2.0, warmup=10, final=0.1)
    for kind, middle in (("cosine", 1.1), ("linear", 1.1), ("constant", 2.0)):
        rate = make_schedule(dataclasses.replace(rule, schedule=kind), 110)
        found = [float(rate(i)) for i in (0, 5, 10, 60, 110)]
        last = 2.0 if kind == "constant" else 0.2
        np.testing.assert_allclose(found, [0, 1, 2, middle, last], rtol=1e-6, err_msg=kind)
    assert float(make_schedule(dataclasses.replace(rule, warmup=0), 100)(0)) == 2.0


def test_decay_factors_and_clipping():
    """Norms and biases do not decay; a factor scales step and decay; clipping is of the whole norm."""
    w = weights()
    factors = dict.fromkeys(SHAPES, 1.0) | {"layers.attn.o": 0.25}
    plain = Optimizer(name="sgd", learning_rate=0.1, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(plain, 10, factors)
    grads = weights(3)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    got, _ = optimizer.update(grads, optimizer.init(w), w)
    for name, grad in grads.items():
        decay = 0 if name.endswith(("ln1", "bias")) else 0.5
        want = -0.1 * factors[name] * (grad / norm + decay * w[name])
        assert ours.worst(got[name], want) < 1e-5, name


def test_an_update_writes_over_the_state():
    """Clipped AdamW with donated state: no second set of gradients or weights."""
    optimizer = make_optimizer(Optimizer(), 10, {"layers.mlp.down": 1.0, "norm": 1.0})
    weights = {"layers.mlp.down": jnp.zeros((8, 64, 64)), "norm": jnp.zeros(64)}
    state = init_state(jax.random.key(0), weights, optimizer, Step(), 0.0)
    run = jax.jit(
        lambda state, grads: updated(state, grads, optimizer, 0.0, jax.random.key(0)),
        donate_argnums=0,
    )
    # As users compile it: the suite's flags leave sums to a library that copies what it sums.
    flag = "xla_cpu_experimental_ynn_fusion_type"
    options = {flag: "LIBRARY_FUSION_TYPE_REDUCE"} if flag in os.environ["XLA_FLAGS"] else {}
    stats = run.lower(state, weights).compile(options).memory_analysis()
    held = sum(x.nbytes for x in weights.values())
    assert stats.alias_size_in_bytes >= 3 * held and stats.temp_size_in_bytes < 0.1 * held


NAMES = """
    embed head layers.attn.qkv layers.ln1 layers.mlp.down layers.mlp.router norm
    vision.blocks.attn.qkv vision.deepstack.0.fc1 vision.merger.norm.scale vision.pos
""".split()


def test_groups_and_patterns():
    """A group's name means the group alone, everything else is a pattern; later rates win."""
    frozen = param_groups.frozen_names(NAMES, ["vision", "router", "*.ln1"], True)
    assert frozen == {"vision.blocks.attn.qkv", "vision.pos", "layers.mlp.router", "layers.ln1"}
    rates = param_groups.learning_rates(
        NAMES, {"merger": 3.0, "vision.merger": 2.0, "experts": 0.5}, True
    )
    mergers = {"vision.deepstack.0.fc1": 3.0, "vision.merger.norm.scale": 2.0}
    assert {n: f for n, f in rates.items() if f != 1} == {**mergers, "layers.mlp.down": 0.5}
    assert [param_groups.group_of(n, False) for n in NAMES[4:6]] == ["text", "text"]
    kept = [n for n in NAMES if not param_groups.decays(n)]
    assert kept == ["layers.ln1", "norm", "vision.merger.norm.scale"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("visoin", "did you mean vision"), ("layers.9", "layers"), ("head", "tied")],
)
def test_names_that_mean_nothing(wanted, words):
    names = [n for n in NAMES if n != "head"]
    with pytest.raises(InputError, match=f"train.freeze: '{wanted}'.*{words}"):
        param_groups.frozen_names(names, [wanted], True)
    with pytest.raises(InputError, match="nothing is left"):
        param_groups.frozen_names(names, [*param_groups.GROUPS.keys() - {"head"}], True)


def test_rounding_by_chance_is_unbiased():
    """Between two neighbours in proportion: the mean of many is the value, to 4 deviations."""
    gap, n = 2.0**-7, 40_000
    for value, part in ((1 + 0.3 * gap, 0.3), (-1 - 0.9 * gap, 0.9), (1.0, 0.0)):
        out = round_by_chance(jnp.full(n, value, jnp.float32), jax.random.key(1))
        found = np.asarray(out, np.float64)
        assert set(np.unique(np.abs(found))) <= {1.0, 1 + gap}
        up = (np.abs(found) > 1).mean()
        assert abs(up - part) <= 4 * (part * (1 - part) / n) ** 0.5
    ends = jnp.asarray([np.inf, -np.inf, np.nan, 0.0, 3.3e38], jnp.float32)
    out = np.asarray(round_by_chance(ends, jax.random.key(2)), np.float32)
    assert list(np.isinf(out)) == [True, True, False, False, False] and np.isnan(out[2])
    assert out[3] == 0


def test_two_halves_hold_an_fp32_number():
    """bf16 and int16 give back every bit, and the bf16 is a nearest one."""
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    x = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, 1 + 2**-8, np.inf, 3.4e38])])
    x = x[~np.isnan(x)]
    weight, rest = split_bits(jnp.asarray(x))
    assert (weight.dtype, rest.dtype) == (jnp.bfloat16, jnp.int16)
    assert np.asarray(exact(weight, rest)).tobytes() == x.tobytes()
    normal = (np.abs(x) < 1e38) & (np.abs(x) > 1e-30)
    apart = np.abs(np.asarray(weight, np.float64)[normal] - x[normal])
    assert (apart <= np.abs(x[normal]) * 2.0**-8).all()


def test_many_tiny_updates_of_bf16_weights():
    """1,000 updates far below bf16's spacing: rounded to nearest they vanish, here they add up.

    Compensated ones add up exactly as fp32 weights do, to the bit.
    """
    small, count = jnp.full(64, 1.3e-5), 1000

    @jax.jit
    def total(start, rest, key):
        def body(carry, i):
            weight, rest = carry
            return apply_update("w", weight, small, jax.random.fold_in(key, i), rest), None

        return exact(*jax.lax.scan(body, (start, rest), jnp.arange(count))[0])

    start, key = jnp.ones(64, jnp.bfloat16), jax.random.key(0)
    assert start[0] + jnp.bfloat16(1.3e-5) == start[0]
    want = np.asarray(total(jnp.ones(64), None, key))
    assert np.asarray(total(start, jnp.zeros(64, jnp.int16), key)).tobytes() == want.tobytes()
    moved = np.asarray(total(start, None, key)) - 1
    assert abs(moved.mean() - 0.013) < 4 * moved.std() / 8 and moved.std() > 0
