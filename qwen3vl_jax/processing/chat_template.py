"""The checkpoint's chat template, rendered as transformers does, and special tokens in a user's text."""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import InputError, unexpected
from qwen3vl_jax.processing.template_process import render
from qwen3vl_jax.storage.json_text import read_json_file, read_regular, write_json
from qwen3vl_jax.storage.paths import as_path

Messages = list[dict[str, Any]]
_LARGEST = 1 << 22
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
# The text that test prompts hold, to find out whether the template writes it.
_WORD = "zq7"
_ASKED = {"role": "user", "content": "?"}
_CALL = {"type": "function", "function": {"name": _WORD, "arguments": {}}}
_TOOL = {"type": "function", "function": {"name": _WORD, "parameters": {}}}
_ANSWER_PARTS: Mapping[str, Any] = {"tool_calls": [_CALL], "reasoning_content": _WORD}
_PRIVATE = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)]


class ChatTemplate:
    """A Jinja chat template (or several by name), rendered in a sandbox as transformers does (`render`)."""

    def __init__(self, templates: Mapping[str, str], source: str = "chat template"):
        self.templates, self.source = dict(templates), source
        self._written: dict[str, bool] = {}
        self._variables: dict[str, Any] = {}

    @classmethod
    def from_dir(cls, directory: str | Path, chosen: str | Path | None = None) -> "ChatTemplate":
        """The template of a checkpoint directory, or the chosen one.

        Looked for in chat_template.jinja (with additional_chat_templates/), chat_template.json,
        processor_config.json, tokenizer_config.json. chosen: a file, a template's own text, or the name
        of one of several. Without any, `render` raises InputError.
        """
        folder = as_path(directory)
        more = (folder / "additional_chat_templates").glob("*.jinja")
        found = {path.stem: _read(path) for path in sorted(more)}
        if (folder / "chat_template.jinja").is_file():
            found["default"] = _read(folder / "chat_template.jinja")
        else:
            for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
                raw = read_json_file(folder / name) if (folder / name).is_file() else {}
                if named := _named(raw.get("chat_template"), folder / name):
                    found |= named
                    break
        if chosen is None:
            return cls(found, str(directory))
        text = str(chosen)
        if text in found:
            return cls({"default": found[text]}, f"chat template {text}")
        if "{{" in text or "{%" in text:
            return cls({"default": text})
        if text.endswith(".json"):
            path = as_path(text)
            return cls(_named(read_json_file(path).get("chat_template"), path), text)
        return cls({"default": _read(as_path(text))}, text)

    def text(self, with_tools: bool) -> str:
        """The template's text: "tool_use" if there are tools and it exists, else "default"."""
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name in self.templates:
            return self.templates[name]
        if self.templates:
            names = ", ".join(sorted(self.templates))
            raise InputError(f"{self.source}: several chat templates, name one: {names}")
        places = "chat_template.jinja, chat_template.json or in tokenizer_config.json"
        advice = "pass one, or raw text with text="
        raise InputError(f"{self.source}: no chat template ({places}); {advice}")

    def render(
        self,
        messages: Messages,
        tools: Messages | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt. Raises InputError with the template's own words where it refuses, or does not end."""
        # final: the text to continue.
        template, final = self.text(bool(tools)), ""
        if continue_final_message:
            content, add_generation_prompt = messages[-1].get("content"), False
            items = [{"text": content}] if isinstance(content, str) else list(content or [])
            place = max((i for i, item in enumerate(items) if "text" in item), default=None)
            if place is None:
                raise InputError("continue_final_message: the last message has no text to continue")
            final = items[place]["text"]
            items[place] = {**items[place], "text": final + _CONTINUE}
            content = items[0]["text"] if isinstance(content, str) else items
            messages = [*messages[:-1], {**messages[-1], "content": content}]
        given = {"messages": messages, "tools": tools, "documents": None}
        given["add_generation_prompt"] = add_generation_prompt
        try:
            rendered = render(template, {**given, **variables})
        except InputError as e:
            raise InputError(f"{self.source}: {e}") from None
        if not continue_final_message:
            return rendered
        at = rendered.rfind(_CONTINUE.strip())
        if at < 0 or final.strip() not in rendered:
            raise InputError(f"{self.source}: it drops the last message, which cannot be continued")
        kept = rendered[at:].startswith(_CONTINUE)
        return rendered[:at] if kept else rendered[:at].rstrip()

    def check_written(self, messages: Messages, tools: Any, variables: Mapping[str, Any]) -> None:
        """Raises InputError for tools, roles, calls and reasoning that a trial prompt shows left out."""
        self._variables = dict(variables)
        if tools and not self._writes("tools", [_ASKED], [_TOOL]):
            raise InputError("tools: the chat template has no place for tools; leave them out")
        for number, message in enumerate(messages, 1):
            role, what = message["role"], f"message {number}: the chat template leaves out "
            if role != "assistant":
                kind = f"a {role} message" + " after others" * (number > 1)
                probe = {"role": role, "content": _WORD}
                if not self._writes(kind, [_ASKED, probe, _ASKED][number == 1 :]):
                    raise InputError(f"{what}{kind}")
            for key in _ANSWER_PARTS:
                if message.get(key) and not self.writes_of_answers(key):
                    raise InputError(f"{what}{key}; take it out, or write it into content")

    def writes_of_answers(self, key: str) -> bool:
        """Whether the template writes the tool_calls or the reasoning_content of an answer."""
        said = {"role": "assistant", "content": "a", key: _ANSWER_PARTS[key]}
        return self._writes(key, [_ASKED, said])

    def _writes(self, kind: str, messages: Messages, tools: Any = None) -> bool:
        if kind not in self._written:
            text = _WORD
            # A template that refuses does so for the conversation itself too.
            with contextlib.suppress(InputError):
                text = self.render(messages, tools, False, False, self._variables)
            self._written[kind] = _WORD in text
        return self._written[kind]


def _named(raw: Any, path: Path) -> dict[str, str]:
    """Templates by name, of one text, an object, or a list of {name, template}."""
    if isinstance(raw, str):
        return {"default": raw}
    if isinstance(raw, Mapping):
        return {str(k): str(v) for k, v in raw.items()}
    entries = [] if raw is None else raw if isinstance(raw, list) else [raw]
    for entry in entries:
        if not isinstance(entry, Mapping) or not {"name", "template"} <= entry.keys():
            expected = "a text, an object, or a list of objects with name and template"
            raise unexpected(f"{path}: chat_template", repr(str(entry)[:80]), expected)
    return {str(t["name"]): str(t["template"]) for t in entries}


def _read(path: Path) -> str:
    try:
        return read_regular(path, f"chat template {path}", _LARGEST).decode()
    except UnicodeDecodeError as e:
        raise InputError(f"chat template {path}: byte {e.start} is not UTF-8") from None


class Escape:
    """Marks the special tokens in a text, so that they are encoded as characters.

    The mark is a private-use character that occurs nowhere in what is rendered; `Tokenizer.encode`
    removes it. Beginnings and ends of tokens are marked too, so that no token comes from texts that a
    template joins or cuts.
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
        # A template may change case.
        flags = re.IGNORECASE
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
            texts = ({"text": self.content(x["text"])} if "text" in x else {} for x in content)
            escaped["content"] = [{**item, **text} for item, text in zip(content, texts)]
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
