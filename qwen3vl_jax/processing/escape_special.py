"""Special tokens in a user's text: they are encoded as characters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.json_text import write_json

_PRIVATE = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)]


class Escape:
    """Marks the special tokens in a text, so that they are encoded as characters.

    The mark is a private-use character that occurs nowhere in what is rendered. Written inside a
    token's text before the template is rendered, it hides the token from the tokenizer;
    `Tokenizer.encode` removes it. Beginnings and ends of tokens are marked too, so that no token
    comes from texts that a template joins or cuts.
    """

    def __init__(self, special: Iterable[str], ordinary: Iterable[str], rendered: str):
        """special, ordinary: texts of added tokens; rendered: all text that will be rendered."""
        special = list(special)
        used, private = rendered.lower(), map(chr, _PRIVATE)
        free = (c for c in private if c not in used and _json_escape(c) not in used)
        if (mark := next(free, None)) is None:
            raise InputError("conversation: it uses every private-use character of Unicode")
        self.mark = mark
        at_end = {token[:n] for token in special for n in range(1, len(token))}
        at_start = {token[n:] for token in special for n in range(1, len(token))}
        flags = re.IGNORECASE  # a template may change case
        # A template may look for ordinary added tokens (<think>) in a text, and cut them out: they
        # are not marked, and what they interrupt is.
        other = _any_of(ordinary)
        first, two = (_any_of({token[:n] for token in special}) for n in (1, 2))
        marked = f"(?!{other})(?:{two}|{first}(?={other})|{_any_of(at_end)}(?=\\s*\\Z))"
        self._marked = re.compile(marked, flags)
        self._tail = re.compile(rf"(?=\s*{_any_of(at_start)})", flags)
        self._special = [token.lower() for token in special]

    def text(self, text: str) -> str:
        """A text as a template may have it."""
        return self._marked.sub(lambda found: found[0][0] + self.mark + found[0][1:], text)

    def content(self, text: str) -> str:
        """`text` for all of a content: the middle or end of a token is marked as well."""
        bare = text.lstrip()
        middle = bool(bare) and any(bare.rstrip().lower() in token for token in self._special)
        if middle or self._tail.match(text):
            return text[: len(text) - len(bare)] + self.mark + self.text(bare)
        return self.text(text)

    def data(self, value: Any) -> Any:
        """JSON data with every string in it escaped, keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.data(k): self.data(v) for k, v in value.items()}
        return [self.data(v) for v in value] if isinstance(value, list) else value

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message escaped, an answer of an earlier turn too: a model can be made to repeat a token."""
        escaped = self.data({k: v for k, v in message.items() if k != "content"})
        content = message.get("content")
        if isinstance(content, str):
            escaped["content"] = self.content(content)
        elif content is not None:
            escaped["content"] = [
                {**item, "text": self.content(item["text"])} if "text" in item else item
                for item in content
            ]
        return escaped

    def tidy(self, rendered: str) -> str:
        """A rendered prompt whose marks are characters even where a template wrote ASCII JSON."""
        return rendered.replace(_json_escape(self.mark), self.mark)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern of any of these, the longest first; one that never matches if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)"


def _json_escape(character: str) -> str:
    return write_json(character, "text")[1:-1]
