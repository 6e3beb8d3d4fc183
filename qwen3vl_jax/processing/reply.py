"""What an answer's text holds: reasoning, what is said, and calls of tools."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

_CALL, _CALL_END = re.compile(r"<tool_call>\s*"), re.compile(r"\s*</tool_call>")
_OPEN, _CLOSE = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function the model wants called, and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer in its parts; `reasoning` is None where the model was not thinking aloud."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def message(self) -> dict[str, Any]:
        """The answer as the next message of its conversation, as templates take it."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            found["reasoning_content"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = [
                {"type": "function", "function": dataclasses.asdict(call)}
                for call in self.tool_calls
            ]
        return found


def parse_reply(text: str, thinking: bool = False) -> Reply:
    """Splits an answer's text; thinking: the prompt had already opened <think>.

    Reasoning is what stands before </think>; an answer cut off while thinking is all reasoning. A
    <tool_call> that is not JSON with a name and an object of arguments stays in the content.
    """
    reasoning = None
    if _CLOSE in text:
        before, _, text = text.partition(_CLOSE)
        reasoning = before.removeprefix(_OPEN).strip("\n")
    elif thinking or text.lstrip().startswith(_OPEN):
        reasoning, text = text.lstrip().removeprefix(_OPEN).strip("\n"), ""
    content, calls = _take_calls(text)
    if calls or reasoning is not None:
        content = content.strip("\n")
    return Reply(content, reasoning, tuple(calls))


def _take_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text without its calls, and these; arguments may spell the tags themselves."""
    kept, calls, at = "", [], 0
    for opened in _CALL.finditer(text):
        if opened.start() >= at and (found := _call(text, opened.end())):
            kept += text[at : opened.start()]
            calls.append(found[0])
            at = found[1]
    return kept + text[at:], calls


def _call(text: str, at: int) -> tuple[ToolCall, int] | None:
    """The call whose JSON begins at a place of the text, and where its closing tag ends."""
    try:
        found, end = json.JSONDecoder().raw_decode(text, at)
        arguments = found.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, AttributeError, RecursionError):
        return None
    closed = _CALL_END.match(text, end)
    if not closed or not isinstance(found.get("name"), str) or not isinstance(arguments, dict):
        return None
    return ToolCall(found["name"], arguments), closed.end()
