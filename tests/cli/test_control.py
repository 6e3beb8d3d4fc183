"""Answers under control from the command line: --json, --schema, --thinking-budget, lines of --input."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import infer
from qwen3vl_jax.cli import common
from qwen3vl_jax.cli.ask import read_prompt
from qwen3vl_jax.cli.infer_arguments import arguments, check
from qwen3vl_jax.storage.json_text import write_json

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "yes": {"type": "boolean"},
    },
    "required": ["n", "yes"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(write_json(SCHEMA, ""))


def printed(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        infer.main([str(a) for a in arguments])
    return out.getvalue()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        infer.main([str(a) for a in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_json_has_boxes_in_pixels_tokens_and_times(tmp_path):
    """The boxes of the demo, on an image that is no square, against those of its text."""
    image = ROOT / "demo" / "pictures" / "grid.png"
    ask = ("--image", image, "--prompt", "Find every nine.", "--max-new-tokens", 200)
    found = json.loads(printed(*ask, "--json"))
    text = printed(*ask).strip()
    assert (
        found["text"].strip() == text and found["reasoning"] is None and found["tool_calls"] == []
    )
    assert found["finish_reason"] == "stop" and found["prompt_tokens"] > 64
    assert 0 < found["seconds"]["first_token"] <= found["seconds"]["total"]
    marks = json.loads(text)
    with Image.open(image) as opened:
        (wide, high), (boxes,) = opened.size, found["boxes"]
    assert len(marks) == len(boxes) > 0
    for mark, box in zip(marks, boxes, strict=True):
        x1, y1, x2, y2 = mark["bbox_2d"]
        want = [x1 * wide / 1000, y1 * high / 1000, x2 * wide / 1000, y2 * high / 1000]
        assert box["label"] == mark["label"] and box["bbox_2d"] == pytest.approx(want, abs=0.006)


def test_a_schema_and_a_budget_with_several_answers():
    """Two answers of one thinking template: exactly three tokens of reasoning, then JSON of the schema."""
    template = ROOT / "tests" / "thinking.jinja"
    how = ("--prompt", "Hi", "--chat-template", template, "--thinking-budget", 3)
    how += (
        "--ckpt",
        common.DEMO,
        "--schema",
        "schema.json",
        "--json",
        "--answers",
        2,
        "--temperature",
        1,
    )
    lines = printed(*how).splitlines()
    assert len(lines) == 2
    for line in lines:
        found = json.loads(line)
        value = json.loads(found["text"])
        assert value.keys() == {"n", "yes"} and 0 <= value["n"] <= 99
        assert found["reasoning"] is not None and found["completion_tokens"] > 3 + 4
        assert found["boxes"] == [] and found["finish_reason"] == "stop"


def test_lines_of_input_mixed(tmp_path, capsys):
    """A schema for all lines, another and none for some; a wrong one is an error of its line alone."""
    ask = [{"role": "user", "content": "Hi"}]
    grammar = {"type": "grammar", "grammar": 'start: "ab" "c"?'}
    lines = [
        {"messages": ask},
        {"messages": ask, "response_format": grammar},
        {"messages": ask, "response_format": {"type": "text"}, "max_new_tokens": 4},
        {"messages": ask, "response_format": {"type": "xml"}},
        {"messages": ask, "thinking_budget": -1},
        {"messages": ask, "max_repeats": 1},
    ]
    (tmp_path / "in.jsonl").write_text("".join(write_json(line, "") + "\n" for line in lines))
    with pytest.raises(SystemExit) as stopped:
        infer.main(["--input", "in.jsonl", "--output", "out.jsonl", "--schema", "schema.json"])
    assert stopped.value.code == 1
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert json.loads(found[0]["text"]).keys() == {"n", "yes"}
    assert found[1]["text"] in ("ab", "abc") and found[1]["finish_reason"] == "stop"
    assert "error" not in found[2] and "{" not in found[2]["text"]
    for result, key in zip(found[3:], ("response_format", "thinking_budget", "max_repeats")):
        assert f"{key}: got" in result["error"]


def test_what_the_options_refuse(capsys, tmp_path):
    (tmp_path / "bad.json").write_text('{"type": "objekt"}')
    for options, why in (
        (("--json", "--stream"), "--json: not with --stream"),
        (("--thinking", "off"), "--thinking: the chat template has no enable_thinking"),
        (("--thinking-budget", "-2"), "thinking_budget: got -2, expected a whole number"),
        (("--max-repeats", "1"), "max_repeats: got 1, expected 0 (off) or a whole number from 2"),
        (("--schema", "bad.json"), "schema: Invalid type: objekt"),
        (("--schema", "none.json"), "--schema none.json"),
    ):
        assert why in refused(capsys, *options)


def test_thinking_is_a_variable_of_the_template(tmp_path):
    """A template that has the switch gets it, on or off."""
    template = "{{ 'on' if enable_thinking else 'off' }} {{ messages[0].content }}"
    (tmp_path / "t.jinja").write_text(template + "{% if add_generation_prompt %}:{% endif %}")
    for state in ("on", "off"):
        given = ["--prompt", "Hi", "--chat-template", "t.jinja", "--thinking", state, "--ckpt"]
        args = arguments([*given, str(common.DEMO)])
        check(args)
        prompt = read_prompt(args)
        assert prompt.processor.decode(prompt.encoded.ids).startswith(state)
