"""Against live transformers, fp32: positions, vision features, logits, greedy tokens; bf16 noise."""

import numpy as np
import ours
import pytest
import reference
import tiny
import torch
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import qwen3vl_jax as q3
from qwen3vl_jax.model.rope import mrope

BOUND = 2e-5
# Several changes in one variant: a wrong one fails, whatever it is with.
DENSE = ("base", "four_taps", "mha_bias_no_taps", "mqa_tied_one_tap", "merge_3", "activations")
SPARSE = ("base", "mha_bias_no_taps", "mqa_tied_one_tap")
SHAPES = [(v, False) for v in DENSE] + [(v, True) for v in SPARSE]
# Each once; the kind has no part in it, so that it takes turns.
ROPES = [(rope, bool(i % 2)) for i, rope in enumerate(tiny.ROPES) if rope != "default"]


@pytest.mark.parametrize(("variant", "moe"), SHAPES)
def test_logits_and_features(variant, moe):
    ref = reference.build(variant, moe)
    params, cfg = ours.build(ref)
    inputs = reference.mixed(ref, "left", ("clips_and_picture", "text", "three_pictures"))
    batch = q3.make_batch(cfg, **inputs)
    width, mask = inputs["input_ids"].shape[1], inputs["attention_mask"] > 0
    positions, delta = reference.positions(ref, inputs)
    np.testing.assert_array_equal(batch.positions[:, :, :width], positions)
    np.testing.assert_array_equal(batch.delta, delta[:, 0])
    ids, grids = inputs["input_ids"], [inputs[k] for k in ("image_grid_thw", "video_grid_thw")]
    np.testing.assert_array_equal(q3.rope_index(cfg, ids, *grids, mask)[0], positions)
    pixels = np.concatenate([inputs[k] for k in ("pixel_values", "pixel_values_videos")])
    vision = q3.make_vision(cfg, pixels, np.concatenate(grids))
    got = ours.vision_encode(params, cfg, vision)
    assert len(got.taps) == len(cfg.vision.deepstack_visual_indexes)
    start = 0  # pictures, then clips
    for kind in ("image", "video"):
        want, taps = reference.features(ref, inputs, kind=kind)
        for mine, theirs in zip([got.merged, *got.taps], [want, *taps], strict=True):
            assert ours.worst(mine[start : start + len(theirs)], theirs) < BOUND
        start += len(want)
    # In the order of the batch's rows.
    bare, own = batch.replace(vision=None), ours.vision_encode(params, cfg, batch.vision)
    logits = np.asarray(ours.forward(params, cfg, bare, features=own))[:, :width]
    assert ours.worst(logits[mask], reference.logits(ref, inputs)[mask]) < BOUND
    if variant == "base":
        whole = np.asarray(ours.forward(params, cfg, batch))[:, :width]
        assert ours.worst(whole[mask], logits[mask]) < BOUND


@pytest.mark.parametrize(("rope", "moe"), ROPES)
def test_rope_types_below_and_above_their_limit(rope, moe):
    ref = reference.build("golden", moe, rope)
    params, cfg = ours.build(ref)
    for row, above in (("short", False), ("long", True)):
        inputs = tiny.inputs(ref.config, row)
        assert (reference.positions(ref, inputs)[0].max() + 1 > tiny.ROPE_LIMIT) == above
        want = reference.logits(ref, inputs)
        got = ours.forward(params, cfg, q3.make_batch(cfg, **inputs))[:, : want.shape[1]]
        assert ours.worst(got, want) < BOUND
    plain = reference.build("golden", moe, "plain")
    if rope != "plain":
        assert ours.worst(want, reference.logits(plain, inputs)) > 1e-3  # the scaling shows


SECTIONS = [(8, [16, 8, 8]), (16, [3, 3, 3]), (16, [8, 0, 0]), (16, [1, 9, 2]), (6, [1, 1, 1])]


@pytest.mark.parametrize(("head_dim", "section"), SECTIONS)
def test_sections_of_any_sum_are_cut_as_in_transformers(head_dim, section):
    """Sections of other sums than head_dim / 2: H and W are cut at its end, T takes what they leave."""
    raw = tiny.config_dict("base")
    raw["text_config"]["head_dim"] = head_dim
    raw["text_config"]["rope_scaling"]["mrope_section"] = section
    cfg = q3.Config.from_hf(raw)
    positions = np.random.default_rng(0).integers(0, 99, (3, 2, 7)).astype(np.int32)
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**raw["text_config"]))
    wanted = theirs(torch.zeros(1), torch.from_numpy(positions))
    for mine, their in zip(mrope(cfg.text, positions, np.float32), wanted, strict=True):
        np.testing.assert_allclose(mine[:, :, 0], their[..., : head_dim // 2], atol=1e-5)
    assert q3.Config.from_hf(cfg.to_hf()) == cfg


@pytest.mark.parametrize("rope", ["yarn", "dynamic", "longrope"])
def test_chunks_beyond_the_limit_equal_transformers(rope):
    """YaRN is the model card's recipe for long context; the others look at the longest position."""
    ref = reference.build("golden", False, rope)
    params, cfg = ours.build(ref)
    inputs = tiny.inputs(ref.config, "long")
    want = reference.logits(ref, inputs)[:, -1]
    got = q3.prefill(params, cfg, q3.make_batch(cfg, **inputs), 64, chunk=16)[1]
    assert ours.worst(got, want) < BOUND


@pytest.mark.parametrize("moe", [False, True])
def test_greedy_64_tokens(moe):
    """Alone and in a mixed batch padded left or right: the same tokens, logits at each step.

    A fair test: at least 12 distinct tokens of 64, top two logits 1e-4 apart, and the picture matters.
    """
    ref = reference.build("golden", moe)
    assert reference.greedy_faults(ref) == []
    params, cfg = ours.build(ref)
    rows = reference.GREEDY_ROWS
    wants = []
    for row in rows:
        inputs = tiny.inputs(ref.config, row)
        want, chosen = reference.answer(ref, row)
        got, logits = ours.greedy(params, cfg, q3.make_batch(cfg, **inputs), 64)
        np.testing.assert_array_equal(got, want)
        assert ours.worst(logits, chosen) < BOUND
        wants.append((want[0], chosen[0]))
    for side in ("left", "right"):
        batch = q3.make_batch(cfg, **reference.mixed(ref, side, rows))
        got, logits = ours.greedy(params, cfg, batch, 64)
        np.testing.assert_array_equal(got, [w for w, _ in wants])
        assert ours.worst(logits, np.stack([c for _, c in wants])) < BOUND
        answer = q3.generate(params, cfg, batch, max_new_tokens=64, stop_ids=())
        np.testing.assert_array_equal(answer.tokens, got)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_bf16_is_no_noisier_than_the_reference(seed, moe):
    ref = reference.build("base", moe, seed=seed)
    params, cfg = ours.build(ref, "bfloat16")
    inputs = tiny.inputs(ref.config, "three_pictures", seed)
    batch = q3.make_batch(cfg, **inputs)
    want, noisy = reference.logits(ref, inputs), reference.logits(ref, inputs, "bfloat16")
    got = np.asarray(ours.forward(params, cfg, batch))[:, : want.shape[1]]
    assert np.abs(got - want).mean() <= 2 * np.abs(noisy - want).mean()
    want, taps = reference.features(ref, inputs)
    noisy, noisy_taps = reference.features(ref, inputs, "bfloat16")
    out = ours.vision_encode(params, cfg, batch.vision)
    for g, w, n in zip([out.merged, *out.taps], [want, *taps], [noisy, *noisy_taps], strict=True):
        got = np.asarray(g[: len(w)], np.float32)
        assert np.abs(got - w).mean() <= 2 * np.abs(n - w).mean()
