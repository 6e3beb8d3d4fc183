"""The parts of an answer's text: reasoning, content, and calls of tools."""

import dataclasses
import re
from typing import Any

from qwen3vl_jax.errors import InputError, unexpected
from qwen3vl_jax.storage.json_text import read_json_at

_CALL = re.compile(r"<tool_call>\s*(?:```(?:json)?\s*)?")
# The last tag of an answer may be missing.
_CALL_END = re.compile(r"\s*(?:```\s*)?(?:</tool_call>|(?=<tool_call>)|\Z)")
_BETWEEN = re.compile(r"[\s,]*")
_KEYS = ("name", "arguments", "parameters", "id", "type")
_OPEN, _CLOSE = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function the model wants called, and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer in its parts; unparsed: a line for each <tool_call> that stayed in the content."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    unparsed: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def message(self) -> dict[str, Any]:
        """The answer as the next message of its conversation, as templates take it."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            found["reasoning_content"] = self.reasoning
        if calls := [dataclasses.asdict(call) for call in self.tool_calls]:
            found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return found


def parse_reply(text: str, thinking: bool = False) -> Reply:
    """Splits an answer's text; thinking: the prompt had already opened <think>.

    An answer cut off while thinking is all reasoning. A <tool_call> that is not JSON with a name and an
    object of arguments stays in the content.
    """
    reasoning, begins = None, text.lstrip()
    is_open = thinking or begins.startswith(_OPEN)
    text = begins.removeprefix(_OPEN) if begins.startswith(_OPEN) else text
    close = text.find(_CLOSE)
    # Arguments of a call may hold the tag.
    if close >= 0 and not is_open and any(a < close < b for a, b, _ in _blocks(text)[0]):
        close = -1
    if close >= 0:
        reasoning = text[:close].strip("\n")
        text = text[close + len(_CLOSE) :]
    elif is_open:
        reasoning, text = text.strip("\n"), ""
    return dataclasses.replace(parse_calls(text, reasoning is not None), reasoning=reasoning)


def parse_calls(text: str, strips: bool = False) -> Reply:
    """`parse_reply` of a text without reasoning; strips: line breaks around it go, as beside a call."""
    blocks, unparsed = _blocks(text)
    starts, ends = [0, *(b for _, b, _ in blocks)], [*(a for a, _, _ in blocks), len(text)]
    content = "".join(text[a:b] for a, b in zip(starts, ends, strict=True))
    content = content.strip("\n") if blocks or strips else content
    calls = tuple(call for _, _, found in blocks for call in found)
    return Reply(content, None, calls, tuple(unparsed))


def _blocks(text: str) -> tuple[list[tuple[int, int, list[ToolCall]]], list[str]]:
    """(start, end, calls) of each <tool_call> block, and a line for each that cannot be read."""
    blocks: list[tuple[int, int, list[ToolCall]]] = []
    unparsed = []
    for tag in _CALL.finditer(text):
        if blocks and tag.start() < blocks[-1][1]:
            continue
        found, at, closed = [], tag.end(), None
        try:
            while closed is None:
                value, at = read_json_at(text, at)
                found += value if isinstance(value, list) else [value]
                closed = _CALL_END.match(text, at)
                at = _BETWEEN.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
            blocks.append((tag.start(), closed.end(), [_call(each) for each in found]))
        except InputError as e:
            unparsed.append(f"<tool_call> at character {tag.start()}: {e}; it stays text")
    return blocks, unparsed


def _call(found: Any) -> ToolCall:
    if isinstance(found, dict) and isinstance(found.get("function"), dict):
        found = found["function"]
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise InputError("expected an object with a name and arguments")
    key = "arguments" if "arguments" in found else "parameters"
    if unknown := [k for k in found if k not in _KEYS or k == "parameters" != key]:
        raise InputError(f"unknown key {unknown[0][:40]!r}, expected name and arguments")
    arguments = found.get(key)
    if isinstance(arguments, str):
        text = arguments.strip() or "null"
        arguments, end = read_json_at(text, 0)
        if end != len(text):
            raise InputError("arguments: text after the JSON")
    if not isinstance(arguments, dict | None):
        raise unexpected("arguments", type(arguments).__name__, "an object")
    return ToolCall(found["name"], arguments or {})
