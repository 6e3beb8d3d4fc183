"""--dry-run: parameters, memory and a sample's mask, from shapes and the tokenizer alone."""

import dataclasses
import io
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import train_files
from rich.console import Console

from qwen3vl_jax.checkpoint.name_map import param_specs
from qwen3vl_jax.config import Config
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training import recipe
from qwen3vl_jax.training.reporting import memory_estimate
from qwen3vl_jax.training.reporting.dry_run import dry_run

CONFIGS = train_files.ROOT / "configs"


def said(settings: recipe.Recipe, colour: bool = False, refused: str = "") -> str:
    """What a dry run prints; refused: words of the refusal at its end."""
    out = io.StringIO()
    system = "standard" if colour else None
    console = Console(file=out, width=120, force_terminal=colour, color_system=system)
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        dry_run(settings, console)
    return out.getvalue()


def count(cfg: Config) -> int:
    """Parameters of a model by the table of the converter."""
    return sum(math.prod(row.shape) for row in param_specs(cfg))


def test_a_pod_recipe_needs_no_weights_no_hub_and_no_mesh(monkeypatch):
    """sft_235b_pod: all 235 billion parameters, memory of one of 256 devices, what is not here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = recipe.read_recipe(CONFIGS / "sft_235b_pod.toml")
    text = said(settings, refused="data.sources.0.path is 'data/train.jsonl': no such file")
    cfg = Config.named("235b-a22b")
    held = memory_estimate.held(recipe.read_recipe(CONFIGS / "sft_235b_pod.toml"), cfg)
    groups = held.by_group(recipe.read_recipe(CONFIGS / "sft_235b_pod.toml"), cfg)
    assert sum(a + b for a, b, _ in groups.values()) == count(cfg) > 235e9
    assert groups["vision"][0] == groups["router"][0] == 0 < groups["merger"][0]
    assert f"{groups['experts'][0]:,}" in text and "memory of each of 256 devices" in text
    assert "steps: 10,000" in text and "cannot be had" in text


@pytest.mark.parametrize(
    ("base", "size"), [("bfloat16", 2), ("float32", 4), ("int8", 1), ("fp8", 1)]
)
def test_lora_holds_its_base_as_asked(base, size):
    """Memory of the frozen base by its form; the optimizer is of the adapter alone."""
    settings = recipe.read_recipe(
        CONFIGS / "sft_8b_lora.toml", [f"lora.base={base}", "step.remat=full"]
    )
    cfg = Config.named("8b")
    parts = memory_estimate.held(settings, cfg)
    found = memory_estimate.memory(settings, cfg, parts)
    trained = sum(math.prod(x.shape) for x in parts.weights.values())
    assert found["optimizer (adamw)"] == pytest.approx(8 * trained, rel=1e-3)
    assert found["trained weights (float32)"] == 4 * trained < 0.05 * 4 * count(cfg)
    frozen = found["frozen weights"] / count(cfg)
    assert frozen == pytest.approx(size, rel=0.01) if size > 1 else 1 < frozen < 1.4


def test_memory_of_weights_is_what_a_state_holds():
    """Frozen groups take no gradient and no optimizer memory; average and compensation are counted."""
    changes = [
        "step.remat=full",
        "optimizer.ema=0.9",
        "step.weights=bfloat16",
        "step.rounding=compensated",
    ]
    settings = recipe.read_recipe(CONFIGS / "sft_2b.toml", changes)
    cfg = Config.named("2b")
    parts = memory_estimate.held(settings, cfg)
    found = memory_estimate.memory(settings, cfg, parts)
    trained = sum(math.prod(x.shape) for x in parts.weights.values())
    assert trained + sum(math.prod(x.shape) for x in parts.frozen.values()) == count(cfg)
    assert found["trained weights (bfloat16)"] == found["compensation"] == 2 * trained
    assert found["moving average"] == found["gradients"] == 4 * trained
    assert found["optimizer (adamw)"] == 8 * trained + 8  # two counts
    rates = parts.by_group(settings, cfg)
    assert rates["merger"][2] == (2.0,) and rates["vision"][2] == ()


def test_memory_of_what_is_computed_on_the_way():
    """Few bits are written out, dropout has masks, trained mergers keep products, "none" keeps all."""
    cfg = Config.named("8b")

    def bytes_of(*changes):
        settings = recipe.read_recipe(CONFIGS / "sft_8b_lora.toml", ["step.remat=full", *changes])
        found = memory_estimate.memory(settings, cfg, memory_estimate.held(settings, cfg))
        kept = next(size for name, size in found.items() if name.startswith("activations"))
        return kept, sum(size for name, size in found.items() if "few bits" in name)

    kept, written = bytes_of()
    assert written == 0 and bytes_of("lora.base=int4") == (kept, 2_402_287_616)
    masks = kept - bytes_of("lora.dropout=0.0")[0]
    assert masks == 4 * 4096 * 2 * 2 * (6 * 4096 + 12288)
    assert bytes_of('lora.targets=["text"]')[0] == kept - 4 * 8192 * 2 * 4 * 5.5 * 1152
    none = bytes_of("step.remat=none")[0]
    assert none - bytes_of("step.remat=none", "lora.dropout=0.0")[0] == 36 * masks


@pytest.mark.parametrize(
    ("room", "chosen", "least"),
    [(0, "full", 20), (40, "full", 20), (60, "narrow", 35), (105, "dots", 60)],
)
def test_remat_by_the_memory_of_a_device(room, chosen, least):
    """Of GiB: of the 8B's LoRA, whose frozen vision tower keeps nothing. A policy that is named stays."""
    settings = recipe.read_recipe(CONFIGS / "sft_8b_lora.toml")
    cfg = Config.named("8b")
    found = memory_estimate.with_remat(settings, cfg, room * 2**30)
    assert found.step.remat == chosen and found.pack == settings.pack
    size = sum(memory_estimate.memory(found, cfg, memory_estimate.held(found, cfg)).values())
    assert least * 2**30 < size <= max(memory_estimate.AUTO_SHARE * room, 32) * 2**30
    named = dataclasses.replace(settings, step=dataclasses.replace(settings.step, remat="none"))
    assert memory_estimate.with_remat(named, cfg, room * 2**30) is named


@pytest.mark.parametrize(
    ("held", "changes", "told"),
    [
        (None, ["lora.rank=4", "lora.base=fp8"], "holds no FP8 weights"),
        ("int4", [], "holds weights of 8 or 4 bits, which only LoRA can train over"),
        (
            "int4",
            ["lora.rank=4", "lora.base=int8"],
            "holds int4 weights, which int8 would round again",
        ),
    ],
)
def test_a_base_that_a_run_refuses(held, changes, told, tmp_path):
    """The weights' headers are read, where there are weights."""
    ckpt = train_files.checkpoint(tmp_path / "ckpt")
    if held:
        to_orbax(ckpt, tmp_path / held, weights=held)
    data = train_files.conversations(tmp_path / "chats.jsonl")
    path = train_files.write_recipe(tmp_path / "recipe.toml", tmp_path / (held or "ckpt"), data)
    with pytest.raises(InputError, match=told):
        said(recipe.read_recipe(path, changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A recipe over a checkpoint without weights, and conversations."""
    folder = tmp_path_factory.mktemp("dry")
    ckpt = train_files.checkpoint(folder / "ckpt", weights=False)
    data = train_files.conversations(folder / "chats.jsonl")
    return recipe.read_recipe(train_files.write_recipe(folder / "recipe.toml", ckpt, data))


def test_a_sample_shows_its_mask(small):
    """Targets stand between [[ and ]], or in green; placeholders are counted, not repeated."""
    text = said(small)
    shown = re.search(
        r"chats\.jsonl:\d+: (\d+) tokens, (\d+) of them are targets\n(.*)", text, re.S
    )
    assert shown and 0 < int(shown[2]) < int(shown[1])
    targets = re.findall(r"\[\[(.*?)\]\]", shown[3], re.S)
    assert re.fullmatch(r"(\d+) and \1{{<\|im_end\|>}}\n?", targets[1]) and len(targets) == 2
    coloured = said(small, colour=True)
    assert (
        "[[" not in coloured and "\x1b[1;32m" in coloured and "\x1b[1;7;32m<|im_end|>" in coloured
    )
    assert "epochs: about" in text and "of 24 records" in text and "filled: " in text


def test_special_tokens_do_not_look_like_text(small, tmp_path):
    """What a prompt spells is text, or with data.allow_special a token, and a sample shows which."""
    turns = [{"role": "user", "content": "say <|im_start|>"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    changed = dataclasses.replace(
        small.data,
        sources=(dataclasses.replace(small.data.sources[0], path=f"{tmp_path}/a.jsonl"),),
    )
    text = said(dataclasses.replace(small, data=changed))
    assert "say <|im_start|>{{<|im_end|>}}" in text and "{{<|im_start|>}}user" in text


def test_all_that_is_left_out_is_named(small, tmp_path):
    """Of data and of evaluation; where a run would refuse, so does the dry run, and else not."""
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [json.dumps({"messages": good})] * 20
    lines[3], lines[17], lines[9] = (
        "{",
        json.dumps({"messages": good, "label": 1}),
        json.dumps({"messages": [{"role": "user", "content": "word " * 200}, good[1]]}),
    )
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:3], json.dumps({"messages": good[:1]})]))
    sources = [
        (dataclasses.replace(small.data.sources[0], path=f"{tmp_path}/{n}.jsonl"),) for n in "ab"
    ]
    data = dataclasses.replace(small.data, sources=sources[0], bad_fraction=0.1)
    settings = dataclasses.replace(small, data=data)
    text = said(settings)
    for name, reason in (
        ("4", "not JSON"),
        ("18", "unknown key 'label'"),
        ("10", "tokens, pack.length"),
    ):
        assert re.search(f"left out: a.jsonl:{name}: .*{reason}", text)
    strict = dataclasses.replace(settings, data=dataclasses.replace(data, bad_fraction=0.09))
    text = said(strict, refused="2 of 20 records are bad, more than data.bad_fraction 0.09 allows")
    assert text.count("left out: ") == 3 and "memory of" in text
    asked = recipe.Evaluate(every=5, sources=sources[1], generate=2)
    with_evaluation = dataclasses.replace(settings, evaluate=asked)
    text = said(with_evaluation, refused="1 of 4 records are bad")
    assert "left out: b.jsonl:4: nothing to learn" in text
    # An answer to nothing is fine for the loss, and nothing to generate.
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": good[1:]}))
    said(with_evaluation, refused="no conversation that ends in an answer")
    lone = dataclasses.replace(with_evaluation, evaluate=dataclasses.replace(asked, every=0))
    assert "b.jsonl" not in said(lone)


def test_new_tokens_are_seen(small):
    """A dry run reads samples with the tokens that a run would add, and leaves the checkpoint alone."""
    before = (Path(small.ckpt) / "tokenizer.json").read_bytes()
    spare = dataclasses.replace(small, train=dataclasses.replace(small.train, new_tokens=("<x>",)))
    with pytest.raises(recipe.InputError, match="there are rows for 0 more"):
        said(spare)
    assert (Path(small.ckpt) / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ["lora.rank=2"],
            "'merger' is not trained: LoRA trains lora.targets .'text'. alone; take it",
        ),
        (
            ["train.freeze=['merger']"],
            "'merger' is not trained: train.freeze holds it; take it out",
        ),
        (["train.rates={nothing=1.0}"], "'nothing' names no parameter of this model"),
        (["train.rates.vision=0.5", "lora.rank=2", "lora.targets=['merger']"], "'vision' is not"),
    ],
)
def test_rates_of_what_is_not_trained_are_refused_with_the_cause(tmp_path, changes, told):
    """LoRA, or train.freeze; with what to do."""
    ckpt = train_files.checkpoint(tmp_path / "ckpt", weights=False)
    path = train_files.write_recipe(tmp_path / "r.toml", ckpt, tmp_path / "none.jsonl")
    settings = recipe.read_recipe(path, ["train.rates={merger=2.0}", *changes])
    with pytest.raises(InputError, match=told):
        memory_estimate.held(settings, Config.from_hf(ckpt))
