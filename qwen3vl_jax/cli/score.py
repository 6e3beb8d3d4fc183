"""Scores answers against the references of an --input file: a table, a CSV, the worst images.

infer.py --input makes the answers, or they are there (--answers). NAME.scores.csv, the worst first, and
NAME.worst.png go beside them.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from qwen3vl_jax.cli import infer_arguments
from qwen3vl_jax.cli.batch_journal import ERROR, Line, read_lines
from qwen3vl_jax.cli.draw import GRID, Mark, draw_marks, read_marks
from qwen3vl_jax.errors import InputError, shown
from qwen3vl_jax.processing.fetching import MediaRules
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.messages import MediaSource, read_conversation
from qwen3vl_jax.processing.parse_reply import parse_reply
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.chips import allow_gpu_memory
from qwen3vl_jax.runtime.console import Parser, Status, one_line_errors
from qwen3vl_jax.scores.grounding import box_of
from qwen3vl_jax.scores.interval import interval
from qwen3vl_jax.scores.metrics import METRICS, PYTHON, Score, metric_of
from qwen3vl_jax.storage.json_text import MAX_BYTES, read_json, read_regular, write_json
from qwen3vl_jax.storage.paths import argument, kind
from qwen3vl_jax.storage.remote_files import write_atomic

USAGE = "qwen3vl score --input FILE --metric NAME (--output OUT | --answers OUT) [options]"
EXAMPLES = """more options: those of qwen3vl batch; with --answers, --media-root and --allow-hosts
  qwen3vl score --ckpt DIR --input test.jsonl --metric anls --output answers.jsonl --temperature 0
  qwen3vl score --input test.jsonl --metric anls --answers answers.jsonl

a line of test.jsonl: {"id": "a", "messages": [...], "answer": "a text, an object, or a list of them"}
"""
WORST, COLUMNS = 12, 4
# Pixels of an image and of a line, characters of a line, and lines below an image.
WIDTH, HEIGHT, LINE, LETTERS, LINES = 360, 270, 16, 52, 9


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of the input with its references, and how its answer is scored."""

    line: Line
    id: Any
    question: str
    references: Sequence[Any]
    metric: str
    rule: Score
    score: float = 0.0
    answer: str = ""
    note: str = ""  # why there is nothing to score
    is_error: bool = False


def main(argv: list[str] | None = None) -> None:
    """The command line; exits 1 if lines had errors, 2 with one line for bad input."""
    # For python:module:function.
    sys.path.append("")
    with one_line_errors(), Status() as status:
        args, others = _arguments(argv)
        answers = args.answers or args.output
        files = ["--input", str(args.input), "--output", str(answers)]
        options = infer_arguments.arguments([*files, *others], "qwen3vl batch")
        infer_arguments.check(options)
        rules = infer_arguments.media_rules(options)
        cases = read_cases(args.input, args.metric, rules)
        if not args.answers:
            _answer(options, status)
        if args.answers or distributed.is_first():
            cases = score_answers(cases, answers)
            write_report(cases, args.input, answers, rules)
    if any(case.is_error for case in cases):
        sys.exit(1)


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    description = (__doc__ or "").split("\n")[0]
    parser = Parser("qwen3vl score", usage=USAGE, description=description, epilog=EXAMPLES)
    lines: dict[str, Any] = {"type": argument, "metavar": "FILE.jsonl"}
    parser.add_argument("--input", required=True, **lines, help='conversations with an "answer"')
    names = f"{', '.join(METRICS)}, iou@T, tiou@T, or python:module:function"
    parser.add_argument("--metric", metavar="NAME", help=f'of lines without "metric": {names}')
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--output", **lines, help="where the model's answers go; the same command goes on")
    add("--answers", **lines, help="answers that are there; no model is loaded")
    # What is unknown here are options of the answers.
    args, others = super(Parser, parser).parse_known_args(argv)
    for name in (x.partition("=")[0] for x in others if x.startswith("--") and args.answers):
        if name not in ("--media-root", "--allow-hosts"):
            parser.error(f"{name}: means nothing with --answers, leave it out")
    return args, others


def _answer(options: argparse.Namespace, status: Status) -> None:
    """Answers the lines into --output. Raises InputError."""
    out = options.output
    if kind(out) == "file" and not kind(out.with_name(f"{out.name}.partial")):
        advice = f"score it with --answers {out}, or name another file"
        raise InputError(f"--output {out}: is there already; {advice}")
    allow_gpu_memory()
    from qwen3vl_jax.cli import batch

    batch.answer_input(options, status, (*batch.KEYS, "answer", "metric"))


def read_cases(source: Path, metric: str | None, rules: MediaRules) -> list[Case]:
    """Every line with its references. metric: of lines without one. Raises InputError."""
    cases = list[Case]()
    for line in read_lines(source):
        where = f"--input {source}: line {line.number}"
        found = read_json(line.read(source), where)
        if not isinstance(found, dict):
            raise InputError(f"{where}: got {type(found).__name__}, expected an object")
        name: Any = found.get("metric", metric)
        if "metric" in found and str(name).startswith(PYTHON):
            # A data file does not choose what this machine runs.
            raise InputError(
                f"{where}: metric: got {shown(name)}, expected a name; give it as --metric"
            )
        rule = metric_of(name, f"{where}: metric" if "metric" in found else "--metric")
        given, (question, images) = found.get("answer"), _conversation(found)
        references = given if isinstance(given, list) else [given]
        try:
            references = [_with_size(each, images, rules) for each in references]
            if not references or None in references:
                raise InputError(f"got {shown(given)}, expected a reference, or a list of several")
            if not name.startswith(PYTHON):
                rule("", references, question)
        except InputError as e:
            raise InputError(f"{where}: answer: {e}") from None
        number = found.get("id", line.number)
        cases.append(Case(line, number, question, references, name, rule))
    return cases


def score_answers(cases: Sequence[Case], answers: Path) -> list[Case]:
    """The cases with the answers of a file, and their scores. Raises InputError."""
    text = read_regular(answers, f"--answers {answers}", MAX_BYTES)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != len(cases):
        found = f"got {len(lines)} lines, expected the {len(cases)} of --input"
        raise InputError(f"--answers {answers}: {found}; give the answers to that file")
    scored, thinks = list[Case](), b"</think>" in text
    for number, (case, line) in enumerate(zip(cases, lines), 1):
        where = f"--answers {answers}: line {number}"
        row = read_json(line, where)
        if not isinstance(row, dict) or row.get("id") != case.id:
            raise InputError(f"{where}: got {shown(row)}, expected the id {shown(case.id)}")
        if ERROR in row:
            scored.append(dataclasses.replace(case, note=str(row[ERROR]), is_error=True))
            continue
        if not isinstance(said := row.get("text"), str):
            raise InputError(f"{where}: text: got {shown(said)}, expected the answer's text")
        cut = row.get("finish_reason") == "length"
        # Prompts of Thinking models open <think>: without its end an answer is all reasoning.
        said = parse_reply(said, thinks and cut).content
        try:
            value = case.rule(said, case.references, case.question)
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        note = "" if value is not None else "unread" + ", cut off" * cut
        scored.append(dataclasses.replace(case, score=value or 0.0, answer=said, note=note))
    return scored


def write_report(cases: Sequence[Case], source: Path, answers: Path, rules: MediaRules) -> None:
    """Prints the table; writes the CSV and the images beside the answers. Raises InputError."""
    columns = "metric", "lines", "mean", "95 % interval", "by", "errors", "unread"
    table = Table(*columns, caption="errors, and answers that cannot be read, count as 0")
    for name in dict.fromkeys(case.metric for case in cases):
        found = [case for case in cases if case.metric == name]
        values, errors = [case.score for case in found], sum(case.is_error for case in found)
        low, high, method = interval(values)
        unread = sum(bool(case.note) for case in found) - errors
        counts = f"{sum(values) / len(values):.4f}", f"{low:.4f} to {high:.4f}", method
        table.add_row(name, str(len(found)), *counts, str(errors), str(unread))
    Console().print(table)
    worst, text = sorted(cases, key=lambda case: case.score), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("line", "id", "metric", "score", "answer", "expected", "note"))
    for x in worst:
        rows.writerow((x.line.number, x.id, x.metric, x.score, x.answer, _expected(x), x.note))
    table_file = answers.with_name(f"{answers.stem}.scores.csv")
    image_file = answers.with_name(f"{answers.stem}.worst.png")
    try:
        write_atomic(table_file, text.getvalue().encode(errors="replace"))
        write_atomic(image_file, _worst_images(worst[:WORST], source, rules))
    except OSError as e:
        raise InputError(f"{e.filename or table_file}: cannot be written ({e.strerror})") from e
    print(f"each line: {table_file}; the worst: {image_file}", file=sys.stderr)


def _worst_images(worst: Sequence[Case], source: Path, rules: MediaRules) -> bytes:
    """A PNG: the first image of each line, its question, reference and answer, and their boxes."""
    font, columns = ImageFont.load_default(size=13), min(COLUMNS, len(worst))
    tile, rows = (WIDTH + LINE, HEIGHT + (LINES + 1) * LINE), -(-len(worst) // COLUMNS)
    sheet = Image.new("RGB", (columns * tile[0], rows * tile[1]), "white")
    for number, case in enumerate(worst):
        x, y = number % COLUMNS * tile[0], number // COLUMNS * tile[1]
        with contextlib.suppress(InputError):
            if images := _conversation(read_json(case.line.read(source), ""))[1]:
                image = draw_marks(load_image(images[0], rules), _marks(case))
                image.thumbnail((WIDTH, HEIGHT))
                sheet.paste(image, (x, y))
        texts = f"{case.id}: {case.metric} {case.score:.3g}", f"Q: {case.question}"
        texts += f"expected: {_expected(case)}", f"answer: {case.answer or case.note}"
        lines = [line for text in texts for line in textwrap.wrap(text, LETTERS)[:3]]
        for at, line in enumerate(lines[:LINES]):
            ImageDraw.Draw(sheet).text((x, y + HEIGHT + at * LINE), line, "black", font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _marks(case: Case) -> list[Mark]:
    if case.metric.partition("@")[0] not in ("iou", "point"):
        return []
    marks = [Mark(mark.place, "answer") for mark in read_marks(case.answer)[0]]
    for box, *sides in map(box_of, case.references):
        place = tuple(x / side * GRID for x, side in zip(box, sides * 2))
        marks.append(Mark(place, "expected"))
    return marks


def _with_size(reference: Any, images: Sequence[Any], rules: MediaRules) -> Any:
    """A reference in pixels with the size of its line's first image, where it does not state one."""
    if not isinstance(reference, dict) or reference.get("bbox_type") != "real" or not images:
        return reference
    width, height = load_image(images[0], rules).size
    return {"width": width, "height": height, **reference}


def _conversation(line: dict[str, Any]) -> tuple[str, list[Any]]:
    """(text of the last user message, sources of the images); none of messages that cannot be read."""
    messages, sources = list[dict[str, Any]](), list[MediaSource]()
    with contextlib.suppress(InputError):
        messages, sources = read_conversation(line.get("messages"))
    asked = [m.get("content") or "" for m in messages if m["role"] == "user"] or [""]
    items = [{"text": asked[-1]}] if isinstance(asked[-1], str) else asked[-1]
    question = "".join(item.get("text", "") for item in items)
    return question, [each.source for each in sources if each.kind == "image"]


def _expected(case: Case) -> str:
    return " | ".join(x if isinstance(x, str) else write_json(x, "") for x in case.references)
