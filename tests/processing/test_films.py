"""The demo's clips: what is composed, asked and answered, and how training rows hold them."""

import numpy as np
import pytest

import qwen3vl_jax as q3
from demo import evaluate, examples, films, scans, tasks
from qwen3vl_jax.errors import InputError

CHECKPOINT = evaluate.CHECKPOINT


@pytest.fixture(scope="module")
def proc():
    """The processor of the bundled checkpoint."""
    return q3.Processor.from_pretrained(CHECKPOINT)


def composed(count=60, part="held_out", **options):
    """Clips of every length."""
    rng = np.random.default_rng(3)
    return [films.compose(rng, scans.load(part), **options) for _ in range(count)]


def test_digits_appear_and_stay():
    """Digits are added pair by pair, ink stands in their boxes alone, and frames of a pair differ."""
    clips = composed()
    assert {len(film.pairs) for film in clips} == {2, 3, 4, 5, 6}
    assert {len(film.pairs[-1].labels) for film in clips} == {1, 2, 3, 4}
    assert any(len(film.pairs[0].labels) for film in clips)
    for film in clips:
        assert film.frames.dtype == np.uint8 and len(film.frames) == 2 * len(film.pairs)
        assert all((a != b).any() for a, b in zip(film.frames[::2], film.frames[1::2]))
        assert len(films.digits_once(film)) >= 1
        before: set[tuple[int, ...]] = set()
        for frame, pair in zip(film.frames[::2], film.pairs, strict=True):
            assert np.array_equal(frame, pair.pixels)
            digits = {(*cell, label) for cell, label in zip(pair.cell.tolist(), pair.labels)}
            assert before <= digits
            before = digits
            grey = frame.astype(float).mean(-1)
            outside = np.ones_like(grey, bool)
            for x0, y0, x1, y1 in pair.boxes.astype(int):
                outside[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3] = False
                assert np.ptp(grey[y0:y1, x0:x1]) > 40
            assert not outside.any() or np.ptp(grey[outside]) < 100  # grain and shade alone


def test_clips_follow_from_their_rng():
    """The same rng twice gives the same frames and truth; training clips have snapped sides."""
    options = {"part": "train", "snap": True, "distort": True, "fps": 1.3}
    for a, b in zip(composed(**options), composed(**options), strict=True):
        assert np.array_equal(a.frames, b.frames) and films.times(a) == films.times(b)
        assert all(np.array_equal(x.labels, y.labels) for x, y in zip(a.pairs, b.pairs))
        assert a.frames.shape[1] % 32 == 0 and a.frames.shape[2] % 32 == 0
        assert a.frames[..., 0].size <= 256 * 256


@pytest.mark.parametrize(
    ("fps", "first"), [(2.0, ["0.2", "1.2", "2.2"]), (1.0, ["0.5", "2.5", "4.5"]), (0.8, ["0.6"])]
)
def test_times_are_those_of_the_prompt(proc, fps, first):
    """Every frame is used, at the size that was planned, and times are spelled as in the prompt."""
    for film in composed(20, fps=fps):
        exam = evaluate.Exam(film.pairs[-1], tasks.Turn("when", "?", ""), film)
        made = proc.inputs(evaluate.conversation(exam))
        text = proc.decode(made["input_ids"][0], skip_special_tokens=False)
        stamps = [part.split(" seconds>")[0] for part in text.split("<") if " seconds>" in part]
        assert stamps == films.times(film) and len(set(stamps)) == len(film.pairs)
        assert stamps[: len(first)] == first[: len(stamps)]
        assert made["video_metadata"][0].indices == tuple(range(len(film.frames)))
        cells = [round(side / 32) for side in film.frames.shape[1:3]]
        assert made["video_grid_thw"].tolist() == [[len(film.pairs), *(2 * n for n in cells)]]


def test_answers_say_what_was_composed():
    """Every wording names a digit that is there once; the answer is when it is first seen."""
    rng = np.random.default_rng(0)
    starts = set()
    for film in composed():
        for wording in range(len(tasks.WHEN)):
            turn = tasks.ask_when(rng, film, wording=wording)
            assert turn.digit is not None and "{" not in turn.question
            assert str(turn.digit) in turn.question or tasks.ONE[turn.digit] in turn.question
            assert (film.pairs[-1].labels == turn.digit).sum() == 1
            place = films.times(film).index(turn.answer)
            seen = [turn.digit in pair.labels for pair in film.pairs]
            assert seen == [False] * place + [True] * (len(seen) - place)
            starts.add(place)
    assert starts == set(range(films.MOST_PAIRS))


def test_training_rows_are_what_the_processor_makes(proc):
    """A clip and a question give the tokens and patches in training that they give in use."""
    words, rng = examples.Words(str(CHECKPOINT)), np.random.default_rng(1)
    for film in [*composed(8, snap=True), *composed(8, snap=True, fps=0.9)]:
        row = examples.make_row(rng, words, film, 256)
        turn = tasks.ask_when(rng, film)
        made = proc.inputs(evaluate.conversation(evaluate.Exam(film.pairs[-1], turn, film)))
        ids = made["input_ids"][0].tolist()
        prompt = [*words("<|im_start|>user\n"), *examples._film_seen(words, film).ids]
        assert ids == prompt + examples.spoken(words, turn, first=True)[0]
        at = row.ids.index(words.video) - prompt.index(words.video)  # behind the system's turn
        assert row.ids[at : at + len(prompt)] == prompt
        assert made["video_grid_thw"][0].tolist() == list(examples.grid_of(film))
        patches = examples.to_patches(film.frames) / np.float32(127.5) - 1
        assert np.abs(made["pixel_values_videos"] - patches).max() < 1e-6
        # labels: the cells of each pair name what it shows, then each digit is asked for
        tokens, labels = np.array(row.ids), np.array(row.labels)
        for named, pair in zip(
            labels[tokens == words.video].reshape(len(film.pairs), -1), film.pairs, strict=True
        ):
            digits = {words.seen[label] for label in pair.labels}
            assert set(named) - {words.nothing} <= digits
            assert (named != words.nothing).any() == bool(digits)
        answers = (labels >= 0) & (tokens != words.video)
        ends = answers & (tokens == proc.tokenizer.eos_id)
        assert np.array_equal(labels[answers], tokens[answers])
        assert ends.sum() == len(films.digits_once(film))


def test_every_clip_fits_its_row():
    """The longest clip leaves room for its first question in a row of 160 tokens, not in one of 96."""
    words, rng = examples.Words(str(CHECKPOINT)), np.random.default_rng(0)
    for film in composed(200, snap=True, fps=0.8):
        row = examples.make_row(rng, words, film, 160)
        assert len(row.ids) <= 160 and row.ids.count(words("<|im_end|>")[0]) >= 2
    with pytest.raises(InputError, match="length is 96, too short to ask about a video"):
        for film in composed(snap=True):
            examples.make_row(rng, words, film, 96)


def test_figure_counts_seconds(proc):
    """Held-out clips are scored by the exact text, and only if there are some."""
    exams = evaluate.compose_clips(5, seed=1)
    assert [e.turn for e in exams] == [e.turn for e in evaluate.compose_clips(5, seed=1)]
    said = [(exam, exam.turn.answer) for exam in exams]
    scores = evaluate.score([*said, (exams[0], "about " + exams[0].turn.answer)])
    assert (scores["appearances timed"].right, scores["appearances timed"].total) == (5, 6)
    assert "appearances timed" not in evaluate.score([])
    assert set(scores) == set(evaluate.BOUNDS)
    params, _ = q3.load(CHECKPOINT, dtype="float32")
    assert len(list(evaluate.answer(params, proc, exams))) == 5
