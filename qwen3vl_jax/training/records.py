"""Records of training files, read by index: JSONL, a JSON list, parquet, ArrayRecord, a Python class.

Whatever the file, a record comes out in chat form, {"messages": [...], "tools"?: [...]}, with its
pictures and clips inside the messages and their relative paths made whole.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training.recipe import Source

Record = dict[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system", "tool": "tool", "observation": "tool"}  # fmt: skip
_POOLS = {"image": ("image", "images"), "video": ("video", "videos")}
_PLACES = ("image", "video", "image_url", "video_url", "url", "path")
_TAG = re.compile("(<image>|<video>)")
_COLUMNS = ("messages", "conversations", "tools", *_POOLS["image"], *_POOLS["video"])
_SUFFIXES = ".jsonl, .json, .parquet, .array_record or python:module:Class"
_CHUNK = 1 << 24
_LONGEST_PATH = 4096


class Records(Protocol):
    """A source by index. Reading the same index gives the same record in every process."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where a record stands, as messages say it: "chats.jsonl:17"."""
        ...

    def read(self, index: int) -> Any:
        """The record in chat form, or what a Python class made. Raises InputError with the reason."""
        ...


def open_records(source: Source) -> Records:
    """The records of a source. Raises InputError for one that cannot be opened or is empty."""
    if source.path.startswith("python:"):
        found: Records = Made.of(source)
    else:
        path = Path(source.path)
        if source.options:
            names = ", ".join(source.options)
            raise InputError(f"{path}: options ({names}) are for python:module:Class sources")
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected {_SUFFIXES}")
        media = source.media or str(path.parent)
        kinds = {".jsonl": Lines.of, ".ndjson": Lines.of, ".json": _json, ".parquet": Table.of,
                 ".array_record": Array.of, ".arrayrecord": Array.of}  # fmt: skip
        if path.suffix not in kinds:
            raise InputError(f"{path}: unknown kind of file {path.suffix!r}, expected {_SUFFIXES}")
        try:
            found = kinds[path.suffix](str(path), media)
        except OSError as error:
            raise InputError(f"{path}: cannot read this file: {error}") from None
    if not len(found):
        raise InputError(f"{source.path}: it holds no record")
    return found


@dataclasses.dataclass(frozen=True)
class Lines:
    """A JSONL file: where its lines begin is known, and one line is read at a time."""

    path: str
    media: str
    spans: np.ndarray  # [n 3] int64: first byte, byte behind the last, number of the line

    @classmethod
    def of(cls, path: str, media: str) -> Lines:
        """Looks through the file once; lines of at most one byte are no records."""
        ends = [np.zeros(0, np.int64)]
        with open(path, "rb") as file:
            start = 0
            while chunk := file.read(_CHUNK):
                ends.append(start + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
                start += len(chunk)
        ends = np.append(np.concatenate(ends), start)
        begins = np.concatenate([[0], ends[:-1] + 1])
        spans = np.stack([begins, ends, np.arange(1, len(ends) + 1)], 1)
        return cls(path, media, spans[ends - begins > 1])

    def __len__(self) -> int:
        return len(self.spans)

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{self.spans[index, 2]}"

    def read(self, index: int) -> Record:
        begin, end, _ = self.spans[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(begin)
            return chat_form(_parsed(file.read(end - begin)), self.media)


@dataclasses.dataclass(frozen=True)
class Items:
    """A JSON file that holds one list of records; it is kept in memory, unlike JSONL."""

    path: str
    media: str
    items: list[Any]

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{index + 1}"

    def read(self, index: int) -> Record:
        return chat_form(self.items[index], self.media)


def _json(path: str, media: str) -> Records:
    """A .json file: one list, or else a record a line."""
    with open(path, "rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return Lines.of(path, media)
        file.seek(0)
        try:
            return Items(path, media, _parsed(file.read()))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Table:
    """A parquet file. One row group is read at a time, so shuffled files want small ones."""

    path: str
    media: str
    columns: tuple[str, ...]
    ends: np.ndarray  # [g] rows up to the end of each row group

    @classmethod
    def of(cls, path: str, media: str) -> Table:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                columns = tuple(n for n in file.schema_arrow.names if n in _COLUMNS)
                meta = file.metadata
                sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        except pyarrow.ArrowException as error:
            raise InputError(f"{path}: not a parquet file: {error}") from None
        if not {"messages", "conversations"} & set(columns):
            raise InputError(f"{path}: it has neither a column messages nor a column conversations")
        return cls(path, media, columns, np.cumsum(sizes, dtype=np.int64))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{index + 1}"

    def read(self, index: int) -> Record:
        group = int(np.searchsorted(self.ends, index, side="right"))
        rows = _row_group(self.path, group, self.columns)
        at = index - int(self.ends[group]) + rows.num_rows
        row = rows.slice(at, 1).to_pylist()[0]
        return chat_form(_without_nulls(row), self.media)


@functools.lru_cache(maxsize=4)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=list(columns))


@dataclasses.dataclass(frozen=True)
class Array:
    """An ArrayRecord file whose records are JSON texts."""

    path: str
    media: str
    count: int

    @classmethod
    def of(cls, path: str, media: str) -> Array:
        try:
            return cls(path, media, len(_array(path)))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: not an ArrayRecord file: {error}") from None

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{index + 1}"

    def read(self, index: int) -> Record:
        return chat_form(_parsed(_array(self.path)[index]), self.media)


@functools.lru_cache(maxsize=64)
def _array(path: str) -> Any:
    import grain

    return grain.sources.ArrayRecordDataSource(path)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a Python class makes by index: records in chat form, or samples ready to be packed.

    The class has __len__ and __getitem__, is a function of the index alone, and goes to workers by
    pickle. A true `vision_labels` says that its samples name what their vision rows show.
    """

    path: str
    maker: Any
    media: str

    @classmethod
    def of(cls, source: Source) -> Made:
        """Makes the class with the source's options."""
        module, _, name = source.path.removeprefix("python:").partition(":")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"{source.path}: expected python:module:Class that can be imported: {error}"
            ) from None
        try:
            return cls(source.path, kind(**source.options), source.media)
        except TypeError as error:
            raise InputError(f"{source.path}: its options do not fit: {error}") from None

    @property
    def vision_labels(self) -> bool:
        return bool(getattr(self.maker, "vision_labels", False))

    def __len__(self) -> int:
        return len(self.maker)

    def name(self, index: int) -> str:
        return f"{self.path.removeprefix('python:')}:{index + 1}"

    def read(self, index: int) -> Any:
        made = self.maker[index]
        return chat_form(made, self.media) if isinstance(made, Mapping) else made


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
        found += [_source(x, name) for x in given if x is not None]
    return found


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


def _without_nulls(value: Any) -> Any:
    """Parquet rows without their nulls, which stand for keys that only other rows have."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _from_json(value: Any, name: str) -> Any:
    """What a column of JSON text says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return _parsed(value.encode())
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
