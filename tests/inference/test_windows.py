"""What a researcher looks into: attention of some queries, interventions, patches and their places."""

import functools

import jax
import numpy as np
import ours
import pytest
import reference
import tiny
import torch
from PIL import Image

import qwen3vl_jax as q3
from demo import evaluate
from qwen3vl_jax.model.transformer import lm_logits

RAW = tiny.config_dict("base")
ROW = [("text", 4), ("image", (1, 2, 3)), ("text", 5), ("image", (1, 1, 2)), ("text", 6)]


@pytest.fixture(scope="module")
def model():
    params, cfg = ours.tiny_model("base", False)
    return params, cfg, q3.make_batch(cfg, **tiny.inputs(RAW, ROW, 3), pad=False)


def arrays_of(seed):
    return {k: torch.from_numpy(x) for k, x in tiny.inputs(RAW, ROW, seed).items()}


def test_attentions_of_some_layers_and_queries(model):
    """The same numbers as of all, from per-layer and from stacked parameters."""
    params, cfg, batch = model
    attentions = jax.jit(q3.attentions, static_argnames=("cfg", "layers", "queries"))
    stacked = q3.stack_layers(params)
    whole = np.asarray(attentions(stacked, cfg, batch))
    width = whole.shape[-1]
    for tree in (params, stacked):
        few = attentions(tree, cfg, batch, layers=(3, -5), queries=(-1, 2))
        np.testing.assert_allclose(few, whole[[3, 0]][:, :, :, [width - 1, 2]], rtol=0, atol=1e-6)
    for name, wrong in (("layers", [5]), ("queries", [-width - 1]), ("layers", [])):
        with pytest.raises(q3.InputError, match=f"^{name}: got "):
            q3.attentions(params, cfg, batch, **{name: wrong})


def test_interventions_are_those_of_a_hook_in_the_reference(model):
    """Added after one layer and scaled after another: whole sequences, a prefill, a decode step."""
    params, cfg, batch = model
    push = np.random.default_rng(0).normal(size=cfg.text.hidden_size).astype(np.float32)

    def intervene(i, x):
        return jax.numpy.where(i == 1, x + push, jax.numpy.where(i == 3, 0.5 * x, x))

    theirs = reference.build().model()
    layers = theirs.model.language_model.layers
    # The reference adds DeepStack between a layer's hook and the next layer: layer 1 has one.
    hooks = [
        layers[2].register_forward_pre_hook(
            lambda _, args: (args[0] + torch.tensor(push), *args[1:])
        ),
        layers[3].register_forward_hook(lambda _, args, out: out * 0.5),
    ]
    with torch.no_grad():
        want = theirs(**arrays_of(3)).logits.numpy()
    for hook in hooks:
        hook.remove()
    stacked = q3.stack_layers(params)
    for options, far in (({"intervene": intervene}, 0), ({}, 1e-2)):
        run = jax.jit(functools.partial(q3.forward, **options), static_argnames="cfg")
        assert far <= ours.worst(run(stacked, cfg, batch), want) < (1 if far else 2e-5)
    run = jax.jit(functools.partial(q3.hidden_states, intervene=intervene), static_argnames="cfg")
    states = run(stacked, cfg, batch)
    assert ours.worst(lm_logits(params, cfg, states[-1]), want) < 2e-5
    total = batch.tokens.shape[1]
    features = q3.vision_encode(params, cfg, batch.vision)
    head = q3.make_batch(cfg, **tiny.inputs(RAW, ROW[:-1], 3), pad=False)
    cache, logits = q3.prefill(params, cfg, head, total, features=features, intervene=intervene)
    at = head.tokens.shape[1] - 1
    assert ours.worst(logits, want[:, at]) < 2e-5
    step = functools.partial(q3.decode_step, intervene=intervene)
    step = jax.jit(step, static_argnames="cfg", donate_argnames="cache")
    for token in np.asarray(batch.tokens)[0, at + 1 :]:
        at += 1
        cache, logits = step(params, cfg, cache, jax.numpy.asarray([token]))
        assert ours.worst(logits, want[:, at]) < 2e-5
    with pytest.raises(q3.InputError, match="intervene: got one with chunk"):
        q3.prefill(params, cfg, head, total, chunk=8, intervene=intervene)


def test_states_of_the_vision_tower(model):
    """The last ones and those of DeepStack's levels give the features through the mergers; also stacked."""
    params, cfg, batch = model
    states = q3.vision_states(params, cfg, batch.vision)
    assert len(states) == cfg.vision.depth + 1
    theirs, seen = reference.build().model(), []
    hooks = [
        b.register_forward_hook(lambda *a: seen.append(a[2])) for b in theirs.model.visual.blocks
    ]
    with torch.no_grad():
        theirs(**arrays_of(3))
    for hook in hooks:
        hook.remove()
    assert len(seen) == cfg.vision.depth
    for ours_, reference_ in zip(states[1:], seen, strict=True):
        assert ours.worst(ours_[0, : len(reference_)], reference_.numpy()) < 2e-5


def test_boxes_of_tokens_cover_their_images():
    """A token's box is where its pixels were: found by drawing one white square and looking for it."""
    proc = q3.Processor.from_pretrained(evaluate.CHECKPOINT)
    image = np.zeros((128, 192, 3), np.uint8)
    image[32:64, 160:192] = 255
    content = [{"type": "image", "image": Image.fromarray(x)} for x in (image[:64, :64], image)]
    (prompt,) = proc.encode(
        [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}]
    )
    number, box = q3.patch_boxes(proc.config, prompt)
    assert (
        len(number) == len(prompt.ids) and set(number) == {-1, 0, 1} and not box[number < 0].any()
    )
    second = prompt.images[1]
    brightest = second.patches.reshape(second.end - second.start, -1).mean(1).argmax()
    side = proc.config.vision.patch_size * proc.config.vision.spatial_merge_size
    assert 192 % side == 128 % side == 0
    x1, y1, x2, y2 = box[second.start + brightest] * [192, 128, 192, 128]
    assert 160 <= (x1 + x2) / 2 <= 192 and 32 <= (y1 + y2) / 2 <= 64
    areas = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    assert [float(areas[number == n].sum()) for n in (0, 1)] == pytest.approx([1, 1], abs=1e-5)
    one = number == 1
    hot = np.asarray(
        q3.heat_map(Image.fromarray(image), box[one], np.arange(one.sum()) == brightest)
    )
    assert hot[48, 176].tolist() == [255, 25, 25] and (hot[0, 0] == 0).all()
    with pytest.raises(q3.InputError, match="negative or not finite"):
        q3.heat_map(Image.fromarray(image), box[one], np.full(one.sum(), np.nan))


def test_patches_left_out(model):
    """What is left gets the features that it has where the others are hidden, and keeps its positions."""
    params, cfg, batch = model
    tokens, rows = np.asarray(batch.tokens), np.asarray(batch.vision_rows)
    keep = np.ones_like(tokens, bool)
    gone = np.flatnonzero(rows[0] >= 0)[
        [1, 4, 6]
    ]  # two of the first image's six, one of the second's two
    keep[0, gone] = False
    cut = q3.drop_patches(cfg, batch, keep)
    left = tokens.shape[1] - 3
    kept = keep[0]
    for name in ("tokens", "positions", "segment_ids"):
        whole = np.asarray(getattr(batch, name))
        np.testing.assert_array_equal(np.asarray(getattr(cut, name))[..., :left], whole[..., kept])
    assert not np.asarray(cut.segment_ids)[:, left:].any()
    # The patches in another order, those left out last in their frame, where nobody sees them.
    unit, vision = cfg.vision.merge_unit, batch.vision
    order = np.concatenate([[0, 2, 3, 5, 1, 4], [7, 6]])
    patches = (order[:, None] * unit + np.arange(unit)).reshape(-1)
    hidden = jax.tree.map(lambda x: np.asarray(x)[patches], vision)
    ends = np.array([4 * unit] * 6 * unit + [7 * unit] * 2 * unit, np.int32)
    hidden = hidden.replace(lo=np.sort(np.asarray(vision.lo)), hi=ends)
    want = q3.vision_encode(params, cfg, hidden)
    got = q3.vision_encode(params, cfg, cut.vision)
    for a, b in ((got.merged, want.merged), (got.taps[0], want.taps[0])):
        assert ours.worst(np.asarray(a)[:5], np.asarray(b)[[0, 1, 2, 3, 6]]) < 2e-5
    used = np.asarray(cut.vision_rows)[0]
    assert used[used >= 0].tolist() == [0, 1, 2, 3, 4]
    assert (np.asarray(cut.delta) + left == np.asarray(batch.delta) + tokens.shape[1]).all()
    # Without an image it is the batch of the others, told their positions.
    second = (rows < 0) | (rows < 6)
    arrays = tiny.inputs(RAW, ROW, 3)
    alone = q3.make_batch(
        cfg,
        input_ids=tokens[:, second[0]],
        position_ids=np.asarray(batch.positions)[:, :, second[0]],
        pixel_values=arrays["pixel_values"][:24],
        image_grid_thw=arrays["image_grid_thw"][:1],
    )
    cut = q3.drop_patches(cfg, batch, second)
    logits = [ours.forward(params, cfg, b)[:, : second.sum()] for b in (cut, alone)]
    assert ours.worst(*logits) < 1e-6
    with pytest.raises(q3.InputError, match="drop_patches: got keep"):
        q3.drop_patches(cfg, batch, keep[:, :-1])
