"""FLOPs against XLA's own count, memory of a scanned step, and the flags of bit-equality."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import ours_train
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.runtime import chips
from qwen3vl_jax.training import recipe, train_step
from qwen3vl_jax.training.environment import FLAGS, make_deterministic
from qwen3vl_jax.training.reporting import flops


def config(**text):
    """A model whose matrices outweigh its elementwise work."""
    raw = tiny.config_dict("golden")
    raw["text_config"] |= {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, **text}
    raw["vision_config"] |= {"hidden_size": 192, "intermediate_size": 384, "out_hidden_size": 256}
    raw["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    return q3.Config.from_hf(raw), raw


def shapes(cfg):
    return jax.eval_shape(functools.partial(q3.init_params, cfg=cfg), jax.random.key(0))


def test_forward_flops_are_those_that_xla_counts():
    """An unrolled forward pass over one picture and its text, to a few percent."""
    cfg, raw = config()
    inputs = tiny.inputs(raw, [("text", 20), ("image", (1, 4, 6)), ("text", 84)])
    batch = q3.make_batch(cfg, **inputs, pad=False)
    run = jax.jit(functools.partial(q3.forward, cfg=cfg), compiler_options=ours_train.FAST)
    counted = run.lower(shapes(cfg), batch=batch).compile().cost_analysis()["flops"]
    # One block of keys serves all queries here, so XLA computes every pair.
    t, p = batch.tokens.size, len(batch.vision.lo)
    said = sum(flops.forward_flops(cfg, flops.Counts(t, t * t, p, p * p)).values())
    assert 1 < counted / said < 1.05


def test_full_work_is_that_of_a_batch_without_padding():
    """Every row full: tokens, pairs of a causal row, patches, and pairs of a frame that fills a row."""
    settings = recipe.Recipe(
        "x", 1, pack=recipe.Pack(rows=2, length=32, vision_rows=2, vision_length=32)
    )
    assert flops.full_work(settings) == flops.Counts(64, 64 * 33 // 2, 64, 64 * 32)


def test_step_flops_follow_what_is_trained():
    """Twice the forward again for the backward; frozen towers, adapters and remat as they should."""
    cfg, _ = config()
    work = flops.Counts(1000, 300_000, 400, 40_000)
    parts = flops.forward_flops(cfg, work)
    forward, of = sum(parts.values()), functools.partial(flops.step_flops, cfg, work)
    whole = of()
    assert whole == pytest.approx(3 * forward)
    vision = parts["vision"] + parts["vision_attention"]
    frozen = of(trained=("merger", "embeddings", "text", "head"))
    assert whole - frozen == pytest.approx(2 * vision + parts["merger"])
    lora = of(trained=(), adapters={"text": 1000})
    decoder = parts["text"] + parts["attention"] + parts["head"]
    text = parts["text"] + parts["head"]
    assert lora == pytest.approx(forward + text + 2 * parts["attention"] + 6 * 1000 * 1000)
    assert of(remat="none") - whole == pytest.approx(parts["head"])
    t, c = cfg.text, cfg.vision
    # Not needed again: the last product of each MLP, and the patch embedding.
    last = 2 * work.tokens * t.num_hidden_layers * t.hidden_size * t.intermediate_size
    last += 2 * work.patches * c.depth * c.hidden_size * c.intermediate_size
    last += 2 * work.patches * math.prod(c.patch_shape) * c.hidden_size
    assert of(remat="full") - whole == pytest.approx(decoder + vision - last)
    wide = 2 * work.tokens * t.num_hidden_layers * 2 * t.hidden_size * t.intermediate_size
    wide += 2 * work.patches * c.depth * c.hidden_size * c.intermediate_size
    again = of(remat="narrow") - of(remat="dots")
    assert again == pytest.approx(wide)
    assert of(trained=("head",)) == pytest.approx(forward + parts["head"])
    untied, tied = (dataclasses.replace(cfg, tie_word_embeddings=x) for x in (False, True))
    least = ("embeddings", "text")  # a tied head is trained as the embedding that it is
    more = flops.step_flops(tied, work, trained=least) - flops.step_flops(
        untied, work, trained=least
    )
    assert more == pytest.approx(parts["head"])


def test_matrices_are_those_of_the_parameters():
    """Released sizes: 2 FLOPs a weight a token, of experts those that are chosen."""
    for size in ("2b", "30b-a3b"):
        cfg = q3.Config.named(size)
        tree = shapes(cfg)
        layer = tree["layers"][0]
        count = sum(math.prod(x.shape) for x in _matrices(layer))
        if cfg.text.num_experts:
            experts = sum(math.prod(layer["mlp"][n].shape) for n in ("gate_up", "down"))
            count -= experts * (1 - cfg.text.num_experts_per_tok / cfg.text.num_experts)
        parts = flops.forward_flops(cfg, flops.Counts(1, 0, 4, 0))
        found = sum(parts.get(n, 0) for n in ("text", "router", "experts"))
        assert found == pytest.approx(2 * count * cfg.text.num_hidden_layers)
        assert parts["head"] == 2 * math.prod(tree["embed"].shape)
        blocks = sum(math.prod(b.shape) for b in _matrices(tree["vision"]["blocks"]))
        patch = math.prod(tree["vision"]["patch"]["weight"].shape)
        assert parts["vision"] == 2 * 4 * (blocks + patch)
        mergers = [tree["vision"]["merger"], *tree["vision"]["deepstack"]]
        assert parts["merger"] == 2 * sum(math.prod(b.shape) for b in _matrices(mergers))


def _matrices(tree):
    """Leaves that are neither norms nor biases."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [x for path, x in found if x.ndim > 1 and "bias" not in path[-1].key]


def test_peaks_by_device_kind():
    known = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
        "TPU7x": 1153.5e12,
    }
    assert {kind: chips.peak_flops(kind) for kind in known} == known
    assert chips.peak_flops("cpu") is None


def test_a_scanned_step_holds_no_logits_and_no_second_weights():
    """Temporary memory of the gradients of fp32 weights, computed in bf16 with full remat."""
    cfg, raw = config(vocab_size=4096, num_hidden_layers=24)
    settings = train_step.Step(dtype="bfloat16", remat="full", loss_chunk=512)
    weights = jax.eval_shape(lambda p: ours_train.flat(p)[0], shapes(cfg))
    _, unflatten = ours_train.param_groups.flatten(jax.eval_shape(q3.stack_layers, shapes(cfg)))
    text = ours_train.pack(cfg, [[ours_train.sample(raw, [("text", 40)])]], length=512)
    packed = ours_train.micro(text.replace(batch=text.batch.replace(vision=None, vision_rows=None)))

    def run(weights, packed):
        rebuild = lambda weights, key: unflatten(weights)  # noqa: E731
        return ours_train.gradients(weights, rebuild, cfg, packed, settings, jax.random.key(0))

    jitted = jax.jit(run, compiler_options=ours_train.FAST)
    compiled = jitted.lower(weights, packed).compile()
    assert re.search(r"\[(1,)*512,512\]", compiled.as_text())  # logits of 512 words
    assert not re.search(r"\[(1,)*512,4096\]", compiled.as_text())
    held = sum(math.prod(x.shape) * 4 for x in weights.values())
    stats = compiled.memory_analysis()
    assert stats.output_size_in_bytes > held
    # 0.51 of them, whatever the vocabulary; a copy of the weights in bf16 would add a half.
    assert stats.temp_size_in_bytes < 0.6 * held, stats.temp_size_in_bytes / held


def test_flags_of_bit_equality():
    """What is set stays, what contradicts is replaced, twice is once."""
    environ = {"XLA_FLAGS": "--xla_a=1 --xla_gpu_autotune_level=4"}
    for _ in range(2):
        make_deterministic(environ)
        assert environ["XLA_FLAGS"].split() == [
            "--xla_a=1",
            "--xla_gpu_deterministic_ops=true",
            "--xla_gpu_autotune_level=0",
        ]
    environ.clear()
    make_deterministic(environ)
    assert environ == {"XLA_FLAGS": " ".join(FLAGS)}
    assert dataclasses.is_dataclass(flops.Counts) and np.isfinite(jnp.float32(1))
