"""Metrics of answers by name, as the evaluation harnesses compute them (tests/scores/cases.json).

A metric scores an answer against one reference, 0 to 1, or gives None for an answer that it cannot read.
"""

import importlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3vl_jax.errors import InputError, one_line, shown
from qwen3vl_jax.scores import grounding

# (answer, references, question) -> the best score over the references
Score = Callable[[str, Sequence[Any], str], float | None]
PYTHON = "python:"
_LEVEL = re.compile(r"0?\.\d*[1-9]\d*|1(\.0+)?")
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.*?)\s*$", re.MULTILINE)
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# What VLMEvalKit takes as a refusal to answer.
_REFUSED = re.compile(
    r"Sorry, I can't help with images of people yet\.|I can't process this file\."
    "|I'm sorry, but without the image provided|Cannot determine the answer"
)


def exact(answer: str, reference: Any, question: str = "") -> float:
    """1 for the same text but for blanks around it; lmms-eval's exact_match (lmms_eval.api.metrics)."""
    return float(answer.strip() == _text(reference).strip())


def relaxed(answer: str, reference: Any, question: str = "") -> float:
    """1 for a number within 5 % of the reference's, else for the same text, whatever its case: ChartQA.

    arXiv 2203.10244, section 5.1; VLMEvalKit, vlmeval.dataset.utils.vqa_eval: "5%" is 0.05.
    """
    answer, target = answer.strip(), _text(reference)
    number, wanted = _number(answer), _number(target)
    if number is not None and wanted:
        return float(abs(number - wanted) / abs(wanted) <= 0.05)
    return float(answer.lower() == target.lower())


def anls(answer: str, reference: Any, question: str = "") -> float:
    """1 minus the edit distance over the longer length, 0 for less than 0.5: DocVQA, InfoVQA.

    arXiv 1907.00490; lmms-eval, lmms_eval.api.metrics: case and blanks are no edits, but count as length.
    """
    target = _text(reference)
    length = max(len(answer.upper()), len(target.upper()), 1)
    a, b = (" ".join(text.lower().split()) for text in (answer, target))
    # At least so many edits: an answer that goes on and on is not compared.
    edits = abs(len(a) - len(b))
    value = 1 - (edits if edits > length / 2 else _distance(a, b)) / length
    return value if value >= 0.5 else 0.0


def choice(answer: str, reference: Any, question: str = "") -> float | None:
    """1 for the option of the reference, given by letter or text, else 0.

    VLMEvalKit, vlmeval.utils.matching_util, without a judge model. The options are the question's lines
    "A. text", "B. text", ..; without such lines A to D.
    """
    options: dict[str, str] = {}
    for letter, text in _OPTION.findall(question):
        options = {} if letter == "A" else options
        if letter == string.ascii_uppercase[len(options) : len(options) + 1]:
            options[letter] = text
    options = options if len(options) > 1 else dict.fromkeys("ABCD", "")
    if (wanted := _chosen(_text(reference), options)) not in options:
        known = f"one of {', '.join(options)}; the question lists the options, a line each"
        raise InputError(f"got {shown(reference)}, expected {known}")
    found = _chosen(answer, options)
    return None if found is None else float(found == wanted)


METRICS: Mapping[str, Callable[[str, Any, str], float | None]] = {
    **{metric.__name__: metric for metric in (exact, relaxed, anls, choice)},
    **{metric.__name__: metric for metric in (grounding.iou, grounding.point, grounding.tiou)},
}


def metric_of(name: Any, key: str) -> Score:
    """The metric of a name: of METRICS, iou@T or tiou@T (1 from T on, else 0), python:module:function.

    A function is called with (answer, references, question). key: named in errors. Raises InputError, as a
    metric does for references that it cannot read.
    """
    base, at, level = str(name).partition("@")
    if str(name).startswith(PYTHON):
        return _custom(name, key)
    if base not in METRICS or (at and not (base in ("iou", "tiou") and _LEVEL.fullmatch(level))):
        known = f"{', '.join(METRICS)}, iou@T or tiou@T (as iou@0.5), python:module:function"
        raise InputError(f"{key}: got {shown(name)}, expected {known}")

    def score(answer: str, references: Sequence[Any], question: str) -> float | None:
        scores = [METRICS[base](answer, each, question) for each in references]
        best = max((value for value in scores if value is not None), default=None)
        return best if best is None or not at else float(best >= float(level))

    return score


def _custom(name: str, key: str) -> Score:
    module, _, function = name.removeprefix(PYTHON).partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        expected = "expected python:module:function that can be imported"
        raise InputError(f"{key}: got {name!r}, {expected}: {one_line(error)}") from None

    def score(answer: str, references: Sequence[Any], question: str) -> float | None:
        try:
            value = call(answer, list(references), question)
            found = None if value is None else float(value)
        except Exception as error:
            raise InputError(f"{name} raised {type(error).__name__}: {one_line(error)}") from error
        if found is not None and not 0 <= found <= 1:
            raise InputError(f"{name}: got {shown(value)}, expected a number from 0 to 1, or None")
        return found

    return score


def _text(reference: Any) -> str:
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        raise InputError(f"got {shown(reference)}, expected a text or a number")
    return str(reference)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _distance(a: str, b: str) -> int:
    """The number of characters to insert, delete or replace (Levenshtein)."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def _chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer gives, "Z" for one that refuses; None where no rule finds one."""
    if _REFUSED.search(answer):
        return "Z"
    words = answer.translate(_MARKS).split()
    letters = [letter for letter in options if letter in words]
    # A letter far from the end may be an article.
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    if (found := _STATED.search(answer)) and (letter := found[1].upper()) in options:
        return letter
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer]
    return named[0] if len(named) == 1 else None
