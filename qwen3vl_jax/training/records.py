"""Records of training files, read by index: JSONL, a JSON list, parquet, ArrayRecord, a Python class.

Whatever the file, a record comes out in chat form, {"messages": [...], "tools"?: [...]}, with its
pictures and clips inside the messages and their relative paths made whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.paths import as_path, is_remote, read_range
from qwen3vl_jax.training.chat_form import Record, chat_form, parsed, without_nulls
from qwen3vl_jax.training.recipe import Source

log = logging.getLogger("qwen3vl_jax")
_COLUMNS = ("messages", "conversations", "tools", "image", "images", "video", "videos")
_LARGE = 64 * 2**20  # bytes of a row group
_SUFFIXES = ".jsonl, .json, .parquet, .array_record or python:module:Class"
_CHUNK = 1 << 24


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
        path = as_path(source.path)
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
        with as_path(path).open("rb") as file:
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
        return chat_form(parsed(read_range(as_path(self.path), begin, end - begin)), self.media)


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
    with as_path(path).open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return Lines.of(path, media)
        file.seek(0)
        try:
            return Items(path, media, parsed(file.read()))
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

        try:
            with _parquet(path) as file:
                columns = tuple(n for n in file.schema_arrow.names if n in _COLUMNS)
                meta = file.metadata
                groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
        except pyarrow.ArrowException as error:
            raise InputError(f"{path}: not a parquet file: {error}") from None
        if not {"messages", "conversations"} & set(columns):
            raise InputError(f"{path}: it has neither a column messages nor a column conversations")
        if (largest := max((g.total_byte_size for g in groups), default=0)) > _LARGE:
            log.warning(
                "%s: row groups of up to %d MiB, and shuffling reads a whole one for each record; "
                "written with row_group_size=64 or so it is read faster", path, largest >> 20
            )  # fmt: skip
        return cls(path, media, columns, np.cumsum([g.num_rows for g in groups], dtype=np.int64))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{index + 1}"

    def read(self, index: int) -> Record:
        group = int(np.searchsorted(self.ends, index, side="right"))
        rows = _row_group(self.path, group, self.columns)
        at = index - int(self.ends[group]) + rows.num_rows
        row = rows.slice(at, 1).to_pylist()[0]
        return chat_form(without_nulls(row), self.media)


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """A parquet file; of an object the ranges that are asked for."""
    from pyarrow import parquet

    if not is_remote(path):
        with parquet.ParquetFile(path) as file:
            yield file
        return
    with as_path(path).open("rb") as read, parquet.ParquetFile(read) as file:
        yield file


@functools.lru_cache(maxsize=4)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    with _parquet(path) as file:
        return file.read_row_group(group, columns=list(columns))


@dataclasses.dataclass(frozen=True)
class Array:
    """An ArrayRecord file whose records are JSON texts."""

    path: str
    media: str
    count: int

    @classmethod
    def of(cls, path: str, media: str) -> Array:
        if is_remote(path):
            raise InputError(f"{path}: ArrayRecord is read from disks; use JSONL or parquet there")
        try:
            return cls(path, media, len(_array(path)))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: not an ArrayRecord file: {error}") from None

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{index + 1}"

    def read(self, index: int) -> Record:
        return chat_form(parsed(_array(self.path)[index]), self.media)


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
