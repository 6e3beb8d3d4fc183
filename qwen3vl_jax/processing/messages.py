"""Conversations: messages as a template gets them, and the images and videos in them."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from qwen3vl_jax.errors import InputError, unexpected
from qwen3vl_jax.processing import image_patches, video_patches
from qwen3vl_jax.processing.media import inner, is_empty
from qwen3vl_jax.processing.qwen_items import KEYS, VideoItem
from qwen3vl_jax.processing.settings import MODEL_SIZES
from qwen3vl_jax.storage.json_text import MAX_DEPTH

_SOURCES = ("url", "path", "base64", "bytes")
# By kind of a content item: its types, and the keys that hold a source.
_TYPES = {
    "video": ("video", "video_url", "input_video"),
    "image": ("image", "image_url", "input_image"),
    "text": ("text", "input_text", "output_text"),
}
_PLACES = {"video": ("video", "video_url", "frames"), "image": ("image", "image_url", *_SOURCES)}
_PLACES["text"] = ("text",)
_ROLES = ("system", "user", "assistant", "tool", "developer", "function")
# Variables of a template that the processor sets.
_TAKEN = ("self", "messages", "tools", "add_generation_prompt")
REASONING = ("reasoning_content", "thinking", "reasoning")
CALL_KEYS = ("name", "arguments")
# Keys of a message besides its role and content.
MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", *REASONING)
_HINT = 'an image or video is an item of the content, {"type": "image", "image": "a.png"}'
_HINTS: dict[str, str] = dict.fromkeys(
    "image images image_url video videos video_url".split(), _HINT
)
# The keys of a message that a template reads: message.x, message['x'], message.get('x').
_NAMED = re.compile(r"""\bmessages?(?:\[[^\]]*\])?(?:\.get\(|\.|\[)['"]?([A-Za-z_]\w*)""")


@dataclasses.dataclass(frozen=True)
class MediaSource:
    """An image or video of a conversation, not read yet. source None: the next one passed beside it."""

    kind: str  # "image" or "video"
    source: Any
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_conversation(conversation: Any) -> tuple[list[dict[str, Any]], list[MediaSource]]:
    """Messages as a template gets them, and their images and videos in order. Raises InputError.

    Messages are plain data without nulls; images become {"type": "image", "image": "image"}, videos
    {"type": "video", "video": "video"}, text {"type": "text", "text": ...}.
    """
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
        expected = "a list of messages (role, content)"
        raise unexpected("conversation", type(conversation).__name__, expected)
    if not conversation:
        raise InputError("conversation: it has no message")
    messages: list[dict[str, Any]] = []
    sources: list[MediaSource] = []
    for number, given in enumerate(conversation, 1):
        where = f"message {number}"
        if not isinstance(given, Mapping) or not isinstance(role := given.get("role"), str):
            raise InputError(f"{where}: expected an object with role and content")
        if role not in _ROLES:
            raise unexpected(f"{where}: role", repr(role), f"one of {', '.join(_ROLES)}")
        content = given.get("content")
        plain = plain_data({k: v for k, v in given.items() if k != "content" and v is not None})
        if isinstance(content, str):
            plain["content"] = content
        elif content is not None:
            items = content if isinstance(content, (list, tuple)) else [content]
            plain["content"] = [read_item(item, sources, where) for item in items]
        reasoning = next((plain[k] for k in REASONING if plain.get(k) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        messages.append(plain)
    return messages, sources


def check_messages(messages: Sequence[Mapping[str, Any]], template: str) -> None:
    """Raises InputError for a message without content, and for keys that the template does not know."""
    known = ("role", "content", *MESSAGE_KEYS, *_NAMED.findall(template))
    for number, message in enumerate(messages, 1):
        where = f"message {number}: "
        # An answer of OpenAI's library has lists without an entry.
        fields({k: v for k, v in message.items() if v != []}, known, where, hints=_HINTS)
        if not any(k in message for k in ("content", *REASONING)) and not message.get("tool_calls"):
            raise InputError(f"{where}content is missing, expected a text or a list of items")
        calls = message.get("tool_calls") or []
        for given in calls if isinstance(calls, list) else [calls]:
            keys, where_call = ("id", "type", "index", "function"), f"{where}tool_calls: "
            if function := fields(given, (*keys, *CALL_KEYS), where_call).get("function"):
                fields(function, CALL_KEYS, where_call)


def fields(
    given: Any,
    known: Sequence[str],
    where: str,
    advice: str = "leave it out",
    hints: Mapping[str, str] = {},
) -> dict[str, Any]:
    """An object without its nulls. Raises InputError for a key that means nothing here."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where}found {type(given).__name__}, expected an object")
    found = {key: value for key, value in given.items() if value is not None}
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.75)
            hint = f"did you mean {near[0]}" if near else "it means nothing here"
            raise InputError(f"{where}unknown key {key!r} ({hints.get(key, hint)}); {advice}")
    return found


def read_item(item: Any, sources: list[MediaSource], where: str) -> dict[str, Any]:
    """One content item as the template gets it; its image or video is appended to sources."""
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if isinstance(item, Image.Image) or hasattr(item, "__array__"):
        item = {"type": "image", "image": item}
    where = f"{where}: content item: "
    if not isinstance(item, Mapping):
        raise InputError(f"{where}got {type(item).__name__}, expected text or an object")
    given = {k: v for k, v in item.items() if v is not None}
    kind = _kind(given, where)
    places, names = _PLACES[kind], ()
    if kind == "image":
        # A key of OpenAI's models alone.
        given.pop("detail", None)
        names = image_patches.OVERRIDES
    elif kind == "video":
        places, names = (*places, *_SOURCES), video_patches.OVERRIDES
    if fixed := [key for key in MODEL_SIZES if key in given]:
        raise InputError(f"{where}it has {fixed[0]}, which is the model's; leave it out")
    empty = {k for keys in _PLACES.values() for k in keys if is_empty(given.get(k))}
    fields({k: v for k, v in given.items() if k not in empty}, ("type", *places, *names), where)
    if kind == "text":
        return {"type": "text", "text": given["text"]}
    found = {key: given[key] for key in places if key in given}
    if "bytes" in found:  # {"bytes": .., "path": ..}
        found.pop("path", None)
    if len(found) > 1:
        raise InputError(f"{where}it has several sources: {', '.join(found)}")
    key, source = next(iter(found.items()), ("", None))
    held = found if key in ("bytes", "base64") else source
    source = inner(held, where + key) if isinstance(held, Mapping) else source
    settings = {name: given[name] for name in names if name in given}
    if kind == "video":
        try:
            rule = VideoItem.of(settings)
        except InputError as e:
            raise InputError(f"{where}{e}") from None
        # The others are settings of transformers' video processor.
        settings = {"item": rule, **{k: v for k, v in settings.items() if k not in KEYS}}
    sources.append(MediaSource(kind, source, settings))
    return {"type": kind, kind: kind}


def _kind(given: Mapping[str, Any], where: str) -> str:
    media = (*_PLACES["video"], *_PLACES["image"])
    places = [k for k in media if not is_empty(given.get(k, ""))]
    if places and given.get("text"):
        raise InputError(f"{where}it has text and {places[0]}, expected one of them")
    name = given.get("type", "")
    for kind, types in _TYPES.items():
        if name in types or (not name and any(k in given for k in _PLACES[kind])):
            break
    else:
        found = f"type {name!r}" if name else f"the keys {', '.join(map(str, given)) or '(none)'}"
        raise InputError(f"{where}it has {found}, expected text, an image or a video")
    if kind == "text" and not isinstance(text := given.get("text"), str):
        others = ", ".join(repr(k) for k in given if k != "type") or "nothing"
        others = f"{type(text).__name__} there" if "text" in given else others
        raise InputError(f"{where}type 'text' without 'text'; found {others}")
    return kind


def plain_data(value: Any, depth: int = 0) -> Any:
    """JSON data without its owner's classes, whose methods a template could call. Raises InputError."""
    if depth > MAX_DEPTH:
        raise InputError(f"conversation: data nested more than {MAX_DEPTH} deep")
    depth += 1
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # An enum's name is not its text.
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {plain_data(k, depth): plain_data(v, depth) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(v, depth) for v in value]
    if getattr(value, "ndim", None) == 0:  # a numpy number
        return plain_data(value.item())
    raise unexpected("conversation", type(value).__name__, "text, numbers, lists and objects")


def plain_options(
    tools: Any, variables: Mapping[str, Any]
) -> tuple[list[Any] | None, dict[str, Any]]:
    """`plain_data` of a conversation's tools and a template's variables. Raises InputError."""
    if wrong := [k for k in variables if not isinstance(k, str) or k in _TAKEN]:
        raise unexpected("template_vars", repr(wrong[0]), f"names but {', '.join(_TAKEN)}")
    given = [] if tools is None else tools
    if not isinstance(given, Sequence) or not all(isinstance(t, Mapping) for t in given):
        found = f"got {type(tools).__name__}, " if not isinstance(tools, list) else ""
        raise InputError(f"tools: {found}expected a list of JSON schemas (objects)")
    plain = None if tools is None else [plain_data(tool) for tool in tools]
    return plain, plain_data(dict(variables))
