"""Packing: what a packed batch learns is what its samples learn alone, and where they lie."""

import dataclasses
import functools

import golden_io
import jax
import numpy as np
import ours
import ours_train
import pytest
import tiny
import train_sources

import qwen3vl_jax as q3
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import segment_bound
from qwen3vl_jax.processing.batch import make_vision
from qwen3vl_jax.training import param_groups, recipe, train_step
from qwen3vl_jax.training.data import global_batches, packing
from qwen3vl_jax.training.data.packing import PackedBatch

PACK = recipe.Pack(rows=5, length=72, vision_rows=2, vision_length=192, lookahead=8)
SETTINGS = recipe.Step(dtype="float32", remat="none", loss_chunk=32)
WIDTH = PACK.length


def samples(config, count, seed=0):
    return [
        train_sources.make(
            config,
            np.random.default_rng((seed, i)),
            train_sources.KINDS[i % len(train_sources.KINDS)],
            f"s{i}",
        )
        for i in range(count)
    ]


def packed_of(config, pack, given, pixel_type=np.float32, with_labels=False):
    """(placed, batch) of samples that must all fit."""
    placed, left = packing.choose(pack, [packing.Pending(0, s) for s in given], lambda: None)
    assert not left
    return placed, packing.build(config, pack, placed, pixel_type, with_labels)


def rows_of(config, given) -> PackedBatch:
    """Each sample in a row of its own, by make_batch: what packing is compared with."""
    sizes = np.array([len(s.ids) for s in given])

    def padded(arrays, fill):
        return np.stack([np.pad(x, (0, WIDTH - len(x)), constant_values=fill) for x in arrays])

    inputs = {
        "input_ids": padded([s.ids for s in given], 0),
        "attention_mask": np.arange(WIDTH) < sizes[:, None],
        "labels": padded([s.labels for s in given], -100),
    }
    for clip, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        seen = [v for s in given for v in s.images if v.is_video == clip]
        values = np.concatenate([v.patches for v in seen])
        inputs[pixels] = values.astype(np.float32) / 127.5 - 1
        inputs[grid] = np.array([v.grid for v in seen])
    batch = q3.make_batch(config, **inputs, pad=False)

    # Padded, and with a second, empty row of patches: one program serves both kinds of batch.
    def two_rows(x):
        out = np.zeros((2, PACK.vision_length, *x.shape[1:]), x.dtype)
        out[0, : len(x)] = x
        return out

    batch = batch.replace(vision=jax.tree.map(two_rows, batch.vision))
    single = PackedBatch(batch, padded([s.weights for s in given], 0))
    return packing.with_segment_bounds(single, 0, 0)


def only(packed, row, start, size) -> PackedBatch:
    """A batch whose loss is that of one sample."""
    kept = np.zeros_like(packed.weights)
    at = slice(start, start + size)
    kept[row, at] = packed.weights[row, at]
    return packed.replace(weights=kept)


@functools.cache
def model(moe):
    """(flat weights, config, jitted gradients of one micro batch)."""
    raw = tiny.config_dict("golden", moe)
    params, config = ours.build(golden_io.Golden(raw, tiny.weights(raw, 0), {}, {}))
    weights, unflatten = param_groups.flatten(q3.stack_layers(params))

    # At level 0 a program compiles in half the time, and its numbers are as good.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(weights, packed):
        one = jax.tree.map(lambda x: x[None], packed)
        key = jax.random.key(0)
        grads, sums, totals = ours_train.gradients(
            weights, lambda w, k: unflatten(w), config, one, SETTINGS, key
        )
        return train_step.total_loss(sums, totals, SETTINGS), grads

    return weights, config, run


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_packed_sample_learns_what_it_learns_alone(moe):
    """Loss and every gradient, sample by sample: text, pictures, clips and both, in one batch."""
    weights, config, run = model(moe)
    given = samples(config, 5)
    other = train_sources.make(config, np.random.default_rng(9), ((1, 8, 16),), "beside them")
    (_, *placed), packed = packed_of(config, PACK, [other, *given])
    single = rows_of(config, given)
    assert jax.tree.map(np.shape, packed) == jax.tree.map(np.shape, single)
    assert {p.row for p in placed} == {0, 1, 2} and sum(p.start > 0 for p in placed) > 2
    assert {at // PACK.vision_length for p in placed for s in p.spots for at, _ in s} == {0, 1}
    for number, (sample, row, start, _) in enumerate(placed):
        loss, grads = run(weights, only(packed, row, start, len(sample.ids)))
        want, slopes = run(weights, only(single, number, 0, len(sample.ids)))
        assert abs(loss - want) < 1e-5 * abs(want), sample.name
        largest = max(float(np.abs(s).max()) for s in slopes.values())
        for name, slope in slopes.items():
            # A key's bias has no gradient but rounding, a text none in the vision tower.
            bound = max(3e-5 * float(np.abs(slope).max()), 1e-7 * largest)
            assert np.abs(grads[name] - slope).max() < bound, (sample.name, name)


def test_a_program_is_compiled_for_few_or_many_segments(monkeypatch):
    """On a GPU the host counts samples and images a row; micro batches of a step have one bound."""
    config = q3.Config.from_hf(tiny.config_dict())
    (placed, packed) = packed_of(config, PACK, samples(config, 7, seed=1))
    rows = [p.row for p in placed]
    patch_rows = [
        at // PACK.vision_length
        for p in placed
        for image, spot in zip(p.sample.images, p.spots, strict=True)
        for at, count in spot
        for _ in range(count // (image.grid[1] * image.grid[2]))
    ]
    most = max(map(rows.count, rows)), max(map(patch_rows.count, patch_rows))
    assert packing.most_segments(packed) == most and min(most) > 1
    assert global_batches.bounded(packed, [packed]) is packed
    monkeypatch.setattr(global_batches, "platform", lambda: "gpu")
    few = global_batches.bounded(packed, [packed])
    bounds = tuple(map(segment_bound, most))
    assert (few.batch.segments, few.batch.vision.frames) == bounds
    many = packing.with_segment_bounds(packed, 64, 0)
    for batch in packing.for_one_program([few, many]):
        assert (batch.batch.segments, batch.batch.vision.frames) == (64, 0)
    assert [segment_bound(n) for n in (1, 8, 9, 64, 65)] == [8, 8, 64, 64, 0]


def test_what_a_batch_holds():
    """Tables, positions and rows of every sample are those that it has alone; padding is empty."""
    config = q3.Config.from_hf(tiny.config_dict())
    given = samples(config, 7, seed=1)
    named = [
        np.arange(100 * i, 100 * i + sum(len(v.patches) for v in s.images) // 4)
        for i, s in enumerate(given)
    ]
    given = [dataclasses.replace(s, vision_labels=n) for s, n in zip(given, named)]
    # A first token that is learned: alone there is nothing to say it from, so here there is not.
    given[1].labels[0], given[1].weights[0] = given[1].ids[0], 1.0
    pack = dataclasses.replace(PACK, rows=3, vision_length=128)
    placed, packed = packed_of(config, pack, given, np.uint8, with_labels=True)
    batch, seen = packed.batch, packed.batch.vision
    assert seen.pixels.dtype == np.uint8 and seen.pixels.shape[:2] == (2, 128)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
    used = np.zeros(packed.weights.shape, int)
    for number, (sample, row, start, _) in enumerate(placed):
        at = (row, slice(start, start + len(sample.ids)))
        used[at] += 1
        np.testing.assert_array_equal(batch.tokens[at], sample.ids)
        np.testing.assert_array_equal(batch.positions[:, at[0], at[1]], sample.positions)
        np.testing.assert_array_equal(batch.labels[at][1:], sample.labels[1:])
        np.testing.assert_array_equal(packed.weights[at][1:], sample.weights[1:])
        assert batch.labels[row, start] == -100 and packed.weights[row, start] == 0
        assert len(set(batch.segment_ids[at])) == 1
        merged = batch.vision_rows[at][np.isin(sample.ids, (tiny.IMAGE_PAD, tiny.VIDEO_PAD))]
        np.testing.assert_array_equal(packed.vision_labels[merged], named[number])
        patches = (merged[:, None] * 4 + np.arange(4)).reshape(-1)
        if not len(patches):
            continue
        pixels = np.concatenate([v.patches for v in sample.images])
        want = make_vision(config, pixels, [v.grid for v in sample.images], pad=False)
        for name in ("pixels", "pos_index", "pos_weight", "coords"):
            np.testing.assert_array_equal(getattr(flat, name)[patches], getattr(want, name))
        first = patches[want.lo] % 128  # frames lie whole in a row, and see themselves alone
        np.testing.assert_array_equal(flat.lo[patches], first)
        np.testing.assert_array_equal(flat.hi[patches] - flat.lo[patches], want.hi - want.lo)
    assert used.max() == 1
    np.testing.assert_array_equal(used > 0, batch.segment_ids > 0)
    assert (batch.labels[used == 0] == -100).all() and not packed.weights[used == 0].any()
    stats = packing.fill_of(pack, placed)
    assert stats["fill"] == used.mean() and stats["samples"] == 7
    assert stats["vision_fill"] == (flat.hi > flat.lo).mean()
    assert stats["tokens"] == used.sum() and stats["patches"] == (flat.hi > flat.lo).sum()
    assert stats["patch_pairs"] == (flat.hi - flat.lo).sum()
    lengths = [np.bincount(row)[1:] for row in batch.segment_ids]
    assert stats["pairs"] == sum(int((n * (n + 1) // 2).sum()) for n in lengths)


def test_first_fit_over_a_lookahead():
    """Samples go to the first row with room; those that do not fit wait, at most lookahead of them."""
    config = q3.Config.from_hf(tiny.config_dict())
    base = samples(config, 1)[0]
    sizes = [6, 7, 3, 9, 8, 4, 2, 1]

    def of(i, size):
        parts = {k: np.resize(getattr(base, k), size) for k in ("ids", "labels", "weights")}
        return dataclasses.replace(
            base, name=str(i), positions=np.zeros((3, size), np.int32), **parts
        )

    coming = iter([packing.Pending(i, of(i, size)) for i, size in enumerate(sizes)])
    pack = recipe.Pack(rows=2, length=10, vision_rows=0, lookahead=2)
    placed, left = packing.choose(pack, [], lambda: next(coming, None))
    assert [(p.sample.name, p.row, p.start) for p in placed] == [
        ("0", 0, 0),
        ("1", 1, 0),
        ("2", 0, 6),
    ]
    assert [w.place for w in left] == [3, 4]
    placed, left = packing.choose(pack, left, lambda: next(coming, None))
    assert [(p.sample.name, p.row) for p in placed] == [("3", 0), ("4", 1), ("6", 1), ("7", 0)]
    assert [w.sample.name for w in left] == ["5"]
    packed = packing.build(config, pack, placed, np.uint8, with_labels=True)
    assert packed.batch.vision is None and packed.vision_labels is None


def test_clips_go_over_several_rows_and_pictures_do_not():
    pack = recipe.Pack(rows=1, length=99, vision_rows=3, vision_length=40)
    room = packing.FreeSpace(pack)
    assert room.fit_frames((1, 4, 4)) == [(0, 16)]
    assert room.fit_frames((4, 4, 4)) == [(16, 16), (40, 32), (80, 16)]
    assert room.fit_frames((1, 6, 6)) is None
    assert room.fit_frames((1, 2, 4)) == [(32, 8)]
    assert packing.FreeSpace(pack).fit_frames((6, 4, 4))
    assert packing.FreeSpace(pack).fit_frames((7, 4, 4)) is None


def test_normalised_pixels_in_a_batch_of_bytes_are_refused():
    config = q3.Config.from_hf(tiny.config_dict())
    (sample,) = [s for s in samples(config, 2) if s.images]
    visual = sample.images[0]
    wrong = dataclasses.replace(visual, patches=visual.patches / np.float32(255))
    with pytest.raises(InputError, match="pixels are float32, expected uint8"):
        packed_of(config, PACK, [dataclasses.replace(sample, images=(wrong,))], np.uint8)
