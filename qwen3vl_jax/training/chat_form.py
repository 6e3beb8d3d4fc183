"""Records of both shapes in one: {"messages": [...], "tools"?: [...]}, media inside the messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.json_text import read_json

Record = dict[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system", "tool": "tool", "observation": "tool"}  # fmt: skip
_POOLS = {"image": ("image", "images"), "video": ("video", "videos")}
_PLACES = ("image", "video", "image_url", "video_url", "url", "path")
_TAG = re.compile("(<image>|<video>)")
_LONGEST_PATH = 4096


def chat_form(record: Any, media: str = "") -> Record:
    """A record of either shape as {"messages", "tools"?}; media: the folder of relative paths.

    In the shape of the official code, {image | video, conversations: [{from, value}]}, each <image>
    and <video> of a user's text is the next picture or clip, and the text around it is stripped, as
    there. In chat shape a record may hold images and videos beside its messages: for content items
    without a source and for tags, in order. Raises InputError, also where they do not come out even.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"found {type(record).__name__}, expected an object")
    keys = [k for k in ("messages", "conversations") if record.get(k) is not None]
    if len(keys) != 1:
        raise InputError("expected messages or conversations, one of the two")
    turns = _from_json(record[keys[0]], keys[0])
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)) or not turns:
        raise InputError(f"{keys[0]}: expected a list of messages, and at least one")
    pools = {kind: _pool(record, names) for kind, names in _POOLS.items()}
    given = {kind: len(pool) for kind, pool in pools.items()}
    messages = [_message(turn, number, pools) for number, turn in enumerate(turns, 1)]
    for kind, pool in pools.items():
        if pool:
            raise InputError(
                f"{given[kind]} {kind}(s) for {given[kind] - len(pool)} <{kind}> tag(s) or content "
                "item(s), expected one each"
            )
    out: Record = {"messages": [_with_media(message, media) for message in messages]}
    if (tools := _from_json(record.get("tools"), "tools")) is not None:
        out["tools"] = tools
    return out


def _message(turn: Any, number: int, pools: dict[str, list[Any]]) -> dict[str, Any]:
    """One message in chat form; its pictures and clips are taken off the pools."""
    if not isinstance(turn, Mapping):
        raise InputError(f"message {number}: found {type(turn).__name__}, expected an object")
    if "from" not in turn:
        content = turn.get("content")
        tags = any(pools.values()) and turn.get("role") != "assistant"
        if isinstance(content, str) and tags and _TAG.search(content):
            return {**turn, "content": _by_tag(content, number, pools, strip=False)}
        if isinstance(content, (list, tuple, Mapping)):
            items = [content] if isinstance(content, Mapping) else content
            return {**turn, "content": [_filled(item, number, pools) for item in items]}
        return dict(turn)
    role, value = turn["from"], turn.get("value")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"message {number}: from is {role!r}, expected {', '.join(_ROLES)}")
    if not isinstance(value, str):
        raise InputError(f"message {number}: value is {type(value).__name__}, expected a text")
    message = {k: v for k, v in turn.items() if k not in ("from", "value")}
    message["role"] = _ROLES[role]
    user = message["role"] in ("user", "tool")
    message["content"] = _by_tag(value, number, pools, strip=True) if user else value
    return message


def _by_tag(text: str, number: int, pools: dict[str, list[Any]], strip: bool) -> Any:
    """A text as content: each tag is the next of its pool, what lies between them is text."""
    parts = [part.strip() if strip else part for part in _TAG.split(text)]
    if len(parts) == 1:
        return parts[0]
    items = []
    for part in parts:
        if _TAG.fullmatch(part):
            items.append(_next(part[1:-1], number, pools))
        elif part:
            items.append({"type": "text", "text": part})
    return items


def _next(kind: str, number: int, pools: dict[str, list[Any]]) -> dict[str, Any]:
    if not pools[kind]:
        raise InputError(f"message {number}: a <{kind}> without a {kind} left for it")
    return {"type": kind, kind: pools[kind].pop(0)}


def _filled(item: Any, number: int, pools: dict[str, list[Any]]) -> Any:
    """A content item; an empty place for a picture or clip takes the next of its pool."""
    if not isinstance(item, Mapping):
        return item
    item = {k: v for k, v in item.items() if v is not None}
    kind = item.get("type")
    if kind in pools and not any(key in item for key in (*_PLACES, "base64")):
        return {**item, **_next(kind, number, pools)}
    return item


def _pool(record: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The pictures or clips that lie beside the messages of a record, in order."""
    found: list[Any] = []
    for name in names:
        given = record.get(name)
        given = given if isinstance(given, (list, tuple)) else [given]
        found += [_source(x, name) for x in given if x is not None and not _blank(x)]
    return found


def _blank(given: Any) -> bool:
    """Whether this is the "" that stands for no picture in files whose other records have one."""
    return isinstance(given, str) and not given


def _source(given: Any, name: str) -> Any:
    """A picture or clip; of {bytes, path}, as in Hugging Face's data sets, the bytes come first."""
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if not isinstance(given, (str, bytes)) or not given:
        raise InputError(f"{name}: found {type(given).__name__}, expected a path or bytes")
    return given


def _with_media(message: dict[str, Any], media: str) -> dict[str, Any]:
    """A message whose relative paths start at the folder of its media."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    items = []
    for item in content:
        places = [key for key in _PLACES if isinstance(item, Mapping) and key in item]
        items.append({**item, **{k: _whole(item[k], media) for k in places}} if places else item)
    return {**message, "content": items}


def _whole(place: Any, media: str) -> Any:
    """A path made whole; addresses, data and what is no text stay as they are."""
    if isinstance(place, (list, tuple)):  # the frames of a clip
        return [_whole(frame, media) for frame in place]
    if isinstance(place, Mapping) and isinstance(place.get("url"), str):
        return {**place, "url": _whole(place["url"], media)}
    if not isinstance(place, str) or len(place) > _LONGEST_PATH or re.match(r"\w{2,5}:", place):
        return place
    return os.path.join(media, place)


def without_nulls(value: Any) -> Any:
    """Parquet rows without their nulls, which stand for keys that only other rows have."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _from_json(value: Any, name: str) -> Any:
    """What a column of JSON text says; anything else as it is."""
    if not isinstance(value, str):
        return value
    return read_json(value, name)


def parsed(text: bytes) -> Any:
    """JSON data of a text. Raises InputError."""
    return read_json(text, "", large=True)
