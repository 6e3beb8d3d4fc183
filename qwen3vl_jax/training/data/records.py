"""Reads training records by index: JSONL, a JSON list, Parquet, ArrayRecord, a Python class.

Every record comes out in chat form, {"messages": [...], "tools"?: [...]}, with images and videos inside
the messages and their relative paths resolved.
"""

import array
import contextlib
import dataclasses
import functools
import importlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.json_text import read_json
from qwen3vl_jax.storage.paths import as_path, is_remote, read_range
from qwen3vl_jax.training.data.chat_format import FIELDS, METADATA, chat_form, without_nulls
from qwen3vl_jax.training.recipe import Source

log = logging.getLogger("qwen3vl_jax")
# Row groups of more bytes than this make shuffled reading slow.
_LARGE = 64 * 2**20
_SUFFIXES = ".jsonl, .json, .parquet, .array_record or python:module:Class"
_CHUNK = 1 << 24
_EMPTY = (b"\n", b"\r\n", b"\r")


@dataclasses.dataclass(frozen=True)
class Records:
    """A source by index. An index gives the same record in every process."""

    path: str
    source: Source
    count: int

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """The name of a record in messages: "chats.jsonl:17"."""
        return _named(self.path, index + 1)

    def raw(self, index: int) -> Any:
        """The record as its file has it. Raises InputError."""
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """The record in chat form, or what a Python class made. Raises InputError."""
        return chat_form(self.raw(index), self.source)


def open_records(source: Source) -> Records:
    """Opens a source. Raises InputError if it cannot be read or is empty."""
    if source.path.startswith("python:"):
        found: Records = PythonSource.of(source)
    else:
        path = as_path(source.path)
        if source.options:
            names = ", ".join(source.options)
            of_classes = f"options ({names}) are for python:module:Class sources"
            raise InputError(f"{path}: {of_classes}; clear them with options={{}} beside the path")
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected {_SUFFIXES}")
        here = dataclasses.replace(source, media=source.media or str(path.parent))
        kinds = {
            ".jsonl": JsonLines.of,
            ".ndjson": JsonLines.of,
            ".json": _json,
            ".parquet": ParquetTable.of,
            ".array_record": ArrayRecord.of,
            ".arrayrecord": ArrayRecord.of,
        }
        if path.suffix not in kinds:
            raise InputError(f"{path}: unknown kind of file {path.suffix!r}, expected {_SUFFIXES}")
        try:
            found = kinds[path.suffix](str(path), here)
        except OSError as error:
            raise InputError(f"{path}: cannot read this file: {error}") from None
    if not len(found):
        raise InputError(f"{source.path}: it holds no record")
    return found


@dataclasses.dataclass(frozen=True)
class JsonLines(Records):
    """A JSONL file, indexed once; a record is one read of its line."""

    # [n 4] int64: start byte, end byte, line number, index in the line's list or -1.
    spans: np.ndarray

    @classmethod
    def of(cls, path: str, source: Source) -> "JsonLines":
        """Indexes the file. Empty lines are skipped; a line with a list holds several records."""
        spans, end = array.array("q"), 0
        # Buffered here: lines of remote files are slow.
        with io.BufferedReader(cast(Any, as_path(path).open("rb")), _CHUNK) as file:
            for number, line in enumerate(file, 1):
                start, end = end, end + len(line)
                count = _listed(line) if line.startswith(b"[") else 0
                for place in range(count) or (-1,) if line not in _EMPTY else ():
                    spans.extend((start, end, number, place))
        table = np.array(spans, np.int64).reshape(-1, 4)
        return cls(path, source, len(table), table)

    def name(self, index: int) -> str:
        return _named(self.path, *self.spans[index, 2:].tolist())

    def raw(self, index: int) -> Any:
        start, end, _, place = self.spans[index].tolist()
        line = read_range(as_path(self.path), start, end - start)
        record = read_json(line, "", large=True)
        return record if place < 0 else record[place]


def _listed(line: bytes) -> int:
    """The number of records in a line's list; 0 if the line is not JSON, which reading refuses."""
    try:
        return len(read_json(line, "", large=True))
    except InputError:
        return 0


def _named(path: str, number: int, place: int = -1) -> str:
    """A record's name: its line or index from 1, and its index from 1 in a list of records."""
    return f"{os.path.basename(path)}:{number}" + (f".{place + 1}" if place >= 0 else "")


@dataclasses.dataclass(frozen=True)
class JsonList(Records):
    """A JSON file with one list of records. Unlike JSONL it is held in memory."""

    # (name, record)
    items: list[tuple[str, Any]]

    def name(self, index: int) -> str:
        return self.items[index][0]

    def raw(self, index: int) -> Any:
        return self.items[index][1]


def _json(path: str, source: Source) -> Records:
    """A .json file: one list, whose inner lists hold several records, or a record in each line."""
    with as_path(path).open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return JsonLines.of(path, source)
        file.seek(0)
        found = read_json(file.read(), path, large=True)
    items: list[tuple[str, Any]] = []
    for number, item in enumerate(found, 1):
        if isinstance(item, list) and item:
            items += [(_named(path, number, at), one) for at, one in enumerate(item)]
        else:
            items.append((_named(path, number), item))
    return JsonList(path, source, len(items), items)


@dataclasses.dataclass(frozen=True)
class ParquetTable(Records):
    """A Parquet file. Whole row groups are read, so small ones are faster to shuffle."""

    columns: tuple[str, ...]
    # [g] number of rows up to the end of each row group.
    ends: np.ndarray

    @classmethod
    def of(cls, path: str, source: Source) -> "ParquetTable":
        import pyarrow

        try:
            with _parquet(path) as file:
                names = [n for n in file.schema_arrow.names if n not in source.ignore]
                meta = file.metadata
                groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
        except pyarrow.ArrowException as error:
            raise InputError(f"{path}: not a parquet file: {error}") from None
        if unknown := set(names) - {*FIELDS, *METADATA}:
            raise InputError(
                f"{path}: found the columns {', '.join(sorted(unknown))}, which have no meaning here; "
                "name those that are to be passed over in the source's ignore"
            )
        columns = tuple(name for name in names if name in FIELDS)
        if not {"messages", "conversations"} & set(columns):
            raise InputError(f"{path}: it has neither a column messages nor a column conversations")
        if (largest := max((g.total_byte_size for g in groups), default=0)) > _LARGE:
            slow = "%s: row groups of up to %d MiB, and shuffling reads a whole one for each "
            slow += "record; written with row_group_size=64 or so it is read faster"
            log.warning(slow, path, largest >> 20)
        ends = np.cumsum([g.num_rows for g in groups], dtype=np.int64)
        return cls(path, source, meta.num_rows, columns, ends)

    def raw(self, index: int) -> Any:
        group = int(np.searchsorted(self.ends, index, side="right"))
        rows = _row_group(self.path, group, self.columns)
        at = index - int(self.ends[group]) + rows.num_rows
        return without_nulls(rows.slice(at, 1).to_pylist()[0])


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """Opens a Parquet file, of a remote one only the ranges that are read."""
    from pyarrow import parquet

    given = as_path(path).open("rb") if is_remote(path) else contextlib.nullcontext(path)
    with given as source, parquet.ParquetFile(source) as file:
        yield file


@functools.lru_cache(maxsize=4)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    with _parquet(path) as file:
        return file.read_row_group(group, columns=list(columns))


@dataclasses.dataclass(frozen=True)
class ArrayRecord(Records):
    """An ArrayRecord file of JSON texts."""

    @classmethod
    def of(cls, path: str, source: Source) -> "ArrayRecord":
        if is_remote(path):
            raise InputError(f"{path}: ArrayRecord is read from disks; use JSONL or parquet there")
        try:
            return cls(path, source, len(_array(path)))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: not an ArrayRecord file: {error}") from None

    def raw(self, index: int) -> Any:
        return read_json(_array(self.path)[index], "", large=True)


@functools.lru_cache(maxsize=64)
def _array(path: str) -> Any:
    import grain

    return grain.sources.ArrayRecordDataSource(path)


@dataclasses.dataclass(frozen=True)
class PythonSource(Records):
    """A Python class with __len__ and __getitem__, which gives chat records or ready Samples.

    Items must depend only on the index; workers get the class by pickle. vision_labels: its samples
    have labels of image features.
    """

    maker: Any

    @classmethod
    def of(cls, source: Source) -> "PythonSource":
        """Imports the class and calls it with the source's options."""
        path = source.path.removeprefix("python:")
        module, _, name = path.partition(":")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
            expected = "expected python:module:Class that can be imported"
            raise InputError(f"{source.path}: {expected}: {error}") from None
        try:
            maker = kind(**source.options)
        except TypeError as error:
            raise InputError(f"{source.path}: its options do not fit: {error}") from None
        if not hasattr(maker, "__len__") or not hasattr(maker, "__getitem__"):
            raise InputError(f"{source.path}: expected a class with __len__ and __getitem__")
        return cls(path, source, len(maker), maker)

    @property
    def vision_labels(self) -> bool:
        return bool(getattr(self.maker, "vision_labels", False))

    def read(self, index: int) -> Any:
        made = self.maker[index]
        return chat_form(made, self.source) if isinstance(made, Mapping) else made
