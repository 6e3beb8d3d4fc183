"""Eight devices give the numbers of one: gradients and steps of whole rows on every kind of mesh."""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import ours
import ours_train
import pytest
import tiny

from qwen3vl_jax import device_mesh
from qwen3vl_jax.model import moe
from qwen3vl_jax.training import state_sharding
from qwen3vl_jax.training.mesh_preset import preset
from qwen3vl_jax.training.recipe import Optimizer, Pack

ROWS = (
    [("text", 3), ("image", (1, 2, 2)), ("text", 6)],
    [("text", 2), ("clip", (2, 1, 2)), ("text", 4)],
    [("text", 13)],
    [("text", 5), ("image", (1, 1, 3)), ("text", 5)],
)
MESHES = {
    "preset": {},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"fsdp": 2, "expert": 2, "sequence": 2},
    "expert": {"expert": 4, "tensor": 2},
    "few rows": {"data": 2, "sequence": 2, "tensor": 2},
}
GROUPS = 8


class Case:
    """A tiny model, eight rows in eight groups, and what one device makes of them."""

    def __init__(self, sparse: bool):
        config = tiny.config_dict("shallow", sparse)
        if sparse:
            config["text_config"]["num_experts"] = 8
        ref = SimpleNamespace(config=config, weights=tiny.weights(config, 0))
        self.params, self.cfg = ours.build(ref)
        samples = [ours_train.sample(config, ROWS[i % 4], i) for i in range(GROUPS)]
        packed = ours_train.pack(self.cfg, [[s] for s in samples])
        self.plain = ours_train.micro(packed)
        patches = packed.batch.vision.lo.shape[1] // self.cfg.vision.merge_unit
        rows = packed.batch.vision_rows
        own = rows - np.arange(GROUPS)[:, None] * patches
        batch = packed.batch.replace(vision_rows=np.where(rows >= 0, own, -1), groups=GROUPS)
        self.grouped = ours_train.micro(packed.replace(batch=batch))
        self.want = self.steps(self.plain)

    def steps(self, packed, mesh=None) -> SimpleNamespace:
        """Five of AdamW: their losses, what the first made of its gradients, the weights' change."""
        rule = Optimizer(learning_rate=1e-3, weight_decay=0.01, clip=1.0)
        state, _, step = ours_train.trainer(self.params, self.cfg, rule, mesh=mesh)
        if mesh:
            packed = jax.tree.map(
                state_sharding.put, packed, state_sharding.batch_shardings(mesh, packed)
            )
        start, losses, first = jax.tree.map(np.asarray, state.weights), [], {}
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            for _ in range(5):
                state, told = step(state, {}, packed)
                losses.append(float(told["loss"]))
                # After one step the mean of gradients is a tenth of the first, clipped to norm 1.
                first = first or jax.tree.map(np.asarray, moments(state).mu)
        change = {n: np.asarray(x) - start[n] for n, x in state.weights.items()}
        return SimpleNamespace(losses=losses, first=first, change=change)


def chosen(cfg) -> dict[str, int]:
    """The mesh that a recipe gets for eight devices."""
    return vars(preset(cfg, Pack(rows=GROUPS, vision_rows=GROUPS), 8))


def moments(state):
    """Adam's part of the optimizer's state."""
    return next(part for part in state.optimizer if hasattr(part, "mu"))


@functools.cache
def case(sparse: bool) -> Case:
    return Case(sparse)


def close(got, want):
    """Losses, and first gradients to 1e-5 of their largest, the change of the weights to 1 % by norm.

    By norm: the ViT's key bias has no gradient but rounding, which Adam makes as large as any other.
    """
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    for name, slope in want.first.items():
        assert ours.worst(got.first[name], slope) < 1e-5, name
    off = {name: got.change[name] - x for name, x in want.change.items()}
    assert norm(off) < 0.01 * norm(want.change)


def norm(arrays) -> float:
    return sum(float(np.sum(x**2)) for x in arrays.values()) ** 0.5


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_groups_on_one_device_are_the_same_batch(sparse):
    one = case(sparse)
    assert one.want.losses[-1] < one.want.losses[0]
    close(one.steps(one.grouped), one.want)


# A dense model differs in one matrix alone, which the other meshes lay out no other way.
DENSE = ("mixed", "context")


@pytest.mark.parametrize(
    ("sparse", "name"),
    [*((False, name) for name in DENSE), *((True, name) for name in MESHES)],
    ids=[*(f"dense-{name}" for name in DENSE), *(f"moe-{name}" for name in MESHES)],
)
def test_five_steps_of_eight_devices(sparse, name):
    one = case(sparse)
    sizes = MESHES[name] or chosen(one.cfg)
    assert name != "preset" or (sizes["expert"], chosen(case(False).cfg)["expert"]) == (2, 1)
    close(one.steps(one.grouped, device_mesh.make_mesh(sizes)), one.want)


@pytest.mark.parametrize("run", ["scan", "ragged"])
@pytest.mark.parametrize("chosen", ["one", "even"])
def test_tokens_find_their_experts_on_other_devices(run, chosen, monkeypatch):
    """The exchange is exact for both ways through the experts, also where all go to one expert."""
    e, d, m, a = 8, 16, 12, 2
    keys = jax.random.split(jax.random.key(3), 5)
    x = jax.random.normal(keys[0], (4, 8, d))
    gate_up = jax.random.normal(keys[1], (e, d, 2 * m)) * d**-0.5
    down = jax.random.normal(keys[2], (e, m, d)) * m**-0.5
    which = jax.random.randint(keys[3], (4, 8, a), 0, e)
    which = jnp.full((4, 8, 1), 5) if chosen == "one" else which
    share = jax.nn.softmax(jax.random.normal(keys[4], which.shape))
    # "gpu" without a kernel for it: XLA's own grouped product.
    monkeypatch.setattr(moe, "platform", lambda: "cpu" if run == "scan" else "gpu")
    monkeypatch.setattr(moe, "_tokamax_kernel", lambda: None)

    def loss(x, share, gate_up, down):
        y = moe.moe_apply(x, share, which, gate_up, down, "silu")
        return jnp.sum(jnp.sin(y)), y

    def of():
        slopes = jax.jit(
            jax.grad(loss, (0, 1, 2, 3), has_aux=True), compiler_options=ours_train.FAST
        )
        return slopes(x, share, gate_up, down)

    want = of()
    others = [{"expert": 2, "tensor": 4}, {"data": 8}] if chosen == "even" else []
    for sizes in ({"expert": 4, "fsdp": 2}, *others):
        with jax.set_mesh(device_mesh.make_mesh(sizes)):
            got = of()
        for ours_, one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert ours.worst(np.asarray(ours_), np.asarray(one)) < 1e-5
