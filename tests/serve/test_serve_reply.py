"""Answers taken apart as they come: the parts are those of the whole text, however it is cut."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from demo import evaluate
from qwen3vl_jax.inference.requests import Finished
from qwen3vl_jax.processing.parse_reply import parse_reply
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.serve.protocol import ApiError
from qwen3vl_jax.serve.reply import Reply, message

CALL = (
    '<tool_call>\n{"name": "add", "arguments": {"a": [1, 2], "b": "\u00e9</think>"}}\n</tool_call>'
)
TEXTS = [
    "plain",
    "\n two\n\nlines \n",
    "a < b <thin <tool_cal",
    "<think>\nwhy?\n\n</think>\n\nso\n",
    "<think>never closed\n",
    "<think></think>",
    CALL,
    f"I add.\n\n{CALL}\n{CALL}",
    f"<think>\n<b>\n</think>\n\nnow:\n{CALL}\nbye\n",
    "text\n<tool_call>\nno JSON\n</tool_call>\n",
    f"one\n<tool_call>{{]</tool_call>\ntwo {CALL}",
    "",
]


@pytest.fixture(scope="module")
def proc():
    return Processor.from_pretrained(evaluate.CHECKPOINT)


def answered(proc, ids, cuts, tools, thinking=False, stop=(), reason="stop"):
    """(the deltas of an answer whose tokens come in pieces, its finish_reason)."""
    request = SimpleNamespace(stop_strings=stop)
    asked = SimpleNamespace(request=request, tools=tools, logprobs=True)
    reply, deltas = Reply(proc, asked, thinking), []
    for piece in np.split(ids, cuts):
        deltas += reply.add((piece.tolist(), [-0.5] * len(piece)))
    deltas += reply.add(Finished(None, [], [], reason))
    assert len(reply.logprobs) == len(ids)
    return deltas, reply.finish_reason


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("thinking", [False, True])
def test_the_parts_are_those_of_the_whole_text(proc, text, thinking):
    """Content, reasoning and calls as parse_reply finds them, for any cut; no delta is empty."""
    rng, ids = np.random.default_rng(0), np.asarray(proc.tokenizer.encode(text, ""), int)
    expected = parse_reply(text, thinking)
    calls = [(call.name, call.arguments) for call in expected.tool_calls]
    for pieces in range(1, 40):
        cuts = np.sort(rng.integers(0, len(ids) + 1, pieces - 1))
        deltas, reason = answered(proc, ids, cuts, tools=[{}], thinking=thinking)
        assert all(value for delta in deltas for value in delta.values())
        found = message(deltas)
        assert (found["content"] or "") == expected.content
        assert found.get("reasoning_content", "") == (expected.reasoning or "")
        made = [call["function"] for call in found.get("tool_calls", [])]
        assert [(x["name"], json.loads(x["arguments"])) for x in made] == calls
        assert reason == ("tool_calls" if calls else "stop")


def test_text_comes_at_once_where_nothing_can_follow_it(proc):
    """Without tools no text is held for a tag; a stop string is, and ends the text."""
    ids = np.asarray(proc.tokenizer.encode("7 <tool_call> 8 END 9", ""), int)
    deltas, _ = answered(proc, ids, range(1, len(ids)), tools=None)
    assert len(deltas) >= len(ids) // 2 and message(deltas)["content"] == "7 <tool_call> 8 END 9"
    deltas, _ = answered(proc, ids, range(1, len(ids)), tools=None, stop=("END",))
    assert message(deltas)["content"] == "7 <tool_call> 8 "


def test_an_answer_with_an_error_is_an_error(proc):
    with pytest.raises(ApiError) as e:
        answered(proc, np.asarray([5]), [], None, reason="error")
    assert e.value.status == 500
