"""One training step against torch: loss, every gradient, five AdamW updates, the router's loss."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import ours
import ours_train
import pytest
import reference
import tiny
import torch
from released import to_hf

import qwen3vl_jax as q3
from qwen3vl_jax.training import param_groups, train_step
from qwen3vl_jax.training.optimizer import make_optimizer
from qwen3vl_jax.training.recipe import Optimizer


@dataclasses.dataclass
class Case:
    """One model on both sides, its batch, and our jitted loss and gradients."""

    params: Any
    cfg: q3.Config
    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    model: Any  # torch, trained in place by one test: its weights are loaded again by each

    def __post_init__(self):
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.packed = ours_train.micro(ours_train.one_by_one(self.cfg, self.inputs, self.labels))
        self.weights, _ = ours_train.flat(self.params)
        run = ours_train.slopes(self.params, self.cfg)
        self.run = lambda weights: run(weights, self.packed, jax.random.key(0))

    def torch_model(self):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.start[name])
                parameter.grad = None
        return self.model

    def released(self, weights):
        """Flat stacked arrays under torch's names and axes."""
        _, unflatten = param_groups.flatten(q3.stack_layers(self.params))
        tree = q3.unstack_layers(unflatten(weights))
        named = to_hf(self.cfg, jax.tree.map(np.asarray, tree))
        turned = {n: x.swapaxes(1, 2) if ".experts." in n else x for n, x in named.items()}
        shapes = {n: x.shape for n, x in self.start.items()}
        assert turned.keys() == shapes.keys()
        return {n: np.asarray(x, np.float64).reshape(shapes[n]) for n, x in turned.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def case(request):
    ref = reference.build("base", request.param)
    return Case(*ours.build(ref), *rows(ref), trainable(ref))


def rows(ref):
    """A picture row, a clip row and a text row, right padded, with labels on half of the words."""
    found = [tiny.inputs(ref.config, name) for name in ("short", "clip", "text")]
    inputs = tiny.pad_batch(found, "right")
    rng = np.random.default_rng(3)
    ids = inputs["input_ids"]
    told = (rng.random(ids.shape) < 0.5) & (inputs["attention_mask"] == 1) & (ids < 290)
    return inputs, np.where(told, ids, -100)


def trainable(ref):
    model = reference._torch_model(ref, "float32").train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def torch_loss(model, inputs, labels):
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    return model(**tensors, labels=torch.from_numpy(labels)).loss


def torch_tensors(model, what):
    return {n: what(p).detach().double().numpy() for n, p in model.named_parameters()}


def test_loss_and_every_gradient(case):
    """Loss to 1e-5; each tensor's gradients to 1e-4 of its largest."""
    model = case.torch_model()
    want = torch_loss(model, case.inputs, case.labels)
    want.backward()
    grads, loss, metrics = case.run(case.weights)
    assert abs(float(loss) - want.item()) < 1e-5 * abs(want.item())
    assert metrics["targets"] == (case.labels[:, 1:] != -100).sum()
    got, slopes = case.released(grads), torch_tensors(model, lambda p: p.grad)
    exact = {name: key_bias(name, slope) for name, slope in slopes.items()}
    largest = max(np.abs(s).max() for s in slopes.values())
    for name, slope in slopes.items():
        apart = np.abs(got[name] - slope)
        # The bias of a ViT key shifts every score of a query alike: its gradient is zero, and what
        # either side computes is rounding.
        assert (apart[exact[name]] < 1e-6 * largest).all(), name
        told = np.abs(slope[~exact[name]]).max()
        assert told > 0 and apart[~exact[name]].max() < 1e-4 * told, name


def key_bias(name, slope):
    """Where a tensor is the bias of a ViT key."""
    mask = np.zeros(slope.shape, bool)
    if name.endswith("attn.qkv.bias"):
        third = len(slope) // 3
        mask[third : 2 * third] = True
    return mask


def test_five_steps_of_adamw(case):
    """Clipping, decay of matrices alone: parameters move as torch's to 1 % of the way they went."""
    model = case.torch_model()
    before = torch_tensors(model, lambda p: p)
    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias") and "norm" not in n]
    rest = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    kinds = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch_rule = torch.optim.AdamW(kinds, lr=1e-3, betas=(0.9, 0.98), eps=1e-8)
    settings = Optimizer(learning_rate=1e-3, schedule="constant", b2=0.98, weight_decay=0.1)
    rule = make_optimizer(
        dataclasses.replace(settings, clip=0.5), 5, dict.fromkeys(case.weights, 1.0)
    )
    state = train_step.init_state(jax.random.key(0), case.weights, rule, ours_train.FP32, 0.0)
    update = jax.jit(
        lambda state, grads: train_step.updated(state, grads, rule, 0.0, jax.random.key(0))
    )
    for _ in range(5):
        torch_rule.zero_grad()
        want = torch_loss(model, case.inputs, case.labels)
        want.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch_rule.step()
        grads, loss, _ = case.run(state.weights)
        state = update(state, grads)
        assert abs(float(loss) - want.item()) < 1e-4 * abs(want.item())
        assert abs(float(optax.tree.norm(grads)) - norm.item()) < 1e-3 * norm.item()
    after, got = torch_tensors(model, lambda p: p), case.released(state.weights)
    moved = np.sqrt(sum(np.sum((after[n] - before[n]) ** 2) for n in after))
    apart = np.sqrt(sum(np.sum((got[n] - after[n]) ** 2) for n in after))
    assert apart < 0.01 * moved, (apart, moved)


def test_the_routers_loss_is_that_of_4_57_1(case):
    """One softmax over all layers' tokens, padding left out; every expert's load is seen."""
    if not case.cfg.text.num_experts:
        assert "balance_loss" not in case.run(case.weights)[2]
        return
    model, seen, hooks = case.torch_model(), [], []
    for layer in model.model.language_model.layers:
        hook = layer.mlp.gate.register_forward_hook(
            lambda gate, given, out: seen.append(
                (given[0].reshape(-1, 40) @ gate.weight.T).detach()
            )
        )
        hooks.append(hook)
    torch_loss(model, case.inputs, case.labels)
    for hook in hooks:
        hook.remove()
    mask = torch.from_numpy(case.inputs["attention_mask"]).reshape(-1).repeat(len(seen)).double()
    probs = torch.softmax(torch.cat([x.double() for x in seen]), -1)
    chosen = torch.nn.functional.one_hot(probs.topk(3).indices, 7).double()  # [L n, A, E]
    share = (chosen * mask[:, None, None]).sum(0) / mask.sum()
    mean = (probs * mask[:, None]).sum(0) / mask.sum()
    want = 7 * (share * mean).sum().item()
    _, loss, metrics = case.run(case.weights)
    assert abs(float(metrics["balance_loss"]) - want) < 1e-5 * want
    assert float(loss) == float(metrics["loss"])  # off by default: it is only shown
    load = share.sum(0).numpy() * 7 / 3
    np.testing.assert_allclose(metrics["expert_load"], load, rtol=1e-5)
