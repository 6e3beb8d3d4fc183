"""Evaluation by generation: what is asked, how it is read, and which answers are right."""

from types import SimpleNamespace

import numpy as np
import pytest
import toy_checkpoint as toy
from chats import calls, picture, said, user

from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.scores.metrics import metric_of
from qwen3vl_jax.training import evaluate
from qwen3vl_jax.training.data import make_samples
from qwen3vl_jax.training.recipe import Data, Pack


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    """A processor with a small vocabulary and the template of Thinking models."""
    folder = tmp_path_factory.mktemp("toy")
    return Processor.from_pretrained(toy.save(folder, template=toy.RELEASED_TEMPLATES["thinking"]))


@pytest.fixture
def generated(monkeypatch, proc):
    """The batches that were asked; .texts are the answers that come."""
    seen = SimpleNamespace(batches=[], texts=[])

    def generate(params, cfg, batch, **options):
        seen.batches.append(batch)
        rows = [proc.tokenizer.encode(text) for text in seen.texts[: len(batch.tokens)]]
        seen.texts = seen.texts[len(rows) :]
        lengths = np.array([len(row) for row in rows])
        tokens = np.array([np.pad(row, (0, lengths.max() - len(row))) for row in rows])
        return SimpleNamespace(tokens=tokens, lengths=lengths)

    monkeypatch.setattr(evaluate, "generate", generate)
    return seen


def answers(proc, records, data=Data()):  # noqa: B008 frozen
    named = [(f"r:{i}", {"messages": messages}) for i, messages in enumerate(records)]
    return evaluate.answer({}, proc, data, named, 9, lambda: None)


THOUGHT = "<think>\nwell\n</think>\n\n4"
CROP, MOVE = calls("crop", x=1, y=2), calls("move", x=1)
CASES = {  # name -> (the record's answer, what the model writes, whether that is right)
    "reasoning": (said(THOUGHT), "well\n</think>\n\n4", True),
    "other reasoning": (said("4", reasoning_content="hm"), "well\n</think>\n\n4", True),
    "another answer": (said(THOUGHT), "well\n</think>\n\n5", False),
    "cut off while thinking": (said(THOUGHT), "4", False),
    "a call": (
        CROP,
        '</think>\n<tool_call>\n{"name": "crop", "arguments": {"y": 2, "x": 1}}\n</tool_call>',
        True,
    ),
    "another call": (
        CROP,
        '</think>\n<tool_call>\n{"name": "crop", "arguments": {"x": 1}}\n</tool_call>',
        False,
    ),
    "no call": (MOVE, "</think>\n", False),
    "a call that is not asked": (
        said("4"),
        '</think>\n4\n<tool_call>\n{"name": "move", "arguments": {}}\n</tool_call>',
        False,
    ),
}


def test_which_answers_are_right(proc, generated):
    """Reasoning does not count, calls of tools do, whatever the order of their arguments."""
    generated.texts = [text for _, text, _ in CASES.values()]
    got, refused = answers(proc, [[user("q"), target] for target, _, _ in CASES.values()])
    assert not refused
    assert {case: a.exact for case, a in zip(CASES, got)} == {
        c: r for c, (_, _, r) in CASES.items()
    }


def test_questions_are_read_as_the_recipe_says(proc, generated):
    """As large as in training; `train` is no part of a message; a missing picture costs one record."""
    image = picture(64, 48)
    data = Data(max_pixels=1024)
    bad = {"type": "image", "image": "/none/such.png"}
    asked = [
        [user(image, "a"), said("b", train=True)],
        [user(bad), said("c")],
        [user("d"), said("e")],
    ]
    generated.texts = ["</think>\n\nb", "</think>\n\nno"]
    got, refused = answers(proc, asked, data)
    assert [(a.name, a.exact) for a in got] == [("r:0", True), ("r:2", False)]
    assert [name for name, _ in refused] == ["r:1"] and "/none/such.png" in refused[0][1]
    trained = make_samples.SampleMaker(proc, data, Pack())("r:0", {"messages": asked[0]})
    tokens = np.asarray(generated.batches[0].tokens)[0]
    count = (trained.ids == proc.config.image_token_id).sum()
    assert (tokens == proc.config.image_token_id).sum() == count
    assert count < len(proc.inputs([user(image)])["input_ids"][0]) / 2


def test_answers_end_between_two_groups(proc, generated, monkeypatch):
    """Where SIGTERM came, what is left is not asked."""
    monkeypatch.setattr(evaluate, "ROWS", 1)
    generated.texts, records = ["x", "y"], [("r", {"messages": [user("q"), said("x")]})] * 2

    def check():
        if generated.batches:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate.answer({}, proc, Data(), records, 9, check)
    assert generated.texts == ["y"]


def test_scores_of_answers_and_of_records_that_have_none():
    """What the metric cannot read is 0; a record whose own answer it cannot read is named and has none."""
    box, question = '{"bbox_2d": [0, 0, 500, 500]}', "Where?"
    rows = [("a", box, box), ("b", box, "nowhere"), ("c", "nowhere", box)]
    given = [evaluate.Answered(name, question, *texts) for name, *texts in rows]
    seen = []
    logger = SimpleNamespace(refused=seen.extend)
    found = evaluate.scored(given, metric_of("iou", ""), logger)
    assert [(a.name, a.score) for a in found] == [("a", 1.0), ("b", 0.0), ("c", None)]
    ((name, reason),) = seen
    assert name == "c" and reason.startswith("evaluate.metric: got 'nowhere', expected {")
