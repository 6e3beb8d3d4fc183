"""Conversations: messages as a template sees them, and the pictures and clips in them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing import video_patches as clip_settings
from qwen3vl_jax.processing.image_patches import OVERRIDES
from qwen3vl_jax.processing.media import inner, is_empty
from qwen3vl_jax.processing.qwen_items import KEYS, VideoItem
from qwen3vl_jax.storage.json_text import MAX_DEPTH

_SOURCES = ("url", "path", "base64", "bytes")
_PICTURE_KEYS = ("image", "image_url", *_SOURCES)
_PICTURE_TYPES = ("image", "image_url", "input_image")
_CLIP_KEYS = ("video", "video_url", "frames")
_CLIP_TYPES = ("video", "video_url", "input_video")
_TEXT_TYPES = ("text", "input_text", "output_text")
_ROLES = ("system", "user", "assistant", "tool", "developer", "function")
_RIVALS = {"fps": ("nframes", "num_frames"), "num_frames": ("nframes", "fps")}
_SIZES = ("min_pixels", "max_pixels", "size", "resized_height", "resized_width")
# Sizes that are the model's, not an item's.
_FIXED = ("patch_size", "temporal_patch_size", "merge_size")
# Variables of a template that the processor fills.
_TAKEN = ("self", "messages", "tools", "add_generation_prompt")
REASONING = ("reasoning_content", "thinking", "reasoning")
CALL_KEYS = ("name", "arguments")
# What a message may have besides its role and content.
MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", *REASONING)
_HINTS: Mapping[str, str] = dict.fromkeys(
    ("image", "images", "image_url", "video", "videos", "video_url"),
    'an image or video is an item of the content, {"type": "image", "image": "a.png"}',
)
# A template's own name of what a message has: message.x, message['x'], message.get('x').
_NAMED = re.compile(r"""\bmessages?(?:\[[^\]]*\])?(?:\.get\(|\.|\[)['"]?([A-Za-z_]\w*)""")


@dataclasses.dataclass(frozen=True)
class MediaSource:
    """A picture or clip of a conversation. source None: the next of those passed beside it."""

    kind: str  # "image" or "video"
    source: Any
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_conversation(conversation: Any) -> tuple[list[dict[str, Any]], list[MediaSource]]:
    """Messages as a template sees them, and their media in order.

    Messages are plain data: keys that are null are dropped, pictures become {"type": "image",
    "image": "image"}, clips {"type": "video", "video": "video"}, text {"type": "text", "text":
    ...}. Raises InputError.
    """
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
        found = type(conversation).__name__
        raise InputError(
            f"conversation: found {found}, expected a list of messages (role, content)"
        )
    if not conversation:
        raise InputError("conversation: it has no message")
    messages: list[dict[str, Any]] = []
    media: list[MediaSource] = []
    for number, given in enumerate(conversation):
        where = f"message {number + 1}"
        if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
            raise InputError(f"{where}: expected an object with role and content")
        if given["role"] not in _ROLES:
            known = ", ".join(_ROLES)
            raise InputError(f"{where}: role is {given['role']!r}, expected one of {known}")
        content = given.get("content")
        plain = plain_data({k: v for k, v in given.items() if k != "content" and v is not None})
        if isinstance(content, str):
            plain["content"] = content
        elif content is not None:
            items = content if isinstance(content, (list, tuple)) else [content]
            plain["content"] = [_item(item, media, where) for item in items]
        reasoning = next((plain[k] for k in REASONING if plain.get(k) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        messages.append(plain)
    return messages, media


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
            keys, said = ("id", "type", "index", "function", *CALL_KEYS), f"{where}tool_calls: "
            if function := fields(given, keys, said).get("function"):
                fields(function, CALL_KEYS, said)


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


def _item(item: Any, media: list[MediaSource], where: str) -> dict[str, Any]:
    """One content item as the template sees it; its picture or clip is appended to media."""
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if isinstance(item, Image.Image) or hasattr(item, "__array__"):
        item = {"type": "image", "image": item}
    if not isinstance(item, Mapping):
        raise InputError(
            f"{where}: a content item is {type(item).__name__}, expected text or an object"
        )
    given = {k: v for k, v in item.items() if v is not None}
    kind = given.get("type", "")
    places = [k for k in (*_CLIP_KEYS, *_PICTURE_KEYS) if k in given and not is_empty(given[k])]
    if places and given.get("text"):
        raise InputError(f"{where}: a content item has text and {places[0]}, expected one of them")
    if kind in _CLIP_TYPES or (not kind and any(k in given for k in _CLIP_KEYS)):
        keys = (*_CLIP_KEYS, *_SOURCES)
        own = _settings(given, clip_settings.OVERRIDES, keys, where)
        source = _source(given, keys, where)
        try:
            rule = VideoItem.of(own)
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        # What is left are settings of transformers' video processor.
        left = {k: v for k, v in own.items() if k not in KEYS}
        media.append(MediaSource("video", source, {"item": rule, **left}))
        return {"type": "video", "video": "video"}
    if kind in _PICTURE_TYPES or (not kind and any(k in given for k in _PICTURE_KEYS)):
        # A key of OpenAI's models alone.
        given.pop("detail", None)
        overrides = _settings(given, OVERRIDES, _PICTURE_KEYS, where)
        media.append(MediaSource("image", _source(given, _PICTURE_KEYS, where), overrides))
        return {"type": "image", "image": "image"}
    if kind in _TEXT_TYPES or (not kind and "text" in given):
        if not isinstance(given.get("text"), str):
            others = ", ".join(repr(k) for k in given if k != "type") or "nothing"
            others = f"{type(given['text']).__name__} there" if "text" in given else others
            raise InputError(f"{where}: type 'text' without 'text'; found {others}")
        _settings(given, (), ("text",), where)
        return {"type": "text", "text": given["text"]}
    found = f"type {kind!r}" if kind else f"the keys {', '.join(map(str, given)) or '(none)'}"
    raise InputError(f"{where}: a content item has {found}, expected text, an image or a video")


def _settings(
    item: Mapping[str, Any], names: Sequence[str], sources: Sequence[str], where: str
) -> dict[str, Any]:
    """The settings of a content item; raises InputError for a key that means nothing in it."""
    empty = {k for k in (*_CLIP_KEYS, *_PICTURE_KEYS, "text") if is_empty(item.get(k))}
    for key in _FIXED:
        if key in item:
            raise InputError(
                f"{where}: a content item has {key}, which is the model's; leave it out"
            )
    filled = {k: v for k, v in item.items() if k not in empty}
    fields(filled, ("type", *sources, *names), f"{where}: content item: ")
    return {name: item[name] for name in names if name in item}


def read_medium(given: Any, medium: MediaSource) -> MediaSource:
    """An image or video passed beside the text: its source, or an object with settings of its own."""
    kind = medium.kind
    if not isinstance(given, Mapping):
        own = {k: v for k, v in medium.settings.items() if k != "item" or v.given}
        return MediaSource(kind, given, own)
    media: list[MediaSource] = []
    _item({"type": kind, **given}, media, f"{kind}s")
    if [(m.kind, m.source is None) for m in media] != [(kind, False)]:
        raise InputError(f"{kind}s: got an object without its source, expected one of them")
    return MediaSource(kind, media[0].source, {**medium.settings, **media[0].settings})


def hand_out(
    rows: list[list[MediaSource]], images: Any, videos: Any = None
) -> list[list[MediaSource]]:
    """The media of each row, those without a source filled from what was passed beside the text.

    images: one, a list taken in order, or a list a row. videos: one clip (a list of frames that are
    not text is one, and so are a video and its metadata), or a list of them taken in order. Raises
    InputError if they do not come out even.
    """
    pictures, clips = iter(_pictures(rows, images)), iter(_clips(rows, videos))

    def filled(medium: MediaSource) -> MediaSource:
        if medium.source is not None:
            return medium
        return read_medium(next(pictures if medium.kind == "image" else clips), medium)

    return [[filled(medium) for medium in row] for row in rows]


def with_video_options(
    media: list[list[MediaSource]], videos_kwargs: Mapping[str, Any]
) -> list[list[MediaSource]]:
    """The clips with the options of the call under their own; video_metadata is one a clip.

    A clip's own fps takes the place of the call's num_frames, and its num_frames that of fps.
    """
    if not isinstance(videos_kwargs, Mapping):
        raise InputError(f"videos_kwargs: got {type(videos_kwargs).__name__}, expected an object")
    options = dict(videos_kwargs)
    metadata = options.pop("video_metadata", None)
    clips = sum(medium.kind == "video" for row in media for medium in row)
    given = list(metadata) if isinstance(metadata, (list, tuple)) else [metadata] * min(clips, 1)
    if metadata is not None and len(given) != clips:
        raise InputError(f"video_metadata: {len(given)} for {clips} clip(s), expected one each")
    feed = iter(given if metadata is not None else [None] * clips)

    def extended(medium: MediaSource) -> MediaSource:
        if medium.kind != "video":
            return medium
        own, rule = dict(medium.settings), medium.settings.get("item")
        names = {*own, *(rule.given if rule else ())}
        under = {k: v for k, v in options.items() if not names & {k, *_RIVALS.get(k, ())}}
        if rule and not names.isdisjoint((*_SIZES, "total_pixels")):
            under = {k: v for k, v in under.items() if k not in _SIZES}
        elif rule and not under.keys().isdisjoint(_SIZES):
            own["item"] = dataclasses.replace(rule, resizes=False)
        return dataclasses.replace(medium, settings={"video_metadata": next(feed), **under, **own})

    return [[extended(medium) for medium in row] for row in media]


def _waiting(rows: list[list[MediaSource]], kind: str) -> list[int]:
    return [sum(m.source is None and m.kind == kind for m in row) for row in rows]


def _clips(rows: list[list[MediaSource]], videos: Any) -> list[Any]:
    is_list = isinstance(videos, (list, tuple)) and not clip_settings.is_pair(videos)
    given = [] if videos is None else list(videos) if is_list else [videos]
    if given and all(isinstance(v, Image.Image) or getattr(v, "ndim", 0) == 3 for v in given):
        given = [given]
    if len(given) != (wanted := sum(_waiting(rows, "video"))):
        raise InputError(placeholder_mismatch("", wanted, len(given), "video"))
    return given


def _pictures(rows: list[list[MediaSource]], images: Any) -> list[Any]:
    waiting, given = _waiting(rows, "image"), _list(images)
    if any(isinstance(image, (list, tuple)) for image in given):
        if len(given) != len(rows):
            raise InputError(f"images: found {len(given)} lists for {len(rows)} rows of text")
        for number, (image, n) in enumerate(zip(given, waiting)):
            if len(_list(image)) != n:
                where = f"row {number + 1}: "
                raise InputError(placeholder_mismatch(where, n, len(_list(image))))
        given = [image for row in given for image in _list(row)]
    if len(given) != sum(waiting):
        raise InputError(placeholder_mismatch("", sum(waiting), len(given)))
    return given


def placeholder_mismatch(where: str, placeholders: int, found: int, kind: str = "image") -> str:
    """The error of a prompt that has more or fewer placeholders than images or videos."""
    return (
        f"{where}{placeholders} {kind} placeholder(s) in the prompt for {found} {kind}(s); each {kind} "
        f"needs a content item of its own ({{type: {kind}}}), and each such item a path, "
        f"or one of {kind}s= (--{kind})"
    )


def _list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _source(item: Mapping[str, Any], keys: Iterable[str], where: str) -> Any:
    found = {key: item[key] for key in keys if key in item}
    if "bytes" in found:  # {"bytes": .., "path": ..}
        found.pop("path", None)
    if len(found) > 1:
        raise InputError(f"{where}: a content item has several sources: {', '.join(found)}")
    for key, source in found.items():
        if key in ("bytes", "base64"):
            return inner({key: source}, f"{where}: {key}")
        return inner(source, f"{where}: {key}") if isinstance(source, Mapping) else source
    return None


def plain_data(value: Any, depth: int = 0) -> Any:
    """JSON data without its owner's classes, whose methods a template could call."""
    if depth > MAX_DEPTH:
        raise InputError(f"conversation: data nested more than {MAX_DEPTH} deep")
    depth += 1
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # An enum's name is not its text.
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain_data(k, depth): plain_data(v, depth) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(v, depth) for v in value]
    if getattr(value, "ndim", None) == 0:  # a numpy number
        return plain_data(value.item())
    raise InputError(
        f"conversation: got {type(value).__name__}, expected text, numbers, lists and objects"
    )


def plain_variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """`plain_data` of a template's variables. Raises InputError for names that have a meaning already."""
    if wrong := [k for k in given if not isinstance(k, str) or k in _TAKEN]:
        raise InputError(f"template_vars: got {wrong[0]!r}, expected names but {', '.join(_TAKEN)}")
    return plain_data(dict(given))


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """`plain_data` of a conversation's tools. Raises InputError."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools):
        found = f"found {type(tools).__name__}, " if not isinstance(tools, list) else ""
        raise InputError(f"tools: {found}expected a list of JSON schemas (objects)")
    return [plain_data(tool) for tool in tools]
