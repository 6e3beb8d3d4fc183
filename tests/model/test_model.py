"""Properties of the model: caches, causality, padding, packing, scan, and the goldens of 4.57.1."""

import functools
import math

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.model.cache import init_cache

COUNTS = {
    "2b": 2_127_532_032,
    "4b": 4_437_815_808,
    "8b": 8_767_123_696,
    "32b": 33_357_390_064,
    "30b-a3b": 31_070_754_032,
    "235b-a22b": 235_670_022_896,
}


def model(moe=False, rope="default"):
    return ours.tiny_model("shallow" if rope == "default" else "golden", moe, rope)


def inputs(row, seed=0, variant="base"):
    return tiny.inputs(tiny.config_dict(variant), row, seed)


def abstract(cfg):
    return jax.eval_shape(functools.partial(q3.init_params, cfg=cfg), jax.random.key(0))


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_of_the_released_sizes(size):
    shapes = jax.tree.leaves(abstract(q3.Config.named(size)))
    assert sum(math.prod(x.shape) for x in shapes) == COUNTS[size]


SHAPES = [("base", False), ("tied", False), ("merge_3", False)]
SHAPES += [("attention_bias", True), ("no_taps", True)]


@pytest.mark.parametrize(("variant", "moe"), SHAPES)
def test_converted_weights_have_the_shapes_of_init_params(variant, moe):
    params, cfg = ours.tiny_model(variant, moe)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract(cfg))


@functools.partial(jax.jit, static_argnames="cfg")
def inside(params, cfg, batch):
    """Hidden states and attentions, by one program."""
    return q3.hidden_states(params, cfg, batch), q3.attentions(params, cfg, batch)


@pytest.mark.parametrize("name", golden_io.FILES)
def test_hidden_states_and_attentions_of_4_57_1(name):
    golden = golden_io.load(name)
    params, cfg = ours.build(golden)
    out, mask = golden.outputs, golden.inputs["attention_mask"] > 0
    batch = q3.make_batch(cfg, **golden.inputs, pad=False)
    at_tokens = np.asarray(mask)
    assert (batch.positions == out["position_ids"])[:, at_tokens].all()
    padded = mask.shape[1] - mask.sum(1)
    np.testing.assert_array_equal(batch.delta, out["rope_deltas"][:, 0] + padded)
    states, probs = inside(params, cfg, batch)
    assert states.shape == out["hidden_states"].shape
    for got, want in zip(states, out["hidden_states"], strict=True):
        assert ours.worst(np.asarray(got)[mask], want[mask]) < 2e-5
    assert probs.shape == out["attentions"].shape
    seen = mask[:, None, :, None] & mask[:, None, None, :]
    for got, want in zip(probs, out["attentions"], strict=True):
        both = np.broadcast_to(seen, want.shape)
        assert ours.worst(np.asarray(got)[both], want[both]) < 2e-5
    got, _ = ours.greedy(params, cfg, batch, out["greedy"].shape[1])
    np.testing.assert_array_equal(got, out["greedy"])


# dynamic and longrope below their limit: beyond it the reference differs too
EVERY = [(False, "default"), (True, "default")]
EVERY += [(False, rope) for rope in ("linear", "dynamic", "yarn", "longrope", "llama3")]


@pytest.mark.parametrize(("moe", "rope"), EVERY)
def test_forward_is_prefill_and_decode_at_every_position(moe, rope):
    """Row n of one batch is prefilled with the first n tokens, the picture cut anywhere, and decoded on."""
    params, cfg = model(moe, rope)
    row = inputs([("text", 4), ("image", (1, 3, 5)), ("text", 17)], variant="golden")
    whole = q3.make_batch(cfg, **row, pad=False)
    want = np.asarray(ours.forward(params, cfg, whole))[0]
    total, ids = len(want), row["input_ids"][0]
    place = np.asarray(whole.positions)[:, 0]  # [3 T]
    assert place.max() < tiny.ROPE_LIMIT

    def repeat(x, axis=0):
        return np.repeat(x, total - 1, axis=axis)

    heads = np.arange(1, total)  # tokens of each row, all but the last one at most
    starts = whole.replace(
        tokens=repeat(whole.tokens),
        positions=repeat(whole.positions, 1),
        segment_ids=(np.arange(total) < heads[:, None]).astype(np.int32),
        vision_rows=repeat(whole.vision_rows),
        delta=place[0, 1:] - heads,
    )
    cache, logits = ours.prefill(params, cfg, starts, 64)
    assert ours.worst(logits, want[:-1]) < 1e-5
    text, good, steps = np.asarray(whole.vision_rows)[0] < 0, heads > 0, 0
    for at in (np.minimum(heads + step, total - 1) for step in range(total)):
        good &= text[at] & (
            heads + steps < total
        )  # rows that have met text alone, before their end
        if not good.any():
            break
        cache, logits = ours.decode_step(params, cfg, cache, jnp.asarray(ids[at], jnp.int32))
        cache = cache.replace(length=cache.length - ~good)  # the others stay below the limit
        assert ours.worst(logits[good], want[at[good]]) < 1e-5
        steps += 1
    assert steps == 18


@pytest.mark.parametrize("side", ["left", "right"])
def test_extend_appends_text_and_pictures(side):
    params, cfg = model()
    turns = (
        ["one_picture", "text"],
        [[("text", 3), ("image", (1, 2, 3)), ("text", 5)], [("text", 4)]],
    )
    first, second = ([inputs(row, seed) for seed, row in enumerate(turn)] for turn in turns)
    cache, _ = ours.prefill(params, cfg, q3.make_batch(cfg, **tiny.pad_batch(first, side)), 128)
    cache, got = ours.extend(params, cfg, cache, q3.make_batch(cfg, **tiny.pad_batch(second, side)))
    cache, after = ours.decode_step(params, cfg, cache, jnp.array([7, 8], jnp.int32))
    wholes = []
    for b, (a, c) in enumerate(zip(first, second, strict=True)):
        token, one = np.array([[7 + b]]), np.array([[1]])
        end = {"input_ids": token, "attention_mask": one, "mm_token_type_ids": 0 * one}
        wholes.append({k: np.concatenate([a[k], c[k], end[k]], -1) for k in end})
        for key in ("pixel_values", "image_grid_thw"):
            if key in a:
                wholes[b][key] = np.concatenate([a[key], c[key]])
    whole = q3.make_batch(cfg, **tiny.pad_batch(wholes, "left"), pad=False)
    want = np.asarray(ours.forward(params, cfg, whole))
    for b in range(2):
        assert ours.worst(got[b], want[b, -2]) < 1e-5
        assert ours.worst(after[b], want[b, -1]) < 1e-5


def test_causality_by_gradient():
    params, cfg = model()
    params = q3.stack_layers(params)
    row = inputs("one_picture")
    batch = q3.make_batch(cfg, **row, pad=False)
    embeds = params["embed"][batch.tokens]
    at = 20

    def pick(embeds):
        return q3.forward(params, cfg, batch.replace(embeds=embeds))[0, at].sum()

    moved = np.abs(np.asarray(jax.jit(jax.grad(pick))(embeds)))[0].max(-1)
    text = batch.vision_rows[0] < 0
    assert (moved[at + 1 :] == 0).all()
    assert (moved[: at + 1][text[: at + 1]] > 0).all()
    assert (moved[~text] == 0).all()  # the vision rows are written over


def test_pictures_do_not_see_each_other():
    params, cfg = model()
    row = inputs("three_pictures")
    base = ours.vision_encode(
        params, cfg, q3.make_vision(cfg, row["pixel_values"], row["image_grid_thw"])
    )
    sizes = row["image_grid_thw"].prod(1)
    pixels = row["pixel_values"].copy()
    pixels[sizes[0] : sizes[0] + sizes[1]] += 1.0  # another second picture
    other = ours.vision_encode(params, cfg, q3.make_vision(cfg, pixels, row["image_grid_thw"]))
    same = np.ones(base.merged.shape[0], bool)
    same[sizes[0] // 4 : (sizes[0] + sizes[1]) // 4] = False
    for a, b in ((base.merged, other.merged), *zip(base.taps, other.taps, strict=True)):
        np.testing.assert_array_equal(np.asarray(a)[same], np.asarray(b)[same])
        assert (np.abs(np.asarray(a) - np.asarray(b))[~same].max(-1) > 0).all()


@pytest.mark.parametrize("moe", [False, True])
def test_padding_changes_nothing(moe):
    params, cfg = model(moe)
    row = inputs("clips_and_picture")
    tight = ours.forward(params, cfg, q3.make_batch(cfg, **row, pad=False))
    # On the left to the longer row, then on the right to a bucket.
    wide = q3.make_batch(cfg, **tiny.pad_batch([row, inputs("long")]))
    real = np.asarray(wide.segment_ids[0]) > 0
    assert not real[0] and not real[-1]
    assert ours.worst(np.asarray(ours.forward(params, cfg, wide))[0][real], tight[0]) < 2e-5


def test_packed_rows_equal_single_rows():
    params, cfg = model()
    rows = [inputs("one_picture"), inputs("text", 1), inputs("three_pictures", 2)]
    batches = [q3.make_batch(cfg, **r, pad=False) for r in rows]
    packed = q3.make_batch(
        cfg,
        input_ids=np.concatenate([r["input_ids"] for r in rows], 1),
        position_ids=np.concatenate([b.positions for b in batches], 2),
        segment_ids=np.concatenate(
            [np.full(b.tokens.shape, i + 1) for i, b in enumerate(batches)], 1
        ),
        pixel_values=np.concatenate([r["pixel_values"] for r in rows if "pixel_values" in r]),
        image_grid_thw=np.concatenate([r["image_grid_thw"] for r in rows if "image_grid_thw" in r]),
    )
    got, at = ours.forward(params, cfg, packed)[0], 0
    for batch in batches:
        width = batch.tokens.shape[1]
        assert ours.worst(got[at : at + width], ours.forward(params, cfg, batch)[0]) < 2e-5
        at += width


def labelled(moe, rope):
    """(params in lists, cfg, a batch with labels) of few layers."""
    params, cfg = model(moe, rope)
    row = inputs("three_pictures", variant="golden")
    labels = np.where(row["input_ids"] < 290, row["input_ids"], -100)
    return params, cfg, q3.make_batch(cfg, **row, labels=labels, pad=False)


def test_scan_over_stacked_layers_equals_the_loop():
    """Logits, every layer's state, the loss."""
    params, cfg, batch = labelled(False, "plain")
    stacked = q3.stack_layers(params)
    assert jax.tree.map(jnp.shape, q3.unstack_layers(stacked)) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def outputs(params, batch):
        calls = (q3.forward, q3.hidden_states, lambda *given: q3.loss_fn(*given)[0])
        return [call(params, cfg, batch) for call in calls]

    for want, got in zip(outputs(params, batch), outputs(stacked, batch), strict=True):
        assert ours.worst(got, want) < 1e-5
    with pytest.raises(q3.InputError, match="unstack_layers"):
        q3.prefill(stacked, cfg, batch, 64)


def test_gradients_of_a_scan_equal_those_of_the_loop():
    """Of the kind with more parts, which has those of the other but the MLP."""
    params, cfg, batch = labelled(True, "default")
    grad = jax.jit(jax.value_and_grad(q3.loss_fn, has_aux=True), static_argnums=1)
    (loss, metrics), slope = grad(params, cfg, batch)
    (scan_loss, _), scan_slope = grad(q3.stack_layers(params), cfg, batch)
    assert metrics["tokens"] == (batch.labels[:, 1:] != -100).sum()
    np.testing.assert_allclose(scan_loss, loss, rtol=1e-6)
    slope = jax.tree.leaves(q3.stack_layers(slope))
    pairs = zip(slope, jax.tree.leaves(scan_slope), strict=True)
    top = max(float(jnp.abs(x).max()) for x in slope)
    assert all(float(jnp.abs(a - b).max()) < 1e-5 * top for a, b in pairs)


def test_loss_is_transformers_loss():
    params, cfg = model()
    row = inputs("text")
    batch = q3.make_batch(cfg, **row, labels=row["input_ids"])
    logits = np.asarray(ours.forward(params, cfg, batch), np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.mean([log_probs[t, row["input_ids"][0, t + 1]] for t in range(12)])
    loss, stacked = jax.jit(q3.loss_fn, static_argnums=1), q3.stack_layers(params)
    np.testing.assert_allclose(loss(stacked, cfg, batch)[0], want, rtol=1e-5)
    # Nothing to learn is 0, where transformers gives nan.
    nothing = q3.make_batch(cfg, **row, labels=np.full_like(row["input_ids"], -100))
    assert loss(stacked, cfg, nothing)[0] == 0


def test_some_logits_only_and_kept_features_and_embeddings():
    params, cfg = model()
    row = inputs("one_picture")
    batch = q3.make_batch(cfg, **row, pad=False)
    want = ours.forward(params, cfg, batch)
    for side in ("left", "right"):  # attended tokens, not padding
        wide = q3.make_batch(cfg, **tiny.pad_batch([row, inputs("long")], side))
        last = ours.forward(params, cfg, wide, logits_to_keep=3)[0]
        np.testing.assert_allclose(last, want[0, -3:], atol=1e-4)
    many = functools.partial(q3.forward, cfg=cfg, logits_to_keep=99)
    assert jax.eval_shape(many, params, batch=batch).shape == want.shape
    with pytest.raises(q3.InputError, match="logits_to_keep is -1"):
        jax.eval_shape(functools.partial(many, logits_to_keep=-1), params, batch=batch)
    some = jax.jit(lambda tree, keep: q3.forward(tree, cfg, batch, logits_to_keep=keep))(
        q3.stack_layers(params), jnp.array([0, 21, 5])
    )
    np.testing.assert_allclose(some, want[:, [0, 21, 5]], atol=1e-5)
    features = ours.vision_encode(params, cfg, batch.vision)
    bare = batch.replace(vision=None)
    np.testing.assert_allclose(ours.forward(params, cfg, bare, features=features), want, atol=1e-5)
    _, logits = ours.prefill(params, cfg, bare, 64, features=features)
    np.testing.assert_allclose(logits, want[:, -1], atol=1e-5)
    embeds = params["embed"][batch.tokens]
    given = q3.make_batch(cfg, **row, inputs_embeds=embeds, pad=False)
    np.testing.assert_allclose(ours.forward(params, cfg, given), want, atol=1e-5)
    given = q3.make_batch(cfg, **row, inputs_embeds=embeds)  # padded to a bucket
    assert given.embeds.shape == (*given.tokens.shape, cfg.text.hidden_size)


def test_pictures_that_are_not_there_are_missed():
    params, cfg = model()
    row = inputs("one_picture")
    bare = q3.make_batch(cfg, **{k: v for k, v in row.items() if k != "pixel_values"}, pad=False)
    assert bare.vision is None
    with pytest.raises(q3.InputError, match="features="):
        q3.forward(params, cfg, bare)
    full = q3.make_batch(cfg, **row, pad=False)
    features = ours.vision_encode(params, cfg, full.vision)
    got = ours.forward(params, cfg, bare, features=features)
    np.testing.assert_allclose(got, ours.forward(params, cfg, full), atol=1e-5)


def test_a_cache_of_any_size_is_whole_blocks_and_grows():
    params, cfg = model()
    batch = q3.make_batch(cfg, **inputs("text"))
    cache, _ = ours.prefill(params, cfg, batch, 1000)
    assert cache.slots == 1024
    token = jnp.array([5], jnp.int32)
    step = ours.decode_step
    memory = step.lower(params, cfg, cache, token).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.k[0].nbytes * 2  # no layer's cache is copied whole
    assert q3.grow_cache(cache, 1100).slots == 1536
    with pytest.raises(q3.InputError, match="1024"):
        q3.grow_cache(cache, 512)
    step(params, cfg, init_cache(cfg, 1, 1000, jnp.float32), token)  # an eager cache can be donated


def test_float16_runs_and_is_close():
    row = inputs("one_picture")
    params, cfg = model()
    batch = q3.make_batch(cfg, **row, pad=False)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    want = ours.forward(params, cfg, batch)
    got = ours.forward(half, cfg, batch)
    assert ours.worst(got, want) < 0.03
    cache, _logits = ours.prefill(half, cfg, batch, 64)
    assert np.isfinite(np.asarray(ours.decode_step(half, cfg, cache, jnp.array([5]))[1])).all()
