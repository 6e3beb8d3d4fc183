"""What an answer's text holds: reasoning, what is said, and calls of tools."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
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
    calls: list[ToolCall] = []

    def taken(match: re.Match[str]) -> str:
        call = _call(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    content = _CALL.sub(taken, text)
    if calls or reasoning is not None:
        content = content.strip("\n")
    return Reply(content, reasoning, tuple(calls))


def _call(text: str) -> ToolCall | None:
    try:
        found = json.loads(text)
        arguments = found.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, AttributeError):
        return None
    if not isinstance(found.get("name"), str) or not isinstance(arguments, dict):
        return None
    return ToolCall(found["name"], arguments)
