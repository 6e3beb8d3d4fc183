"""The step by itself: what must not change the result (micro batches, packing, remat, bytes) does not,
and what is frozen, rounded, averaged or dropped is what the recipe says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ours
import ours_train
import pytest

import qwen3vl_jax as q3
from qwen3vl_jax.training import param_groups, train_step
from qwen3vl_jax.training.recipe import Optimizer

PICTURE = [("text", 3), ("image", (1, 2, 2)), ("text", 6)]
CLIP = [("text", 2), ("clip", (2, 1, 2)), ("text", 4)]
TEXT = [("text", 13)]
WIDE = [("text", 5), ("image", (1, 1, 3)), ("text", 5)]


class Model:
    """A tiny dense model, four samples with pixels that are bytes, and the plain way through."""

    def __init__(self):
        self.params, self.cfg, config = ours_train.model()
        self.weights, self.join = ours_train.flat(self.params)
        rows = (PICTURE, CLIP, TEXT, WIDE)
        self.bytes = [ours_train.sample(config, row, i) for i, row in enumerate(rows)]
        self.samples = [(as_floats(inputs), labels) for inputs, labels in self.bytes]
        self.batch = ours_train.micro(ours_train.pack(self.cfg, [[s] for s in self.samples]))
        self.plain = self.run(ours_train.FP32, self.batch)
        text = ours_train.pack(self.cfg, [[self.samples[2]] * 2])
        text = text.replace(batch=text.batch.replace(vision=None, vision_rows=None))
        self.text = ours_train.micro(text)

    def run(self, settings, packed, key=0):
        of = ours_train.slopes(self.params, self.cfg, settings)
        return of(self.weights, packed, jax.random.key(key))


def as_floats(inputs):
    """Bytes as a processor normalises them: rescaled by 1/255, then mean and deviation 0.5."""
    half = np.float32(0.5)
    return {
        k: (x / np.float32(255) - half) / half if x.dtype == np.uint8 else x
        for k, x in inputs.items()
    }


@pytest.fixture(scope="module")
def tiny_model():
    return Model()


def same(got, want, bound=1e-5):
    """Loss, and each tensor's gradient to `bound` of its largest; ViT key biases have none."""
    assert abs(float(got[1]) - float(want[1])) < bound * float(want[1])
    for name, slopes in want[0].items():
        pair = np.asarray(slopes), np.asarray(got[0][name])
        keys = name.endswith("blocks.attn.qkv_bias")
        slope, other = (np.delete(x, 1, 1) for x in pair) if keys else pair
        assert np.isfinite(other).all(), name
        assert np.abs(other - slope).max() <= bound * np.abs(slope).max(), name


def test_four_micro_batches_are_one_batch(tiny_model):
    """The loss is that of all target tokens, however unevenly they fall; with remat at that."""
    m = tiny_model
    assert all(np.any(np.asarray(x)) for x in m.plain[0].values())
    each = [ours_train.pack(m.cfg, [[s]]) for s in m.samples]
    settings = dataclasses.replace(ours_train.FP32, remat="full")
    same(m.run(settings, ours_train.micro(*each)), m.plain)


def test_packed_bytes_are_the_unpacked_floats(tiny_model):
    """Four samples in one row and one ViT row: positions, segments and frames keep them apart.

    Their pixels are uint8 here and are normalised on the device.
    """
    m = tiny_model
    packed = ours_train.micro(ours_train.pack(m.cfg, [m.bytes], length=80, patches=64))
    assert packed.batch.vision.pixels.dtype == jnp.uint8
    same(m.run(ours_train.FP32, packed), m.plain)


DROPPING = dataclasses.replace(ours_train.FP32, attention_dropout=0.3)


@pytest.fixture(scope="module")
def dropped(tiny_model):
    """Text alone, with attention dropout, nothing computed twice."""
    return tiny_model.run(DROPPING, tiny_model.text)


@pytest.mark.parametrize(
    "policy", ["dots", "narrow", "offload"]
)  # a CPU has pinned_host memory: its own
def test_remat_changes_nothing(tiny_model, dropped, policy):
    """With dropout on: the second time a layer is computed it drops the same things."""
    settings = dataclasses.replace(DROPPING, remat=policy)
    same(tiny_model.run(settings, tiny_model.text), dropped)


def test_bf16_computes_over_fp32_weights(tiny_model, dropped):
    """The loss to bf16's accuracy, gradients in fp32 that point the same way."""
    m, exact = tiny_model, dropped
    grads, loss, _ = m.run(dataclasses.replace(DROPPING, dtype="bfloat16"), m.text)
    assert abs(float(loss) - float(exact[1])) < 0.02 * float(loss)
    assert {g.dtype for g in grads.values()} == {jnp.dtype("float32")}
    a, b = (np.concatenate([np.asarray(g).ravel() for g in x.values()]) for x in (grads, exact[0]))
    assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize("micro", [1, 4])
def test_bf16_gradients_are_those_of_fp32_to_their_own_digits(tiny_model, micro):
    """The forward pass is the same, and so is the update but for what 8 bits round away.

    Those of several micro batches are added in fp32; a single one is of text alone here.
    """
    m, moved = tiny_model, []
    each = [ours_train.pack(m.cfg, [[s]]) for s in m.samples]
    batch = m.text if micro == 1 else ours_train.micro(*each)
    rule = Optimizer(name="sgd", learning_rate=1.0, schedule="constant", weight_decay=0.0, clip=0.0)
    for kind in ("float32", "bfloat16"):
        settings = dataclasses.replace(ours_train.FP32, dtype="bfloat16", gradients=kind)
        state, frozen, step = ours_train.trainer(m.params, m.cfg, rule, settings)
        old = {n: np.asarray(x) for n, x in state.weights.items()}
        state, metrics = step(state, frozen, batch)
        assert {x.dtype for x in state.weights.values()} == {jnp.dtype("float32")}
        moved.append((metrics, {n: np.asarray(x) - old[n] for n, x in state.weights.items()}))
    (exact, want), (found, got) = moved
    assert float(found["loss"]) == float(exact["loss"])
    assert float(found["grad_norm"]) != float(exact["grad_norm"])
    for name in want.keys() - {"vision.blocks.attn.qkv_bias"}:
        np.testing.assert_allclose(got[name], want[name], atol=0.02 * np.abs(want[name]).max())


@pytest.fixture(scope="module")
def run(tiny_model):
    """bf16 weights, stochastic rounding, two micro batches, the ViT frozen, mergers at their rate."""
    settings = dataclasses.replace(
        ours_train.FP32, dtype="bfloat16", weights="bfloat16", remat="full", z_loss=1e-3
    )
    rule = Optimizer(learning_rate=3e-3, schedule="constant", weight_decay=0.0, ema=0.5)
    m = tiny_model
    state, frozen, train = ours_train.trainer(
        m.params,
        m.cfg,
        rule,
        settings,
        freeze=("vision", "layers.*.q_norm"),
        rates={"merger": 0.5, "vision.deepstack.*.fc1": 0.0},
    )
    two = [ours_train.pack(m.cfg, [[s] for s in m.samples[i : i + 2]]) for i in (0, 2)]
    return state, frozen, train, ours_train.micro(*two)


def differ(a, b):
    """Whether any bit of two arrays differs."""
    return np.asarray(a).tobytes() != np.asarray(b).tobytes()


def test_steps_lower_the_loss_and_move_what_is_trained(run):
    """Each trained tensor moves but those of factor 0; the average and the dtypes are as told."""
    state, frozen, train, packed = run
    start, losses = state, []
    for number in range(6):
        state, metrics = train(state, frozen, packed)
        losses.append(float(metrics["loss"]))
        if number == 0:
            for name, mean in state.average.items():
                pair = (np.asarray(x.weights[name], np.float32) for x in (start, state))
                np.testing.assert_allclose(mean, sum(pair) / 2, rtol=1e-6, atol=1e-9)
    assert losses[-1] < 0.9 * losses[0] and int(state.step) == 6
    for name, weight in state.weights.items():
        moved = differ(weight, start.weights[name])
        still = name.startswith("vision.deepstack.") and name.endswith(".fc1")
        assert weight.dtype == jnp.bfloat16 and moved != still, name


def test_frozen_parameters_are_in_no_state(run, tiny_model):
    """Neither weights nor moments nor average hold them; the others are held once each, in fp32."""
    state, frozen, _, _ = run
    names = set(tiny_model.weights)
    assert set(frozen) == {
        n for n in names if param_groups.group_of(n, False) == "vision" or n.endswith("q_norm")
    }
    assert set(state.weights) == names - set(frozen)
    trained = sum(x.size for x in state.weights.values())
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert sum(x.size for x in moments) == 2 * trained
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}


def test_text_alone_neither_hangs_nor_trains_mergers(run, tiny_model):
    """A batch without pictures has the same shapes; what saw nothing keeps every bit."""
    state, frozen, train, _ = run
    pair = ours_train.pack(tiny_model.cfg, [[tiny_model.samples[2]]] * 2)
    new, metrics = train(state, frozen, ours_train.micro(pair, pair))
    assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
    for name, weight in new.weights.items():
        seen = not name.startswith("vision.")
        assert differ(weight, state.weights[name]) == seen, name


def test_each_step_has_keys_of_its_own(run):
    """The same state gives the same bits, another run's key others."""
    state, frozen, train, packed = run
    first, again = train(state, frozen, packed)[0], train(state, frozen, packed)[0]
    other = state.replace(key=jax.random.key_data(jax.random.key(7)))
    other = train(other, frozen, packed)[0]
    assert not any(map(differ, jax.tree.leaves(first), jax.tree.leaves(again)))
    assert any(differ(other.weights[n], w) for n, w in first.weights.items())


def test_the_balance_loss_of_micro_batches():
    """It is of each by itself, weighted by its tokens; the rest of the loss by target weights."""
    params, cfg, config = ours_train.model(moe=True)
    settings = dataclasses.replace(ours_train.FP32, balance_loss=1.0)
    stacked, packs = q3.stack_layers(params), []
    for length in (13, 5):
        inputs, _ = ours_train.sample(config, [("text", length)])
        pack = ours_train.pack(cfg, [[(inputs, inputs["input_ids"])]])
        packs.append(pack.replace(batch=pack.batch.replace(vision=None, vision_rows=None)))
    run = jax.jit(
        lambda pack: train_step.batch_sums(stacked, cfg, pack, settings),
        compiler_options=ours_train.FAST,
    )
    sums, totals = [run(pack) for pack in packs], [train_step.step_totals(pack) for pack in packs]
    whole = train_step.step_totals(ours_train.micro(*packs))
    got = train_step.total_loss(jax.tree.map(jnp.add, *sums), whole, settings)
    alone = [train_step.step_metrics(s, t) for s, t in zip(sums, totals)]
    share = np.array([float(t.weight / whole.weight) for t in totals])
    want = share @ [float(m["loss"]) for m in alone]
    want += (np.array([13, 5]) / 18) @ [float(m["balance_loss"]) for m in alone]
    assert abs(float(got) - want) < 1e-5 * want


def test_experts_load_and_balance_leave_padding_out():
    """One expert that takes every token: E times the largest share there is; padding is not seen."""
    from qwen3vl_jax.model import moe
    from qwen3vl_jax.training import losses

    chosen = np.array([[0], [0], [0], [3], [4]])
    hot = moe.RouterOutput(jax.nn.one_hot(chosen[:, 0], 7), jnp.asarray(chosen))
    sums = losses.router_sums(hot, jnp.arange(5) < 3)
    stacked = jax.tree.map(lambda x: x[None], sums)
    assert float(losses.balance_loss(stacked, jnp.int32(3))) == 7.0
    assert ours.worst(sums.probs, [3, 0, 0, 0, 0, 0, 0]) == 0
