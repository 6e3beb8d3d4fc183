"""qwen3vl score: what it reads, refuses, prints and writes, with a model and without."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qwen3vl_jax.cli import score
from qwen3vl_jax.cli.batch_journal import read_lines
from qwen3vl_jax.cli.batch_lines import Settings, read_line
from qwen3vl_jax.inference import engine


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Image.new("RGB", (400, 200), "black").save("a.png")


def ask(words="Which?", image="a.png"):
    content = [{"type": "image", "image": image}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(cases, answers, *options):
    """The exit code of scoring these answers to these lines."""
    write("in.jsonl", cases)
    write("out.jsonl", answers)
    return ended(["--input", "in.jsonl", "--answers", "out.jsonl", *options])


def ended(options):
    try:
        score.main(options)
    except SystemExit as end:
        return end.code
    return 0


def table():
    with open("out.scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_metric_has_a_row_and_the_worst_lines_come_first(capsys):
    """Errors and what cannot be read count as 0, and are said; a line's metric comes before --metric."""
    cases = [
        {"id": "good", "messages": ask(), "answer": ["yes", "Yes"]},
        {"id": "half", "messages": ask(), "answer": "abcd", "metric": "anls"},
        {"messages": ask("What?\nA. cat\nB. dog"), "answer": "B", "metric": "choice"},
        {"id": [4], "messages": ask(), "answer": "no"},
        {"id": "long", "messages": ask("x"), "answer": "B", "metric": "choice"},
    ]
    answers = [
        {"id": "good", "text": "yes", "finish_reason": "stop"},
        {"id": "half", "text": "abcx", "finish_reason": "stop"},
        {"id": 3, "text": "I see a dog", "finish_reason": "stop"},
        {"id": [4], "error": "line 4: no such file", "finish_reason": "error"},
        {"id": "long", "text": "Let me see, it may be", "finish_reason": "length"},
    ]
    assert run(cases, answers, "--metric", "exact") == 1
    found = [line.split("\u2502")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in row] for row in found if len(row) == 7]
    assert rows == [
        ["exact", "2", "0.5000", "0.0945 to 0.9055", "Wilson", "1", "0"],
        ["anls", "1", "0.7500", "0.7500 to 0.7500", "bootstrap", "0", "0"],
        ["choice", "2", "0.5000", "0.0945 to 0.9055", "Wilson", "0", "1"],
    ]
    assert [row["line"] for row in table()] == ["4", "5", "2", "1", "3"]
    assert [row["score"] for row in table()] == ["0.0", "0.0", "0.75", "1.0", "1.0"]
    assert [row["note"] for row in table()][:2] == ["line 4: no such file", "unread, cut off"]
    assert table()[3]["expected"] == "yes | Yes"


def test_reasoning_does_not_count():
    """An answer of a Thinking model that is cut off in it is none, whatever it considers."""
    cases = [{"messages": ask(), "answer": "4"} for _ in range(3)]
    answers = [
        {"id": 1, "text": "5?\n</think>\n\n4", "finish_reason": "stop"},
        {"id": 2, "text": "4", "finish_reason": "length"},
        {"id": 3, "text": "4", "finish_reason": "stop"},
    ]
    assert run(cases, answers, "--metric", "exact") == 0
    assert [(row["id"], row["score"]) for row in table()] == [
        ("2", "0.0"),
        ("1", "1.0"),
        ("3", "1.0"),
    ]


def test_boxes_in_pixels_take_the_size_of_the_image_and_are_drawn():
    """The expected box and the answer's on the line's image; of other sizes the score is another."""
    pixels = {"bbox_2d": [100, 50, 200, 100], "bbox_type": "real"}
    cases = [
        {"messages": ask(), "answer": pixels},
        {"messages": ask(), "answer": {**pixels, "width": 800, "height": 400}},
    ]
    text = '{"bbox_2d": [250, 250, 500, 500]}'
    answers = [{"id": n, "text": text, "finish_reason": "stop"} for n in (1, 2)]
    assert run(cases, answers, "--metric", "iou") == 0
    assert {row["id"]: float(row["score"]) for row in table()} == {"1": 1.0, "2": 0.0}
    sheet = np.asarray(Image.open("out.worst.png"))
    # The worst is drawn first: its answer lies right of and below what was expected.
    first = sheet[: score.HEIGHT, : score.WIDTH].astype(int)
    red, green = ((first[..., c] - first[..., 1 - c]) > 100 for c in (0, 1))
    (ry, rx), (gy, gx) = np.nonzero(red), np.nonzero(green)
    assert min(map(len, (rx, gx))) > 50 and sheet.shape[1] == 2 * (score.WIDTH + score.LINE)
    # Colours go by the order of marks: the answer is the first, red.
    assert rx.mean() > gx.mean() and ry.mean() > gy.mean()


GOOD = {"messages": ask(), "answer": "x"}
REFUSED = {  # name -> (lines, answers, options, what the error line holds)
    "no metric": ([GOOD], [], [], "--metric: got None, expected exact, relaxed"),
    "unknown metric": ([GOOD], [], ["--metric", "f1"], "--metric: got 'f1', expected exact"),
    "a line's metric": ([{**GOOD, "metric": 3}], [], [], "in.jsonl: line 1: metric: got 3"),
    "a line's code": (
        [{**GOOD, "metric": "python:os:getcwd"}],
        [],
        [],
        "line 1: metric: got 'python:os:getcwd', expected a name; give it as --metric",
    ),
    "no answer": ([{"messages": ask()}], [], ["--metric", "exact"], "line 1: answer: got None"),
    "no references": ([{**GOOD, "answer": []}], [], ["--metric", "exact"], "answer: got []"),
    "no object": ([[1]], [], ["--metric", "exact"], "line 1: got list, expected an object"),
    "a wrong box": ([GOOD], [], ["--metric", "iou"], "in.jsonl: line 1: answer: got 'x', expected"),
    "no such image": (
        [
            {
                "messages": ask(image="no.png"),
                "answer": {"bbox_2d": [1, 1, 2, 2], "bbox_type": "real"},
            }
        ],
        [],
        ["--metric", "iou"],
        "line 1: answer: no.png",
    ),
    "fewer answers": ([GOOD], [], ["--metric", "exact"], "got 0 lines, expected the 1 of --input"),
    "other answers": ([GOOD], [{"id": 2, "text": ""}], ["--metric", "exact"], "expected the id 1"),
    "no text": ([GOOD], [{"id": 1}], ["--metric", "exact"], "out.jsonl: line 1: text: got None"),
    "an option": ([GOOD], [], ["--metric", "exact", "--seed", "1"], "--seed: means nothing with"),
    "no option": ([GOOD], [], ["--metric", "exact", "--sede", "1"], "--sede: means nothing with"),
    "no module": ([GOOD], [], ["--metric", "python:none_such:f"], "that can be imported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_one_line(case, capsys):
    """Exit code 2, and nothing is written."""
    cases, answers, options, told = REFUSED[case]
    assert run(cases, answers, *options) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error
    assert not Path("out.scores.csv").exists()


def test_a_function_in_the_working_directory():
    """It need not be installed."""
    Path("own_metric" + ".py").write_text(
        "def f(answer, references, question): return len(question) / 8"
    )
    answers = [{"id": 1, "text": "", "finish_reason": "stop"}]
    assert run([GOOD], answers, "--metric", "python:own_metric:f") == 0
    assert table()[0]["score"] == "0.75"


def test_the_model_answers_and_is_scored(monkeypatch, capsys):
    """Lines may have answer and metric, a second run tries errors again, a third scores what is there."""
    write("in.jsonl", [GOOD, {"messages": ask(image="b.png"), "answer": "x", "metric": "anls"}])

    def many(params, cfg, requests, stop_ids, decode, **options):
        for one in filter(None, requests):
            found = {"tokens": [1, 2], "logprobs": [], "finish_reason": "stop", "error": ""}
            yield SimpleNamespace(key=one.key, **found)

    monkeypatch.setattr(engine, "generate_many", many)
    command = ["--input", "in.jsonl", "--output", "out.jsonl", "--metric", "exact"]
    assert ended([*command, "--temperature", "0"]) == 1
    assert [row["line"] for row in table()] == ["1", "2"] and "b.png" in table()[1]["note"]
    Image.new("RGB", (64, 64)).save("b.png")
    assert ended([*command, "--temperature", "0"]) == 0
    assert table()[1]["note"] == "" and not Path("out.jsonl.partial").exists()
    capsys.readouterr()
    assert ended(command) == 2
    assert "score it with --answers out.jsonl" in capsys.readouterr().err
    assert ended(["--input", "in.jsonl", "--answers", "out.jsonl", "--metric", "exact"]) == 0
    assert ended(["--input", "in.jsonl", "--metric", "exact"]) == 2


def test_a_batch_alone_refuses_references():
    """infer.py --input has no use for them: a key that means nothing is named."""
    write("in.jsonl", [GOOD])
    (line,) = read_lines(Path("in.jsonl"))
    settings = Settings(sampling={}, max_new_tokens=1, seed=0, stop=(), max_len=9, inputs={})
    # The key is found before anything of the processor is used.
    found = read_line(None, Path("in.jsonl"), line, settings)  # pyright: ignore[reportArgumentType]
    assert isinstance(found, tuple)
    assert "line 1: unknown key 'answer', expected some of id, messages" in found[1]["error"]
