"""Host tables: MRoPE ids, buckets, vision tables, and what make_batch takes and refuses."""

import itertools

import numpy as np
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.processing.batch import BUCKETS, bucket, merge_order

CFG = q3.Config.from_hf(tiny.config_dict())
IMAGE, VIDEO, START, END = (
    tiny.IMAGE_PAD,
    tiny.VIDEO_PAD,
    tiny.VISION_START,
    tiny.VISION_END,
)


def row(name="one_picture", **changes):
    out = {**tiny.inputs(tiny.config_dict(), name), **changes}
    return {k: v for k, v in out.items() if v is not None}


def test_the_golden_example():
    ids = [[9, 9, START, *[IMAGE] * 6, END, 9]]
    positions, delta = q3.rope_index(CFG, ids, [[1, 4, 6]])
    want = ["0 1 2 3 3 3 3 3 3 6 7", "0 1 2 3 3 3 4 4 4 6 7", "0 1 2 3 4 5 3 4 5 6 7"]
    np.testing.assert_array_equal(positions[:, 0], [list(map(int, r.split())) for r in want])
    assert delta.tolist() == [-3]
    padded = [[0] * 4 + ids[0]]
    mask = [[0] * 4 + [1] * 11]
    left, delta = q3.rope_index(CFG, padded, [[1, 4, 6]], attention_mask=mask)
    np.testing.assert_array_equal(left[:, :, 4:], positions)
    assert delta.tolist() == [-3] and (left[:, :, :4] == 0).all()


def test_pictures_and_frames_without_text_between_them():
    ids = [[*[IMAGE] * 2, *[IMAGE] * 3, *[VIDEO] * 2, *[VIDEO] * 2, 9]]
    positions, delta = q3.rope_index(CFG, ids, [[1, 2, 4], [1, 6, 2]], [[2, 2, 4]])
    np.testing.assert_array_equal(positions[0, 0], [0, 0, 2, 2, 2, 5, 5, 7, 7, 9])
    np.testing.assert_array_equal(positions[1, 0], [0, 0, 2, 3, 4, 5, 5, 7, 7, 9])
    np.testing.assert_array_equal(positions[2, 0], [0, 1, 2, 2, 2, 5, 6, 7, 8, 9])
    assert delta.tolist() == [0]


def test_buckets():
    assert BUCKETS[-1] >= 1 << 20  # the model card's 1M
    # Few programs: at most seven sizes between a number and its double, all in whole rows of 8.
    assert all(sum(a < b <= 2 * a for b in BUCKETS) <= 7 for a in BUCKETS)
    assert not any(size % 8 for size in BUCKETS)
    # A size holds whatever is over the one before it: the least of that pays most.
    assert all(b <= 1.12 * (a + 1) for a, b in itertools.pairwise(BUCKETS) if a >= 257)
    assert all(bucket(count) <= 1.12 * count for count in range(257, 1 << 13))
    assert all(b <= 1.5 * a for a, b in itertools.pairwise(BUCKETS))
    assert bucket(1) == BUCKETS[0] and bucket(BUCKETS[3]) == BUCKETS[3]
    assert bucket(BUCKETS[3] + 1) == BUCKETS[4]
    with pytest.raises(q3.InputError, match=str(BUCKETS[-1])):
        bucket(BUCKETS[-1] + 1)


def test_merge_order():
    at_row, at_col = merge_order(4, 6, 2)
    assert list(zip(at_row, at_col, strict=True))[:9] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
        (0, 4),
    ]
    assert len(set(zip(at_row.tolist(), at_col.tolist(), strict=True))) == 24


def test_vision_tables():
    grid = [[1, 4, 6], [3, 2, 2]]
    pixels = np.random.default_rng(0).normal(size=(24 + 12, 96))
    vision = q3.make_vision(CFG, pixels, grid, pad=False)
    np.testing.assert_array_equal(vision.lo, [0] * 24 + [24] * 4 + [28] * 4 + [32] * 4)
    np.testing.assert_array_equal(vision.hi, [24] * 24 + [28] * 4 + [32] * 4 + [36] * 4)
    np.testing.assert_allclose(vision.pos_weight.sum(1), 1, atol=1e-6)
    corner = CFG.vision.num_position_embeddings - 1
    assert vision.pos_index[0, 0] == 0 and corner in vision.pos_index[23]  # corners are aligned
    last = vision.pos_index[23] == corner
    np.testing.assert_allclose(vision.pos_weight[23][last].sum(), 1, atol=1e-6)
    padded = q3.make_vision(CFG, pixels, grid)
    assert padded.pixels.shape[0] == 4 * BUCKETS[0] and (padded.hi[36:] == 0).all()


def test_what_processors_return_is_taken():
    class Foreign:  # a tensor of another library
        def __init__(self, x):
            self.x = x

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.x, dtype)

    plain = q3.make_batch(CFG, **row())
    foreign = q3.make_batch(CFG, **{k: Foreign(v) for k, v in row().items()}, token_type_ids=None)
    for a, b in ((plain.tokens, foreign.tokens), (plain.vision.pixels, foreign.vision.pixels)):
        np.testing.assert_array_equal(a, b)
    given = q3.make_batch(
        CFG, **row(), position_ids=plain.positions[:, :, : row()["input_ids"].shape[1]]
    )
    np.testing.assert_array_equal(given.positions, plain.positions)
    np.testing.assert_array_equal(given.delta, plain.delta)
    flat = q3.make_batch(CFG, **row("text"), position_ids=np.arange(13)[None] + 5)
    assert (flat.positions[:, 0, :13] == np.arange(13) + 5).all() and flat.delta.tolist() == [5]


def test_rows_point_at_pictures_then_clips():
    inputs = row("clips_and_picture")
    batch = q3.make_batch(CFG, **inputs)
    ids, rows = batch.tokens[0], batch.vision_rows[0]
    np.testing.assert_array_equal(rows[ids == IMAGE], np.arange(6))
    np.testing.assert_array_equal(rows[ids == VIDEO], 6 + np.arange(18))
    assert (rows[(ids != IMAGE) & (ids != VIDEO)] == -1).all()
    pixels = inputs["pixel_values"]
    np.testing.assert_array_equal(batch.vision.pixels[: len(pixels)], pixels)


GRID = np.array([[1, 6, 10]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixel_values": np.zeros((56, 96))}, ["pixel_values", "(60, 96)", "(56, 96)"]),
        ({"pixel_values": np.zeros((60, 90))}, ["pixel_values", "(60, 96)", "(60, 90)"]),
        ({"image_grid_thw": np.array([[1, 6, 8]])}, ["no grid left"]),
        ({"image_grid_thw": np.array([[1, 6, 12]])}, ["15 placeholders", "needs 18"]),
        ({"image_grid_thw": np.array([[1, 3, 20]])}, ["sides", "2"]),
        ({"image_grid_thw": np.array([[1, 6, 0]])}, ["image_grid_thw", "positive"]),
        ({"image_grid_thw": None}, ["no grid left", "image_grid_thw"]),
        (
            {"input_ids": np.full((1, 28), 320), "image_grid_thw": None, "pixel_values": None},
            ["320"],
        ),
        ({"labels": np.zeros((1, 3))}, ["labels", "(1, 3)"]),
        ({"labels": np.full((1, 28), 999)}, ["labels", "999"]),
        ({"inputs_embeds": np.zeros((1, 28, 7))}, ["inputs_embeds", "(1, 28, 40)"]),
        ({"attention_mask": np.zeros((1, 28))}, ["row 0", "no attended"]),
        ({"image_grid_thw": np.array([[1, 6, 10], [1, 2, 2]])}, ["left over", "image"]),
        ({"input_ids": np.full((1, 28), 9)}, ["left over", "image"]),
        ({"attention_mask": np.ones((1, 5))}, ["attention_mask", "(1, 5)"]),
        ({"attention_mask": np.array([[1, 0] * 14])}, ["row 0", "14 runs"]),
        ({"input_ids": np.full(28, 9)}, ["input_ids", "[B T]"]),
        ({"input_ids": [[5, 6], [7]]}, ["input_ids", "one length"]),
        ({"input_ids": [["a"] * 28]}, ["input_ids", "integers"]),
        ({"input_ids": None}, ["input_ids or inputs_embeds"]),
        ({"input_ids": None, "inputs_embeds": np.zeros((1, 28, 40))}, ["left over", "image"]),
        ({"image_grid_thw": [[1, 6], [1]]}, ["image_grid_thw", "one length"]),
        ({"position_ids": np.zeros((2, 1, 28))}, ["position_ids", "(2, 1, 28)"]),
        ({"segment_ids": np.array([[1] * 14 + [2] * 14])}, ["position_ids"]),
        ({"pixel_value": 3}, ["unknown", "pixel_value"]),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(q3.InputError) as error:
        q3.make_batch(CFG, **row(**changes))
    message = str(error.value)
    assert "\n" not in message and all(w in message for w in words), message


def test_numbers_that_would_become_others_are_refused():
    """A token of 64 bits is not cut to 32, and labels and positions are whole numbers."""
    cfg = q3.Config.from_hf(tiny.config_dict())
    for given, words in (
        ({"input_ids": [[5, 2**32 + 5]]}, "outside the vocabulary"),
        ({"input_ids": [[5, 5]], "labels": [[5, 2**32 + 5]]}, "neither -100 nor a token"),
        ({"input_ids": [[5, 5]], "labels": [[5.0, 5.5]]}, "labels: expected integers"),
        ({"input_ids": [[5, 5]], "labels": [[5], [5, 5]]}, "labels: expected rows of one length"),
        ({"input_ids": [[5, 5]], "position_ids": [[0.0, 0.5]]}, "position_ids: expected integers"),
    ):
        with pytest.raises(q3.InputError, match=words):
            q3.make_batch(cfg, **given)


def test_no_grids_may_be_none_or_empty():
    batch = q3.make_batch(CFG, **row("text", image_grid_thw=[], video_grid_thw=np.zeros((0, 3))))
    np.testing.assert_array_equal(batch.tokens, q3.make_batch(CFG, **row("text")).tokens)
    assert batch.vision_rows is None


def test_too_few_and_interrupted_placeholders():
    ids = row()["input_ids"].copy()
    ids[0, 10] = 9
    with pytest.raises(q3.InputError, match=r"5 placeholders.*needs 15"):
        q3.make_batch(CFG, **row(input_ids=ids))
    with pytest.raises(q3.InputError, match="no grid left"):
        q3.make_batch(CFG, input_ids=row()["input_ids"])


def test_segments_are_counted_by_runs():
    """An id that comes again is a segment of its own, so the largest id is no bound."""
    ids = np.ones((1, 20), np.int32)
    again = {"segment_ids": np.arange(20)[None] % 2 + 1, "position_ids": np.zeros((1, 20), int)}
    assert q3.make_batch(CFG, input_ids=ids, **again).segments == 64
    assert q3.make_batch(CFG, input_ids=ids).segments == 8
