"""Answers taken apart, and generation_config.json."""

import json
import logging

import numpy as np
import pytest
import toy_checkpoint as toy

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.chat_template import ChatTemplate
from qwen3vl_jax.processing.parse_reply import Reply, ToolCall, parse_reply
from qwen3vl_jax.processing.processor import (
    Processor,
    read_generation_config,
    sampling_defaults,
    stop_ids,
)


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    return Processor.from_pretrained(toy.save(tmp_path_factory.mktemp("toy")))


ARGUMENTS = (
    {},
    {"x": 1},
    {"x": -2.5e-3, "on": True, "none": None},
    {"text": 'a "quoted" \\ word\nline'},
    {"list": [1, [2, {"deep": "\u5b57 gr\u00f6\u00dfe"}]]},
    {"html": "<b>&amp;</b> }{"},
    {"call": "a </tool_call> in a <tool_call> text"},
    {"\u00e9": "key"},
    {"x": []},
    {"long": "z" * 500},
)


TEMPLATES = {"toy": toy.TEMPLATE, **toy.RELEASED_TEMPLATES}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("words", ["", "I look.\nThen I call."])
def test_templated_calls_come_back(proc, arguments, words, template):
    """What a chat template writes for one call, and for two, parses to the same calls."""
    proc = Processor(**{**vars(proc), "template": ChatTemplate({"default": TEMPLATES[template]})})
    reasoning = "Which tool?\nThis one." if template == "thinking" else None
    for calls in (
        [ToolCall("find", arguments)],
        [ToolCall("find", arguments), ToolCall("b", {"i": 2})],
    ):
        reply = Reply(words, reasoning, tuple(calls))
        chat = [{"role": "user", "content": "x"}]
        prompt = proc.render(chat)
        whole = proc.render([*chat, reply.message()], add_generation_prompt=False)
        assert whole.startswith(prompt)
        answer = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
        found = proc.parse(answer, prompt)
        assert found == reply and found.message() == reply.message()
        assert "<think>" not in answer  # the prompt opened it


def test_reasoning():
    """With and without the opening tag, before calls, and cut off in the middle."""
    for text, thinking, expected in (
        ("plain", False, Reply("plain")),
        ("hm\n</think>\n\nyes", False, Reply("yes", "hm")),
        ("hm\nhm\n</think>\n\nyes", True, Reply("yes", "hm\nhm")),
        ("<think>\nhm\n</think>\n\nyes", False, Reply("yes", "hm")),
        ("<think>\n\n</think>\n\nyes", False, Reply("yes", "")),
        ("still thinking", True, Reply("", "still thinking")),
        ("<think>\nstill", False, Reply("", "still")),
        ("a</think>\n\nb</think>", True, Reply("b</think>", "a")),
        (
            'hm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            True,
            Reply("", "hm", (ToolCall("f", {"a": 1}),)),
        ),
        (
            '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>',
            False,
            Reply("", None, (ToolCall("f", {"a": 1}),)),
        ),
    ):
        assert parse_reply(text, thinking) == expected, text


def test_what_is_no_call_stays_text():
    for inside in (
        "no json",
        "[1]",
        '{"arguments": {}}',
        '{"name": 3}',
        '{"name": "f", "arguments": 3}',
        "[" * 10_000,
    ):
        text = f"a <tool_call>\n{inside}\n</tool_call> b"
        assert parse_reply(text) == Reply(text)
    assert parse_reply("<tool_call>\n{") == Reply("<tool_call>\n{")
    call = '<tool_call>\n{"name": "f"}\n</tool_call>'
    for broken in ('<tool_call>\n{"name": "f"} more', '<tool_call>\n{"name": 3</tool_call>'):
        assert parse_reply(f"{broken}\n{call}") == Reply(broken, None, (ToolCall("f", {}),))


CALLS = {
    '{"name": "f", "arguments": {"a": "x\n\ty"}}': [("f", {"a": "x\n\ty"})],
    '{"name": "f", "arguments": null}': [("f", {})],
    '{"name": "f", "arguments": ""}': [("f", {})],
    '{"name": "f", "arguments": "{\\"a\\": \\"x\\ny\\"}"}': [("f", {"a": "x\ny"})],
    '{"name": "f", "parameters": {"a": 1}}': [("f", {"a": 1})],
    '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}': [("f", {"a": 1})],
    '{"name": "f"}\n{"name": "g"}': [("f", {}), ("g", {})],
    '[{"name": "f"}, {"name": "g"}]': [("f", {}), ("g", {})],
    '```json\n{"name": "f"}\n```': [("f", {})],
    '{"name": "f", "arguments": {"a": "</think> </tool_call>"}}': [
        ("f", {"a": "</think> </tool_call>"})
    ],
}
NO_CALLS = {
    '{"name": "f", "arguments": {"a": NaN}}': "NaN",
    '{"name": "f", "arguments": {"a": 1, "a": 2}}': "twice",
    '{"name": "f", "arguments": "a"}': "not JSON",
    '{"name": "f", "arguments": "{} {}"}': "after the JSON",
    '{"name": "f", "arguments": [1]}': "got list, expected an object",
    '{"name": "f", "arguments": {}, "parameters": {}}': "unknown key 'parameters'",
    '{"name": "f", "args": {"a": 1}}': "unknown key 'args'",
    '{"arguments": {}}': "a name",
    "{'name': 'f'}": "not JSON",
    "[" * 5000: "nested",
    '{"name": "f", "arguments": {"a": "\\ud83d"}}': "surrogate",
}


@pytest.mark.parametrize("closed", [True, False])
def test_calls_are_not_lost(proc, caplog, closed):
    """As models write them; what cannot be read stays in the text, and a warning says why."""
    for inside, expected in CALLS.items():
        end = "\n</tool_call>" if closed else ""
        found = parse_reply(f"I look.\n<tool_call>\n{inside}{end}")
        assert [(c.name, c.arguments) for c in found.tool_calls] == expected, inside
        assert (found.content, found.reasoning, found.unparsed) == ("I look.", None, ())
    for inside, why in NO_CALLS.items():
        text = f"I look.\n<tool_call>\n{inside}" + ("\n</tool_call>" if closed else "")
        caplog.clear()
        found = proc.parse(text)
        assert found == Reply(text) and len(found.unparsed) == 1
        assert why in caplog.text and "character 8" in caplog.text, inside


def test_an_open_think_in_the_prompt(proc):
    ids = proc.tokenizer.encode("hm</think>yes", "")
    assert proc.parse(ids, "<|im_start|>assistant\n<think>\n") == Reply("yes", "hm")
    assert proc.parse("hm", "<|im_start|>assistant\n") == Reply("hm")


def test_generation_config(tmp_path, caplog):
    """The released file; defaults where it samples and leaves values out; greedy where it does not."""
    path = tmp_path / "generation_config.json"
    assert read_generation_config(tmp_path) == {}
    assert sampling_defaults({}) == {} and stop_ids({}) == ()
    released = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.0,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
    }
    path.write_text(json.dumps(released))
    raw = read_generation_config(tmp_path)
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0}
    assert sampling_defaults(raw) == expected and stop_ids(raw) == (151645, 151643)
    assert sampling_defaults({"do_sample": True}) == {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    assert sampling_defaults({"temperature": 0.7, "eos_token_id": 3}) == {}
    assert stop_ids({"eos_token_id": 3}) == (3,)
    path.write_text(json.dumps({"num_beams": 4, "typical_p": 1.0}))
    with caplog.at_level(logging.WARNING):
        read_generation_config(tmp_path)
    assert "num_beams 4" in caplog.text and "typical_p" not in caplog.text
    for bad, words in (
        ("[]", "expected an object"),
        ("{", "not JSON"),
        ('{"eos_token_id": "x"}', "eos_token_id"),
        ('{"temperature": "hot"}', "temperature: got 'hot', expected a number"),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=words):
            read_generation_config(tmp_path)


def test_continuations(proc):
    """Text behind each prompt, with labels on it alone."""
    chats = [[{"role": "user", "content": c}] for c in ("one", "a longer question")]
    for side in ("right", "left"):
        found = proc.inputs(chats, continuations=["yes", "no, not"], padding_side=side)
        plain = proc.inputs(chats, padding_side=side)
        for row, text in enumerate(("yes", "no, not")):
            labels = found["labels"][row]
            assert proc.decode(labels[labels >= 0]) == text
            np.testing.assert_array_equal(found["input_ids"][row][labels >= 0], labels[labels >= 0])
            attended = found["input_ids"][row][(found["attention_mask"][row] > 0) & (labels < 0)]
            np.testing.assert_array_equal(
                attended, plain["input_ids"][row][plain["attention_mask"][row] > 0]
            )
    assert proc(chats, continuations=["yes", "no"]).labels.shape[0] == 2
    with pytest.raises(InputError, match="1 for 2 row"):
        proc.inputs(chats, continuations="yes")
