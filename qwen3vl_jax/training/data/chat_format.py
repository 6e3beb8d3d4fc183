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

Record = dict[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system", "tool": "tool", "observation": "tool"}
_POOLS = {"image": ("image", "images"), "video": ("video", "videos")}
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
_MESSAGE = (*MESSAGE_KEYS, *_SWITCHES)
_ITEM = ("type", "text", "index", *_PLACES, *image_patches.OVERRIDES, *video_patches.OVERRIDES)
_TAG = re.compile(r"(?<!\\)(<image>|<video>|<audio>)")
_LITERAL = re.compile(r"\\(<(?:image|video|audio)>)")
_HOW = "a tag that is meant as text has a backslash in front of it, \\<{}>"
_RANKED = "chosen rejected rejected_response rejected_messages rejected_images label labels"
_NOT_LEARNED = "answers are trained on, not preferences or classes"
_PREFERENCES: Mapping[str, str] = dict.fromkeys(_RANKED.split(), _NOT_LEARNED)


def chat_form(record: Any, source: Source | None = None) -> Record:
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
    pools = {kind: _Pool(record, kind) for kind in _POOLS}
    turns, first = _with_system(turns, record.get("system"))
    messages = [_message(turn, n, pools, source.ignore) for n, turn in enumerate(turns, first)]
    for kind, pool in pools.items():
        if pool:
            frames = "; a video given as frames is a list in the list" if kind == "video" else ""
            raise InputError(
                f"{pool.total} {kind}(s) for {pool.total - len(pool)} <{kind}> tag(s) or content "
                f"item(s), expected one each{frames}"
            )
    messages = [_with_media(message, source.media) for message in messages]
    objects = _from_json(record.get("objects"), "objects")
    out: Record = {"messages": with_objects(messages, objects, source.boxes)}
    if tools := _from_json(record.get("tools"), "tools"):
        out["tools"] = tools
    return out


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


def _message(
    turn: Any, number: int, pools: dict[str, "_Pool"], ignore: Sequence[str]
) -> dict[str, Any]:
    """One message in chat form. Its images and videos are taken from the pools."""
    where = f"message {number}: "
    official = isinstance(turn, Mapping) and "from" in turn
    known = (*(("from", "value") if official else ("role", "content")), *_MESSAGE, *ignore)
    message = {k: v for k, v in _fields(turn, known, where).items() if k not in ignore}
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
    if "content" in message:
        strip = official and role in ("user", "tool")
        message["content"] = _content(message["content"], role, where, pools, strip)
    elif not calls and not any(key in message for key in REASONING):
        raise InputError(f"{where}it has no content, expected a text or a list of content items")
    for key in REASONING:
        if isinstance(message.get(key), str):
            message[key] = _by_tag(message[key], "assistant", where, pools, False)
    return _switched(message, where)


def _content(content: Any, role: Any, where: str, pools: dict[str, "_Pool"], strip: bool) -> Any:
    """A message's content, with tags and items without a source filled."""
    if isinstance(content, str):
        return _by_tag(content, role, where, pools, strip)
    out: list[Any] = []
    for given in content if isinstance(content, (list, tuple)) else [content]:
        item = _item(given, where) if isinstance(given, Mapping) else given
        text = item.get("text") if isinstance(item, Mapping) else item
        if isinstance(text, str):
            text = _by_tag(text, role, where, pools, False)
            out += [{"type": "text", "text": text}] if isinstance(text, str) else text
        else:
            out.append(_filled(item, where, pools))
    return out


def _item(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A content item without blank sources. It holds a text, or an image or video."""
    item = _fields(given, _ITEM, f"{where}content item: ")
    item = {k: v for k, v in item.items() if not (k in _PLACES and _blank(v))}
    is_media = item.get("type", "text") in _MEDIA or any(k in item for k in _PLACES)
    if "text" in item and is_media and not _blank(text := item.pop("text")):
        raise InputError(f"{where}content item: it holds {text!r} and more, expected one of them")
    return item


def _by_tag(text: str, role: Any, where: str, pools: dict[str, "_Pool"], strip: bool) -> Any:
    """A text as content: each tag becomes the next item of its pool."""
    parts = [part.strip() if strip else part for part in _TAG.split(text)]
    if len(parts) == 1:
        return _LITERAL.sub(r"\1", parts[0])
    items = []
    for part in parts:
        if not _TAG.fullmatch(part):
            items += [{"type": "text", "text": _LITERAL.sub(r"\1", part)}] if part else []
        elif part == "<audio>" or role == "assistant":
            why = " in an assistant's text, where none can stand"
            why = ": the model takes images and videos alone" if part == "<audio>" else why
            raise InputError(f"{where}{part}{why}; {_HOW.format(part[1:-1])}")
        else:
            items.append(_next(part[1:-1], where, pools))
    return items


def _next(kind: str, where: str, pools: dict[str, "_Pool"]) -> dict[str, Any]:
    if not pools[kind]:
        one = "an image" if kind == "image" else "a video"
        how = _HOW.format(kind)
        raise InputError(f"{where}a place for {one} without {one} left for it; {how}")
    return pools[kind].pop(0)


def _filled(item: Any, where: str, pools: dict[str, "_Pool"]) -> Any:
    """A content item. An image or video item without a source takes the next of its pool."""
    if not isinstance(item, dict):
        return item
    kind, index = item.get("type"), item.pop("index", None)
    if not isinstance(kind, str) or kind not in pools or any(key in item for key in _PLACES):
        return item
    pool = pools[kind]
    if index is not None and index != (at := pool.total - len(pool)):
        raise InputError(f"{where}index is {index!r}, expected {at}: items take {kind}s in order")
    return {**_next(kind, where, pools), **item}


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, also from JSON text. Missing or null arguments are {}."""
    calls, out = _from_json(given, f"{where}tool_calls") or [], []
    for given_call in calls if isinstance(calls, (list, tuple)) else [calls]:
        named, call = f"{where}tool_calls: ", given_call
        if isinstance(call, Mapping) and call.get("function"):
            call = _fields(call, ("id", "type", "index", "function"), named)["function"]
        called = _fields(call, ("id", "type", *CALL_KEYS), named)
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


class _Pool(list[Any]):
    """The images or videos of a record's own keys that no tag has taken yet, as content items."""

    def __init__(self, record: Mapping[str, Any], kind: str):
        for name in _POOLS[kind]:
            given = record.get(name)
            given = given if isinstance(given, (list, tuple)) else [given]
            self += [_pooled(x, kind, name) for x in given if x is not None and not _blank(x)]
        # How many there were.
        self.total = len(self)


def _pooled(given: Any, kind: str, name: str) -> dict[str, Any]:
    """One content item of a source, the frames of a video, or an object with a source and settings."""
    if isinstance(given, Mapping) and not set(given) <= {*_SOURCES}:
        return {"type": kind, **_fields(given, _ITEM, f"{name}: ")}
    return {"type": kind, kind: given}


def _blank(given: Any) -> bool:
    """Whether a value means no image or video: "", or an object of nulls."""
    if isinstance(given, Mapping):
        return all(value is None for value in given.values())
    return isinstance(given, str) and not given


def _with_media(message: dict[str, Any], media: str) -> dict[str, Any]:
    """A message whose relative paths are resolved from the media folder."""
    content = message.get("content")
    if not isinstance(content, list):
        return message

    def resolved(item: Any) -> Any:
        if not isinstance(item, Mapping):
            return item
        is_video = str(item.get("type")) in (*_VIDEOS, "input_video")
        kinds = {k: "video" if is_video or k in _VIDEOS else "image" for k in _PLACES}
        return {k: within(v, kinds[k], media) if k in kinds else v for k, v in item.items()}

    return {**message, "content": [resolved(item) for item in content]}


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
