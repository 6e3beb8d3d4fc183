"""What a chat template leaves out of what it is given, found by trying it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwen3vl_jax.errors import InputError

_WORD = "zq7"
_ASKED = {"role": "user", "content": "?"}


class Shown:
    """Whether a template writes what messages of a kind hold; render(messages, tools) is the template."""

    def __init__(self, render: Callable[[list[Any], Any], str]):
        self._render = render
        self._found: dict[str, bool] = {}

    def check(self, messages: Sequence[Any], tools: Any) -> None:
        """Raises InputError for what the template passes over without a word."""
        call = {"type": "function", "function": {"name": _WORD, "arguments": {}}}
        tool = {"type": "function", "function": {"name": _WORD, "parameters": {}}}
        said = {"role": "assistant", "content": "a"}
        if tools and not self._shows("tools", [_ASKED], [tool]):
            raise InputError("tools: the chat template has no place for tools; leave them out")
        for number, message in enumerate(messages, 1):
            role, where = message["role"], f"message {number}: "
            if role != "assistant":
                kind = f"a {role} message" + " behind others" * (number > 1)
                probe = {"role": role, "content": _WORD}
                if not self._shows(kind, [*([_ASKED] if number > 1 else []), probe, _ASKED]):
                    raise InputError(f"{where}the chat template leaves out {kind}")
            for key, value in (("tool_calls", [call]), ("reasoning_content", _WORD)):
                aliases = ("thinking", "reasoning") if key == "reasoning_content" else ()
                if any(message.get(name) for name in (key, *aliases)) and not self._shows(
                    key, [_ASKED, {**said, key: value}]
                ):
                    raise InputError(
                        f"{where}the chat template leaves out {key}; take it out, or write it into content"
                    )

    def _shows(self, kind: str, messages: list[Any], tools: Any = None) -> bool:
        if kind not in self._found:
            try:
                self._found[kind] = _WORD in self._render(messages, tools)
            except InputError:
                # A template that refuses will say so of the record itself.
                self._found[kind] = True
        return self._found[kind]
