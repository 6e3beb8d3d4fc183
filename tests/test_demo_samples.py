"""The demo's data sources for train.py: pure functions of seed and index, whose labels are the answers."""

import pickle

import numpy as np
import pytest

import qwen3vl_jax as q3
from demo import examples, samples, scans, tasks
from demo.examples import CHECKPOINT
from demo.samples import HeldOut, Reverse, Train
from qwen3vl_jax.errors import InputError


@pytest.fixture(scope="module")
def proc():
    """The processor of the bundled checkpoint."""
    return q3.Processor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def drawn():
    """Enough samples for clips, greetings and system turns to be among them."""
    source = Train(seed=3, clips=0.3)
    return [source[i] for i in range(120)]


def same(a, b):
    """Whether two samples are equal in every array."""
    arrays = ("ids", "labels", "weights", "positions", "vision_labels")
    seen = [np.array_equal(x.patches, y.patches) for x, y in zip(a.images, b.images)]
    equal = [np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays]
    return a.name == b.name and len(a.images) == len(b.images) and all(seen + equal)


def test_samples_follow_from_seed_and_index(drawn):
    """Any order, any process: the same index is the same sample; another seed or part is not."""
    again = pickle.loads(pickle.dumps(Train(seed=3, clips=0.3)))
    assert all(same(again[i], drawn[i]) for i in (7, 3, 119, 6))
    for other in (Train(seed=4, clips=0.3), Train(seed=3, clips=0.3, part="held_out")):
        assert not any(same(other[i], drawn[i]) for i in range(5))
    assert len({sample.ids.tobytes() for sample in drawn if sample.images}) > 100
    pictures = [sample.images[0].patches for sample in drawn if sample.images]
    assert 58 <= len({pixels.tobytes() for pixels in pictures}) <= 60  # two in a row share one


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="expected train or held_out"):
        Reverse("test")


def test_labels_are_answers_and_weigh_by_the_root_of_their_length(drawn, proc):
    """Labels stand on their own tokens, decode to answers that end their turn, and weigh sqrt(n)."""
    answers = []
    for sample in drawn:
        told = sample.labels != examples.IGNORE_INDEX
        assert np.array_equal(sample.labels[told], sample.ids[told]) and told.any()
        assert np.array_equal(sample.weights > 0, told)
        text = proc.decode(sample.ids, skip_special_tokens=False)
        turns = text.split("<|im_start|>assistant\n")[1:]
        edges = np.flatnonzero(np.diff(np.pad(told, 1).astype(int))).reshape(-1, 2)
        for turn, (start, end) in zip(turns, edges, strict=True):
            answer = turn.split("<|im_end|>")[0]
            words = proc.decode(sample.labels[start:end], skip_special_tokens=False)
            assert words == answer + "<|im_end|>"
            assert np.isclose(sample.weights[start:end].sum(), (end - start) ** 0.5)
            answers.append(answer)
    assert tasks.INTRODUCTION in answers and len(answers) > 2 * len(drawn)


def test_visuals_lie_where_their_placeholders_are(drawn, proc):
    """uint8 patches of the grid, a name for every merged cell, positions those of the sample alone."""
    words, config = examples.words_of(str(CHECKPOINT)), proc.config
    names = {*words.seen, words.nothing}
    clips = 0
    for sample in drawn:
        seen = np.isin(sample.ids, [words.image, words.video])
        assert len(sample.images) == (1 if seen.any() else 0)
        assert len(sample.vision_labels) == seen.sum() and set(sample.vision_labels) <= names
        grids = {False: None, True: None}
        for visual in sample.images:
            assert visual.patches.dtype == np.uint8 and len(visual.patches) == np.prod(visual.grid)
            assert np.prod(visual.grid) == 4 * seen.sum()
            assert [visual.start, visual.end - 1] == [*np.flatnonzero(seen)[[0, -1]]]
            assert visual.is_video == (visual.grid[0] > 1)
            grids[visual.is_video], clips = [visual.grid], clips + visual.is_video
        positions, _ = q3.rope_index(config, sample.ids[None], grids[False], grids[True])
        assert np.array_equal(positions[:, 0], sample.positions)
    assert 15 < clips < 60


def test_the_first_samples_hold_few_digits():
    """`few` counts samples; after them pictures are as full as ever."""
    source = Train(few=20, clips=0.0)
    words = examples.words_of(str(CHECKPOINT))
    counts = [np.isin(source[i].vision_labels, words.seen).sum() for i in range(60)]
    assert max(counts[:20]) <= 4 < max(counts[20:])


def test_a_length_too_short_to_ask_in_is_named():
    source = Train(length=64)
    with pytest.raises(InputError, match="length is 64, too short"):
        for i in range(60):
            source[i]


def test_records_are_held_out_questions(proc):
    """Chat records that the processor takes; their answers are right; seeds and parts differ."""
    for source in (HeldOut(60, clips=0.2), Reverse("held_out", 60)):
        kept = [source[i] for i in range(len(source))]
        for i in (0, 21):
            (asked, _), (question, told) = source[i]["messages"], kept[i]["messages"]
            assert asked["content"][1] == question["content"][1] and told["role"] == "assistant"
        proc.inputs([record["messages"][:-1] for record in kept[:8]])
    assert {record["messages"][0]["content"][1]["text"] for record in kept} == set(tasks.REVERSE)
    assert {len(record["messages"][1]["content"].split()) for record in kept} >= {2, 3, 4, 6}
    kinds = [HeldOut(60, clips=0.2)[i]["messages"][0]["content"][0]["type"] for i in range(60)]
    assert {"image", "video"} == set(kinds)
    other = [Reverse("train", 40)[i]["messages"][1]["content"] for i in range(20)]
    assert other != [record["messages"][1]["content"] for record in kept[:20]]


def test_scans_of_training_are_never_shown_held_out(monkeypatch):
    """The held-out sources read held-out scans alone."""
    parts = []
    load = scans.load
    monkeypatch.setattr(samples.scans, "load", lambda part: parts.append(part) or load(part))
    HeldOut()[0], Reverse("held_out")[0]
    assert set(parts) == {"held_out"}
