"""Metrics equal the harnesses' own code on written cases; names, references and intervals are checked."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.scores.interval import interval
from qwen3vl_jax.scores.metrics import METRICS, metric_of

CASES = json.loads((Path(__file__).parent / "cases.json").read_text())
BOX = {"bbox_2d": [100, 100, 300, 300]}


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_those_of_the_harness(name):
    """200 answers each, among them what cannot be read; see the head of cases.json."""
    assert len(CASES[name]) == 200
    score = metric_of(name, "metric")
    found = [score(answer, references, question) for answer, references, question, _ in CASES[name]]
    assert found == [pytest.approx(wanted, abs=1e-12) for *_, wanted in CASES[name]]


@pytest.mark.parametrize("name", ["iou", "tiou"])
@pytest.mark.parametrize("level", ["0.3", ".5", "0.70", "1"])
def test_a_threshold_counts_hits(name, level):
    """1 from T on, else 0, and none where nothing is read."""
    score, hit = metric_of(name, ""), metric_of(f"{name}@{level}", "")
    for answer, references, question, _ in CASES[name]:
        value = score(answer, references, question)
        wanted = None if value is None else float(value >= float(level))
        assert hit(answer, references, question) == wanted


def test_the_best_reference_counts_and_numbers_are_texts():
    """Several references are alternatives; a reference may be a JSON number."""
    assert metric_of("iou", "")("[100, 100, 300, 300]", [{"bbox_2d": [0, 0, 9, 9]}, BOX], "") == 1
    assert metric_of("exact", "")("7", [12, 7], "") == 1
    assert metric_of("relaxed", "")("7.1", [7], "") == 1


def test_a_text_reference_is_read_as_an_answer():
    """As the last turn of a training record has it."""
    for name, text in {
        "iou": '[{"bbox_2d": [100, 100, 300, 300], "label": "cat"}]',
        "tiou": "It happens in 2.5 - 7 seconds.",
        "choice": "B. dog",
    }.items():
        assert metric_of(name, "")(text, [text], "Which?\nA. cat\nB. dog") == 1
    assert metric_of("point", "")('{"point_2d": [200, 300]}', ["[100, 100, 300, 300]"], "") == 1


def test_the_last_list_of_options_counts_and_without_one_they_are_a_to_d():
    """An example before the question has options of its own."""
    question = "Example: which?\nA. cat\nB. dog\nC. cow\nAnswer: A\nWhich?\nA) left\nB) right\n"
    assert metric_of("choice", "")("right", ["B"], question) == 1
    with pytest.raises(InputError, match="one of A, B;"):
        metric_of("choice", "")("C", ["C"], question)
    assert metric_of("choice", "")("The answer is D.", ["D"], "Which one?") == 1
    assert metric_of("choice", "")("", ["D"], "Which one?") is None


@pytest.mark.parametrize(
    "name", ["", "ANLS", "anls@0.5", "iou@0", "iou@2", "iou@", "iou@x", "bleu", 3, None, ["iou"]]
)
def test_unknown_names_are_refused(name):
    """With the key, and the names that there are."""
    with pytest.raises(InputError, match=r"^--metric: got .*, expected exact, relaxed, anls"):
        metric_of(name, "--metric")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("exact", {"text": "x"}),
        ("anls", True),
        ("choice", "E"),
        ("choice", "either"),
        ("iou", 5),
        ("iou", "no box"),
        ("iou", {"bbox_2d": [1, 2, 3]}),
        ("iou", {"bbox_2d": [1, 2, 3, "4"]}),
        ("iou", {"bbox_2d": [1, 2, 3, 1001]}),
        ("iou", {"bbox_2d": [30, 2, 3, 10]}),
        ("iou", {"bbox_2d": [1, 2, 3, 4], "bbox_type": "real"}),
        ("iou", {"bbox_2d": [1, 2, 3, 4], "bbox_type": "real", "width": 0, "height": 9}),
        ("iou", {"bbox_2d": [1, 2, 30, 4], "bbox_type": "real", "width": 20, "height": 9}),
        ("iou", {"bbox_2d": [1, 2, 3, 4], "bbox_type": "norm"}),
        ("iou", {"bbox_2d": [1, 2, 3, 4], "label": "cat"}),
        ("point", {"point_2d": [1, 2]}),
        ("tiou", {"start": 3}),
        ("tiou", {"start": 3, "end": 3}),
        ("tiou", {"start": "3", "end": 4}),
        ("tiou", "soon"),
    ],
)
def test_references_that_say_nothing_are_refused(name, reference):
    """Whatever the answer is: a wrong reference is no wrong answer."""
    for answer in ("", "[1, 2, 3, 4]", "3 - 4", "A"):
        with pytest.raises(InputError, match=r"^got .*, expected "):
            metric_of(name, "")(answer, [reference], "")


def test_a_function_of_ones_own(monkeypatch):
    """It gets answer, references and question; what it raises, or gives out of range, is named."""
    seen, gives = [], dict[str, object](value=0.25)

    def call(*given):
        seen.append(given)
        return gives["value"]

    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(call=call, raises=lambda a: 1))
    score = metric_of("python:own:call", "")
    assert score("a", ("b", "c"), "q") == 0.25 and seen == [("a", ["b", "c"], "q")]
    gives["value"] = None
    assert score("a", ["b"], "q") is None
    for wrong in (1.5, -0.1, float("nan"), "much"):
        gives["value"] = wrong
        with pytest.raises(InputError, match="python:own:call"):
            score("a", ["b"], "q")
    with pytest.raises(InputError, match="python:own:raises raised TypeError"):
        metric_of("python:own:raises", "")("a", ["b"], "q")
    for name in ("python:own:none", "python:no_such:f", "python:", "python:own"):
        with pytest.raises(InputError, match="that can be imported"):
            metric_of(name, "metric")


def test_wilson_bounds_solve_the_equation_they_come_from():
    """|mean - p| = z sqrt(p (1 - p) / n), and the interval of 8 of 10, as published (0.4902 to 0.9433)."""
    for ones, n in ((0, 7), (8, 10), (499, 500), (5, 5)):
        low, high, method = interval([1.0] * ones + [0.0] * (n - ones))
        assert method == "Wilson"
        for p in (low, high):
            if 1e-9 < p < 1 - 1e-9:
                assert abs(ones / n - p) == pytest.approx(1.959964 * (p * (1 - p) / n) ** 0.5)
    low, high, _ = interval([1.0] * 8 + [0.0] * 2)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


def test_bootstrap_is_the_normal_interval_of_many_scores():
    """Within a tenth of its width, and the same each time."""
    scores = np.random.default_rng(3).uniform(size=400).tolist()
    low, high, method = interval(scores)
    half, mean = 1.96 * float(np.std(scores)) / 20, float(np.mean(scores))
    assert method == "bootstrap" and interval(scores) == (low, high, method)
    assert low == pytest.approx(mean - half, abs=half / 10)
    assert high == pytest.approx(mean + half, abs=half / 10)
