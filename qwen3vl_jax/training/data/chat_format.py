"""Converts records of both common formats to chat form: {"messages": [...], "tools"?: [...]}.

Unknown keys of records, messages and content items are refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing import image_patches, video_patches
from qwen3vl_jax.processing.media import within
from qwen3vl_jax.processing.messages import CALL_KEYS, MESSAGE_KEYS, REASONING, fields
from qwen3vl_jax.storage.json_text import read_json
from qwen3vl_jax.training.data.objects import with_objects
from qwen3vl_jax.training.recipe import Source

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system", "tool": "tool", "observation": "tool"}
_SOURCES = ("bytes", "path", "url", "base64")
_VIDEOS = ("video", "video_url", "frames")
_PLACES = ("image", "image_url", *_VIDEOS, *_SOURCES)
_MEDIA = ("image", "image_url", "input_image", "video", "video_url", "input_video")
_SWITCHES = ("train", "loss", "weight")
_MOST_WEIGHT = 1_000_000
FIELDS = "messages conversations system tools objects image images video videos".split()
# Keys that describe a record and are ignored. A source may name more in `ignore`.
METADATA = """
    id idx index uid uuid source dataset split task category language metadata width height num_tokens
""".split()
_ITEM = ("type", "text", "index", *_PLACES, *image_patches.OVERRIDES, *video_patches.OVERRIDES)
_TAG = re.compile(r"(?<!\\)(<image>|<video>|<audio>)")
_LITERAL = re.compile(r"\\(<(?:image|video|audio)>)")
_HOW = "a tag that is meant as text has a backslash in front of it, \\<{}>"
_RANKED = "chosen rejected rejected_response rejected_messages rejected_images label labels"
_NOT_LEARNED = "answers are trained on, not preferences or classes"
_PREFERENCES: Mapping[str, str] = dict.fromkeys(_RANKED.split(), _NOT_LEARNED)


def chat_form(record: Any, source: Source | None = None) -> dict[str, Any]:
    """A record as {"messages", "tools"?}. source: the file it is from.

    The official format is {image | video, conversations: [{from, value}]}, with the user's text stripped.
    In both formats each <image> and <video> in a text, and each content item without a source, takes the
    record's next image or video; \\<image> is the text <image>. Raises InputError for unknown keys, and
    if tags and images or videos do not match one to one.
    """
    source = source or Source("")
    shapes = ("messages", "conversations")
    if isinstance(record, Mapping) and sum(record.get(k) is not None for k in shapes) != 1:
        raise InputError("expected messages or conversations, one of the two")
    record = _fields(record, (*FIELDS, *METADATA, *source.ignore), "")
    key = next(k for k in shapes if k in record)
    turns = _from_json(record[key], key)
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)) or not turns:
        raise InputError(f"{key}: expected a list of messages, and at least one")
    pools = {kind: _Pool(record, kind) for kind in ("image", "video")}
    turns, first = _with_system(turns, record.get("system"))
    messages = [_message(turn, n, pools, source) for n, turn in enumerate(turns, first)]
    for kind, pool in pools.items():
        if pool.taken < len(pool.items):
            frames = "; a video given as frames is a list in the list" if kind == "video" else ""
            raise InputError(
                f"{len(pool.items)} {kind}(s) for {pool.taken} <{kind}> tag(s) or content item(s), "
                f"expected one each{frames}"
            )
    objects = _from_json(record.get("objects"), "objects")
    tools = _from_json(record.get("tools"), "tools")
    out = {"messages": with_objects(messages, objects, source.boxes)}
    return out | ({"tools": tools} if tools else {})


def _with_system(turns: Sequence[Any], text: Any) -> tuple[Sequence[Any], int]:
    """(messages with the record's system text first, number of the first message)."""
    if text is None or _blank(text):
        return turns, 1
    if not isinstance(text, str):
        raise InputError(f"system: found {type(text).__name__}, expected one system text")
    first = turns[0] if isinstance(turns[0], Mapping) else {}
    if "system" in (first.get("role"), first.get("from")):
        raise InputError("system: message 1 is a system text too, expected one system text")
    return [{"role": "system", "content": text}, *turns], 0


def _fields(given: Any, known: Sequence[str], where: str) -> dict[str, Any]:
    """An object without its nulls. Raises InputError for an unknown key."""
    if isinstance(given, list):
        raise InputError(
            f"{where}found list, expected an object; only files of JSON may hold lists of records"
        )
    advice = "leave it out, or name it in the source's ignore"
    return fields(given, known, where, advice, _PREFERENCES)


def _message(turn: Any, number: int, pools: "_Pools", source: Source) -> dict[str, Any]:
    """One message in chat form. Its images and videos are taken from the pools."""
    where, official = f"message {number}: ", isinstance(turn, Mapping) and "from" in turn
    own = ("from", "value") if official else ("role", "content")
    given = _fields(turn, (*own, *MESSAGE_KEYS, *_SWITCHES, *source.ignore), where)
    message = {k: v for k, v in given.items() if k not in source.ignore}
    if official:
        role, value = message.pop("from", None), message.pop("value", None)
        if not isinstance(role, str) or role not in _ROLES:
            raise InputError(f"{where}from is {role!r}, expected {', '.join(_ROLES)}")
        if not isinstance(value, str):
            raise InputError(f"{where}value is {type(value).__name__}, expected a text")
        message = {"role": _ROLES[role], "content": value, **message}
    role = message.get("role")
    if calls := _calls(message.pop("tool_calls", None), where):
        message["tool_calls"] = calls
    if (content := message.get("content")) is not None:
        strip = official and role in ("user", "tool")
        given = content if isinstance(content, (list, tuple)) else [content]
        items = [item for x in given for item in _items(x, role, where, pools, strip)]
        is_text = isinstance(content, str) and [x["type"] for x in items] == ["text"]
        resolved = [_within(item, source.media) for item in items]
        message["content"] = items[0]["text"] if is_text else resolved
    elif not calls and not any(key in message for key in REASONING):
        raise InputError(f"{where}it has no content, expected a text or a list of content items")
    for key in REASONING:
        if isinstance(message.get(key), str):
            message[key] = _by_tag(message[key], "assistant", where, pools, False)[0]["text"]
    return _switched(message, where)


def _items(given: Any, role: Any, where: str, pools: "_Pools", strip: bool) -> list[Any]:
    """The items of a content item: its text by tags, or one image or video, the next if it has none."""
    if isinstance(given, str):
        return _by_tag(given, role, where, pools, strip)
    if not isinstance(given, Mapping):
        return [given]
    item = _fields(given, _ITEM, f"{where}content item: ")
    item = {k: v for k, v in item.items() if not (k in _PLACES and _blank(v))}
    kind, has_source = item.get("type", "text"), any(k in item for k in _PLACES)
    if "text" in item and (has_source or kind in _MEDIA) and not _blank(text := item.pop("text")):
        raise InputError(f"{where}content item: it holds {text!r} and more, expected one of them")
    if isinstance(text := item.get("text"), str):
        return _by_tag(text, role, where, pools, False)
    index = item.pop("index", None)
    if has_source or not isinstance(kind, str) or kind not in pools:
        return [item]
    return [{**pools[kind].take(where, index), **item}]


def _by_tag(text: str, role: Any, where: str, pools: "_Pools", strip: bool) -> list[dict[str, Any]]:
    """A text as items: each tag becomes the next one of its pool. Without tags it is one item."""
    parts = [part.strip() if strip else part for part in _TAG.split(text)]
    items = []
    for part in parts:
        if not _TAG.fullmatch(part):
            if part or len(parts) == 1:
                items.append({"type": "text", "text": _LITERAL.sub(r"\1", part)})
        elif part == "<audio>" or role == "assistant":
            why = " in an assistant's text, where none can stand"
            why = ": the model takes images and videos alone" if part == "<audio>" else why
            raise InputError(f"{where}{part}{why}; {_HOW.format(part[1:-1])}")
        else:
            items.append(pools[part[1:-1]].take(where))
    return items


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, also from JSON text. Missing or null arguments are {}."""
    calls, out = _from_json(given, f"{where}tool_calls") or [], []
    named = f"{where}tool_calls: "
    for call in calls if isinstance(calls, (list, tuple)) else [calls]:
        outer = isinstance(call, Mapping) and call.get("function")
        inner = _fields(call, ("id", "type", "index", "function"), named) if outer else {}
        called = _fields(inner.get("function", call), ("id", "type", *CALL_KEYS), named)
        name, arguments = called.get("name"), called.get("arguments", "")
        if not isinstance(name, str) or not isinstance(arguments, (str, Mapping)):
            raise InputError(f"{named}expected a list of objects with name and arguments")
        if isinstance(arguments, str):
            found = _from_json(arguments, f"{where}arguments of {name}")
            if not isinstance(found, Mapping | None):
                raise InputError(f"{where}arguments of {name}: got {found!r}, expected an object")
            arguments = arguments if found else {}
        out.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return out


def _switched(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with its train, loss and weight as one "train" (bool) and one "weight" above 0."""
    given = {key: message.pop(key) for key in _SWITCHES if key in message}
    weight = given.pop("weight", 1)
    for key, value in given.items():
        if not isinstance(value, bool):
            raise InputError(f"{where}{key} is {value!r}, expected true or false")
    if type(weight) not in (int, float) or not 0 <= weight <= _MOST_WEIGHT:
        raise InputError(f"{where}weight is {weight!r}, expected a number from 0 to {_MOST_WEIGHT}")
    says = {*given.values(), *([False] if weight == 0 else [])}
    if len(says) > 1:
        raise InputError(f"{where}train, loss and weight say on and off, expected one of them")
    if message.get("role") != "assistant" and (True in says or weight not in (0, 1)):
        raise InputError(f"{where}it is to be learned, and only an assistant's message can be")
    message |= {"train": says.pop()} if says else {}
    return message | ({"weight": float(weight)} if weight not in (0, 1) else {})


class _Pool:
    """The images or videos of a record's own keys, which tags and items take in order."""

    def __init__(self, record: Mapping[str, Any], kind: str):
        self.kind, self.taken, self.items = kind, 0, []
        for name in (kind, f"{kind}s"):
            given = record.get(name)
            for x in given if isinstance(given, (list, tuple)) else [given]:
                # A source, the frames of a video, or an object with a source and settings.
                if isinstance(x, Mapping) and not set(x) <= {*_SOURCES} and not _blank(x):
                    self.items.append({"type": kind, **_fields(x, _ITEM, f"{name}: ")})
                elif x is not None and not _blank(x):
                    self.items.append({"type": kind, kind: x})

    def take(self, where: str, index: Any = None) -> dict[str, Any]:
        """The next one as a content item. Raises InputError if none is left, or for another index."""
        if index is not None and index != self.taken:
            raise InputError(
                f"{where}index is {index!r}, expected {self.taken}: items take {self.kind}s in order"
            )
        if self.taken == len(self.items):
            one, how = "an image" if self.kind == "image" else "a video", _HOW.format(self.kind)
            raise InputError(f"{where}a place for {one} without {one} left for it; {how}")
        self.taken += 1
        return self.items[self.taken - 1]


_Pools = Mapping[str, _Pool]


def _blank(given: Any) -> bool:
    """Whether a value means no image or video: "", or an object of nulls."""
    if isinstance(given, Mapping):
        return all(value is None for value in given.values())
    return isinstance(given, str) and not given


def _within(item: Any, media: str) -> Any:
    """A content item whose relative paths are resolved from the media folder."""
    if not isinstance(item, Mapping):
        return item
    is_video = str(item.get("type")) in (*_VIDEOS, "input_video")
    kinds = {k: "video" if is_video or k in _VIDEOS else "image" for k in _PLACES}
    return {k: within(v, kinds[k], media) if k in kinds else v for k, v in item.items()}


def without_nulls(value: Any) -> Any:
    """A Parquet row without nulls, which are keys of other rows."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _from_json(value: Any, name: str) -> Any:
    """The value of a JSON text, None for an empty one. Other values stay as they are."""
    if not isinstance(value, str):
        return value
    return None if _blank(value) else read_json(value, name)
