"""Adapters against PEFT and transformers, both ways: what we write and what PEFT writes, and merged."""

import json
import re
import shutil

import adapters
import jax
import numpy as np
import ours
import peft
import pytest
import reference
import released
import tiny
import torch
from safetensors.numpy import load_file, save_file

import qwen3vl_jax as q3
from qwen3vl_jax.checkpoint import name_map
from qwen3vl_jax.checkpoint.adapters import attach, merge, merged
from qwen3vl_jax.checkpoint.lazy_tensor import LazyTensor
from qwen3vl_jax.checkpoint.param_paths import flatten
from qwen3vl_jax.checkpoint.peft_io import MATRICES, SETTINGS, load_adapter, save_adapter
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training import recipe
from qwen3vl_jax.training.lora_targets import split_lora

BOUND = 2e-5
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning"),
]


class Case:
    """A model on both sides, its inputs, and an adapter of every place with its files."""

    def __init__(self, moe, folder):
        self.ref = reference.build("golden", moe)
        params, self.cfg = ours.build(self.ref)
        self.params = q3.stack_layers(params)
        rows = [tiny.inputs(self.ref.config, name) for name in ("short", "text")]
        self.inputs = tiny.pad_batch(rows, "right")
        self.seen = self.inputs["attention_mask"] == 1
        self.batch = q3.make_batch(self.cfg, **self.inputs)
        self.ids = torch.from_numpy(reference.positions(self.ref, self.inputs)[0])
        self.moe, self.folder = moe, folder / "ours"
        self.weights, self.adapter = adapters.random(self.cfg, adapters.EVERYTHING[moe])
        save_adapter(self.folder, self.cfg, self.weights, self.adapter, "Qwen/base")
        self.logits = self.ours(self.weights, self.adapter)

    def ours(self, weights, adapter):
        params = attach(self.params, self.cfg, weights, adapter)
        logits = np.asarray(ours.forward(params, self.cfg, self.batch))
        return logits[:, : self.seen.shape[1]][self.seen]

    def torch(self, model):
        with torch.no_grad():
            tensors = reference._tensors(self.inputs)
            out = model(**tensors, position_ids=self.ids, use_cache=False)
        return out.logits.numpy()[self.seen]

    def with_peft(self, folder):
        return peft.PeftModel.from_pretrained(self.base(), folder)

    def base(self):
        return reference._torch_model(self.ref, "float32")

    def deltas(self, weights, adapter):
        """What an adapter adds to each released tensor it changes."""
        named = self.merged(weights, adapter)
        changes = {name: x - self.ref.weights[name] for name, x in named.items()}
        return {name: x for name, x in changes.items() if x.any()}

    def merged(self, weights, adapter):
        """The released tensors with the adapter added."""
        params = jax.jit(merge)(attach(self.params, self.cfg, weights, adapter))
        params = q3.unstack_layers(jax.tree.map(np.array, params))
        return released.to_hf(self.cfg, params)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("adapters"))


def test_what_we_write_gives_equal_logits_in_transformers(case):
    """Every place a model has: text, vision, mergers, head, or experts and router."""
    model = case.with_peft(case.folder)
    assert ours.worst(case.logits, case.torch(model)) < BOUND
    assert ours.worst(case.logits, case.torch(case.base())) > 0.05
    stored = load_file(case.folder / MATRICES)
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in stored)
    used = {n.replace(".default.", "."): x for n, x in model.state_dict().items() if ".lora_" in n}
    assert stored.keys() == used.keys()
    weights, adapter = load_adapter(case.folder, case.cfg)
    assert adapter == case.adapter and weights.keys() == case.weights.keys()
    assert all(np.array_equal(weights[name], x) for name, x in case.weights.items())


def test_nothing_changes_at_first_and_the_loop_is_the_scan(case):
    """B is zero: logits stay (XLA's older emitters round one more sum). Layers as stacked ones do."""
    lora = recipe.Lora(rank=adapters.RANK, targets=adapters.EVERYTHING[case.moe], base="float32")
    first = split_lora(
        recipe.Recipe(ckpt="x", steps=1, lora=lora, step=recipe.Step(dtype="float32")),
        case.cfg,
        case.params,
    )
    assert all(np.any(x) == name.endswith(".a") for name, x in first.weights.items())
    assert first.weights.keys() == case.weights.keys()
    begun = ours.forward(first.merge(first.weights, first.frozen), case.cfg, case.batch)
    assert ours.worst(begun, ours.forward(case.params, case.cfg, case.batch)) < 2e-6
    if case.moe:
        params = attach(q3.unstack_layers(case.params), case.cfg, case.weights, case.adapter)
        logits = np.asarray(ours.forward(params, case.cfg, case.batch))
        assert ours.worst(logits[:, : case.seen.shape[1]][case.seen], case.logits) < 1e-5


def test_merged_it_gives_equal_logits_in_transformers(case):
    named = case.merged(case.weights, case.adapter)
    leaves = dict(flatten(released.from_hf(case.cfg, case.ref.weights)))
    lazy = {
        path: LazyTensor(x.shape, x.dtype, lambda x=x: x, lambda where, x=x: [x[i] for i in where])
        for path, x in leaves.items()
    }
    added = merged(case.cfg, lazy, case.weights, case.adapter)
    for row in name_map.param_specs(case.cfg):
        whole = added[row.path].load()
        for name, x in row.split(whole):
            np.testing.assert_allclose(named[name], x, rtol=1e-5, atol=1e-6)
        half = (slice(0, max(len(whole) // 2, 1)), *(slice(0, n) for n in whole.shape[1:]))
        (part,) = added[row.path].parts([half])
        np.testing.assert_array_equal(part, whole[half])
    assert named.keys() == case.ref.weights.keys()
    shown = reference.Reference(case.ref.config, named, 0, case.moe)
    model = reference._torch_model(shown, "float32")
    assert ours.worst(case.logits, case.torch(model)) < BOUND


def test_what_peft_writes_gives_equal_logits_here(case, tmp_path):
    """Ranks and alphas by pattern, rsLoRA, targets as a regex or, for experts, as parameters."""
    every = r".*(_proj|\.qkv|attn\.proj|linear_fc[12]|lm_head)"
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=5,
        use_rslora=True,
        lora_dropout=0.0 if case.moe else 0.1,
        target_modules=every.replace("|lm_head", "") if case.moe else every,
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
        if case.moe
        else None,
        rank_pattern={
            r"layers\.[02]\..*q_proj": 2,
            r"layers\.1\..*o_proj": 3,
            "blocks.0.attn.qkv": 1,
        },
        alpha_pattern={"v_proj": 9, r".*merger.*linear_fc1": 7.5},
    )
    model = peft.get_peft_model(case.base(), settings)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) / 8
    model.save_pretrained(tmp_path)
    copies = [n for n in load_file(tmp_path / MATRICES) if ".lora_" not in n]
    assert len(copies) == (0 if case.moe else 1)  # of the head, which is adapted
    weights, adapter = load_adapter(tmp_path, case.cfg)
    assert adapter.ranks["layers.attn.qkv.q_proj"] == (2, 4, 2)
    assert adapter.ranks["layers.attn.o.o_proj"] == (4, 3, 4)
    assert adapter.alphas["layers.attn.qkv.v_proj"] == (9, 9, 9)
    assert adapter.ranks.keys() == case.adapter.ranks.keys()
    want = case.torch(model.eval())
    assert ours.worst(case.ours(weights, adapter), want) < BOUND
    assert ours.worst(case.logits, want) > 0.05
    save_adapter(tmp_path / "again", case.cfg, weights, adapter)
    again, settings = load_adapter(tmp_path / "again", case.cfg)
    assert settings.ranks == adapter.ranks and settings.rslora
    assert all(np.array_equal(again[name], x) for name, x in weights.items())
    assert ours.worst(case.torch(case.with_peft(tmp_path / "again")), want) < BOUND


SOME = {
    False: [("q_proj", "v_proj", "up_proj"), ("vision.blocks.attn.o", "vision.deepstack.1")],
    True: [("layers.mlp.down",), ("layers.mlp.gate_up", "k_proj")],
}


@pytest.mark.parametrize("which", [0, 1])
def test_some_places_alone(case, which, tmp_path):
    """What PEFT adds to each weight is what we add, to those and no others."""
    weights, adapter = adapters.random(case.cfg, SOME[case.moe][which], rank=3)
    only = next(iter(adapter.ranks))
    adapter.ranks[only] = (3, 0, 3)  # the second layer has none
    save_adapter(tmp_path / "some", case.cfg, weights, adapter)
    model = case.with_peft(tmp_path / "some").merge_and_unload()
    state = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    state = {n: x.swapaxes(1, 2) if ".experts." in n else x for n, x in state.items()}
    changed = {n: state[n] - x for n, x in case.ref.weights.items() if np.any(state[n] != x)}
    deltas = case.deltas(weights, adapter)
    assert changed.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert ours.worst(delta, changed[name]) < 1e-4, name


@pytest.mark.parametrize("case", [True], indirect=True, ids=["moe"])
def test_experts_of_an_older_peft(case, tmp_path):
    """It took transformers 5's [E, out, in] for [E, in, out]: A and B are of the other side."""
    weights, adapter = adapters.random(case.cfg, ("experts",))
    save_adapter(tmp_path / "old", case.cfg, weights, adapter)
    stored = load_file(tmp_path / "old" / MATRICES)
    experts = case.cfg.text.num_experts
    for name in [name for name in stored if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = stored[name], stored[other]
        a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts)
        stored[name] = np.ascontiguousarray(b.transpose(2, 1, 0)).reshape(-1, len(b))
        stored[other] = np.ascontiguousarray(a.transpose(2, 1, 0)).reshape(a.shape[2], -1)
    save_file(stored, tmp_path / "old" / MATRICES)
    found, settings = load_adapter(tmp_path / "old", case.cfg)
    assert settings == adapter
    assert all(np.array_equal(found[name], x) for name, x in weights.items())


def edited(folder, out, tensors=None, **settings):
    """A copy of an adapter's directory with other settings, and other tensors."""
    shutil.copytree(folder, out)
    found = json.loads((out / SETTINGS).read_text())
    (out / SETTINGS).write_text(json.dumps(found | settings))
    if tensors is not None:
        save_file(tensors, out / MATRICES)
    return out


def test_other_spellings_are_read(case, tmp_path):
    """Names without PEFT's prefix, with the adapter's name, of a model wrapped otherwise."""
    stored = load_file(case.folder / MATRICES)

    def renamed(name):
        name = name.removeprefix("base_model.model.").replace("model.visual", "visual", 1)
        name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
        return re.sub(r"lora_(.)\.", r"lora_\1.default.", name)

    tensors = {renamed(name): x for name, x in stored.items()}
    assert not tensors.keys() & stored.keys()
    found, settings = load_adapter(edited(case.folder, tmp_path / "a", tensors), case.cfg)
    assert settings == case.adapter
    assert all(np.array_equal(found[name], x) for name, x in case.weights.items())


REFUSED = [
    ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias"),
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa"}, "pissa"),
]


@pytest.mark.parametrize("case", [False], indirect=True, ids=["dense"])
def test_what_cannot_be_read_is_told_in_one_line(case, tmp_path):
    stored = load_file(case.folder / MATRICES)
    key = "base_model.model.model.language_model.layers.{}.self_attn.o_proj.lora_{}.weight"
    a, b = stored[key.format(0, "A")], stored[key.format(0, "B")]
    tensors = [
        ({**stored, key.format(7, "A"): a, key.format(7, "B"): b}, "layers.7.self_attn.o_proj"),
        ({**stored, key.format(0, "A"): a[:, 1:].copy()}, "[r 64]"),
        ({n: x for n, x in stored.items() if n != key.format(0, "B")}, "lora_A alone"),
        ({**stored, "base_model.model.lm_head.modules_to_save.weight": a}, "modules_to_save"),
        ({key.format(0, "magnitude_vector"): a}, "no matrix of a LoRA"),
        ({}, "holds no matrices"),
    ]
    cases = [({}, settings, told) for settings, told in REFUSED]
    cases += [({"tensors": x}, {}, told) for x, told in tensors]
    for number, (changes, settings, told) in enumerate(cases):
        folder = edited(case.folder, tmp_path / str(number), **changes, **settings)
        with pytest.raises(InputError) as error:
            load_adapter(folder, case.cfg)
        assert told in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "0" / MATRICES).rename(tmp_path / "0" / "adapter_model.bin")
    edited(tmp_path / "0", tmp_path / "pickle", use_dora=False)
    for folder, told in (("pickle", "pickle"), ("none", "no such directory")):
        with pytest.raises(InputError, match=told):
            load_adapter(tmp_path / folder, case.cfg)
    with pytest.raises(InputError, match="already exists"):
        save_adapter(case.folder, case.cfg, case.weights, case.adapter)


def test_load_and_convert_take_an_adapter(case, tmp_path):
    """Beside the weights, or added to those of a new checkpoint; both are not saved as one by mistake."""
    folder = reference.save(case.ref, tmp_path / "base")
    to_orbax(folder, tmp_path / "merged", adapter=case.folder)
    params, _ = q3.load(tmp_path / "merged")
    named = released.to_hf(case.cfg, jax.tree.map(np.asarray, params))
    for name, x in case.merged(case.weights, case.adapter).items():
        np.testing.assert_allclose(named[name], x, rtol=1e-5, atol=1e-6)
    params, cfg = q3.load(folder, adapter=case.folder)
    logits = np.asarray(ours.forward(q3.stack_layers(params), cfg, case.batch))
    assert np.array_equal(logits[:, : case.seen.shape[1]][case.seen], case.logits)
    lazy = {("layers", 0, "attn", "o", "values"): LazyTensor((), np.dtype(np.int8), lambda: None)}
    with pytest.raises(InputError, match="got weights of 8 or 4 bits"):
        merged(cfg, lazy, *adapters.random(cfg, ("o_proj",)))
    with pytest.raises(InputError, match="merge"):
        q3.save_params(tmp_path / "out", params, cfg)
    with pytest.raises(InputError, match="no such directory"):
        q3.load(folder, adapter=tmp_path / "none")
