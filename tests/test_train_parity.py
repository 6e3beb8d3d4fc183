"""One training step against torch: loss, every gradient, five AdamW updates, the router's loss."""

import jax
import numpy as np
import ours
import ours_train
import pytest
import reference
import tiny
import torch

import qwen3vl_jax as q3
from convert.mapping import to_hf
from qwen3vl_jax import losses, moe
from qwen3vl_jax.training import groups
from qwen3vl_jax.training.recipe import Optimizer


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def case(request):
    ref = reference.build("base", request.param)
    return ref, *ours.build(ref), *rows(ref)


def rows(ref):
    """A picture row, a clip row and a text row, right padded, with labels on half of the words."""
    found = [tiny.inputs(ref.config, name) for name in ("short", "clip", "text")]
    inputs = tiny.pad_batch(found, "right")
    rng = np.random.default_rng(3)
    ids = inputs["input_ids"]
    told = (rng.random(ids.shape) < 0.5) & (inputs["attention_mask"] == 1) & (ids < 290)
    return inputs, np.where(told, ids, -100)


def torch_model(ref):
    model = reference._torch_model(ref, "float32").train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def torch_loss(model, inputs, labels):
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    return model(**tensors, labels=torch.from_numpy(labels)).loss


def released(cfg, tree):
    """A per-layer tree under torch's names and axes."""
    named = to_hf(cfg, jax.tree.map(np.asarray, tree))
    turned = {n: x.swapaxes(1, 2) if ".experts." in n else x for n, x in named.items()}
    return {n: np.asarray(x, np.float64) for n, x in turned.items()}


def torch_tensors(model, what):
    return {n: what(p).detach().double().numpy() for n, p in model.named_parameters()}


def test_loss_and_every_gradient(case):
    ref, params, cfg, inputs, labels = case
    model = torch_model(ref)
    want = torch_loss(model, inputs, labels)
    want.backward()
    packed = ours_train.micro(ours_train.one_by_one(cfg, inputs, labels))
    loss, grads, metrics = ours_train.gradients(params, cfg, packed)
    assert abs(float(loss) - want.item()) < 1e-5 * abs(want.item())
    assert metrics["targets"] == (labels[:, 1:] != -100).sum()
    got, slopes = released(cfg, grads), torch_tensors(model, lambda p: p.grad)
    assert got.keys() == slopes.keys()
    for name, slope in slopes.items():
        # The bias of a key shifts every score of a query alike: its gradient is rounding alone.
        floor = 1e-7 * max(np.abs(s).max() for s in slopes.values())
        bound = max(1e-4 * np.abs(slope).max(), floor)
        assert np.abs(got[name].reshape(slope.shape) - slope).max() < bound, name


def test_five_steps_of_adamw(case):
    ref, params, cfg, inputs, labels = case
    model = torch_model(ref)
    before = torch_tensors(model, lambda p: p)
    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias") and "norm" not in n]
    rest = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    kinds = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch_rule = torch.optim.AdamW(kinds, lr=1e-3, betas=(0.9, 0.98), eps=1e-8)
    rule = Optimizer(learning_rate=1e-3, schedule="constant", b2=0.98, weight_decay=0.1, clip=0.5)
    state, frozen, run = ours_train.trainer(params, cfg, rule)
    packed = ours_train.micro(ours_train.one_by_one(cfg, inputs, labels))
    for _ in range(5):
        torch_rule.zero_grad()
        want = torch_loss(model, inputs, labels)
        want.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch_rule.step()
        state, metrics = run(state, frozen, packed)
        assert abs(float(metrics["loss"]) - want.item()) < 1e-4 * abs(want.item())
        assert abs(float(metrics["grad_norm"]) - norm.item()) < 1e-3 * norm.item()
    after = torch_tensors(model, lambda p: p)
    _, unflatten = groups.flatten(q3.stack_layers(params))
    got = released(cfg, q3.unstack_layers(unflatten(state.weights)))
    moved = np.sqrt(sum(np.sum((after[n] - before[n]) ** 2) for n in after))
    apart = np.sqrt(sum(np.sum((got[n].reshape(after[n].shape) - after[n]) ** 2) for n in after))
    assert apart < 0.01 * moved, (apart, moved)


def test_the_routers_loss_is_that_of_4_57_1():
    ref = reference.build("base", True)
    params, cfg = ours.build(ref)
    inputs, labels = rows(ref)
    model, seen = torch_model(ref), []
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda gate, given, out: seen.append(
                (given[0].reshape(-1, 40) @ gate.weight.T).detach()
            )
        )
    torch_loss(model, inputs, labels)
    mask = torch.from_numpy(inputs["attention_mask"]).reshape(-1).repeat(len(seen)).double()
    probs = torch.softmax(torch.cat([x.double() for x in seen]), -1)
    chosen = torch.nn.functional.one_hot(probs.topk(3).indices, 7).double()  # [L n, A, E]
    share = (chosen * mask[:, None, None]).sum(0) / mask.sum()
    mean = (probs * mask[:, None]).sum(0) / mask.sum()
    want = 7 * (share * mean).sum().item()
    packed = ours_train.micro(ours_train.one_by_one(cfg, inputs, labels))
    _, _, metrics = ours_train.gradients(params, cfg, packed)
    assert abs(float(metrics["balance_loss"]) - want) < 1e-5 * want
    np.testing.assert_allclose(np.mean(metrics["expert_load"]), 1, rtol=1e-6)
    # One expert that takes everything: E times the largest share there is.
    hot = moe.Routed(jax.nn.one_hot(np.zeros(5, int), 7), np.zeros((5, 1), int))
    sums = losses.router_sums(hot, jax.numpy.ones(5, bool))
    stacked = jax.tree.map(lambda x: x[None], sums)
    assert float(losses.balance_loss(stacked, jax.numpy.int32(5))) == 7.0
