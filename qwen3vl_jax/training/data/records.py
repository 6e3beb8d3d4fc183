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


class Records:
    """A source by index. An index gives the same record in every process."""

    # Of classes whose samples have labels of image features.
    vision_labels = False

    def __init__(self, path: str, source: Source, count: int):
        self.path, self.source, self._count = path, source, count

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """The name of a record in messages: "chats.jsonl:17"."""
        return self._named(index + 1)

    def _named(self, number: int, place: int = -1) -> str:
        """A record's name: its line or index from 1, and its index from 1 in a list of records."""
        inner = f".{place + 1}" if place >= 0 else ""
        return f"{os.path.basename(self.path)}:{number}{inner}"

    def raw(self, index: int) -> Any:
        """The record as its file has it. Raises InputError."""
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """The record in chat form, or what a Python class made. Raises InputError."""
        return chat_form(self.raw(index), self.source)


def open_records(source: Source) -> Records:
    """Opens a source. Raises InputError if it cannot be read or is empty."""
    if source.path.startswith("python:"):
        found: Records = PythonSource(source)
    else:
        path = as_path(source.path)
        if source.options:
            names = ", ".join(source.options)
            of_classes = f"options ({names}) are for python:module:Class sources"
            raise InputError(f"{path}: {of_classes}; clear them with options={{}} beside the path")
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected {_SUFFIXES}")
        if path.suffix not in _KINDS:
            raise InputError(f"{path}: unknown kind of file {path.suffix!r}, expected {_SUFFIXES}")
        here = dataclasses.replace(source, media=source.media or str(path.parent))
        try:
            found = _KINDS[path.suffix](str(path), here)
        except OSError as error:
            raise InputError(f"{path}: cannot read this file: {error}") from None
    if not len(found):
        raise InputError(f"{source.path}: it holds no record")
    return found


class JsonLines(Records):
    """A JSONL file, indexed once; a record is one read of its line."""

    def __init__(self, path: str, source: Source):
        """Indexes the file. Empty lines are skipped; a line with a list holds several records."""
        spans, end = array.array("q"), 0
        # Buffered here: lines of remote files are slow.
        with io.BufferedReader(cast(Any, as_path(path).open("rb")), _CHUNK) as file:
            for number, line in enumerate(file, 1):
                start, end, count = end, end + len(line), 0
                if line.startswith(b"["):
                    # What is not JSON is refused when it is read.
                    with contextlib.suppress(InputError):
                        count = len(read_json(line, "", large=True))
                for place in range(count) or (-1,) if line not in _EMPTY else ():
                    spans.extend((start, end, number, place))
        # [n 4] int64: start byte, end byte, line number, index in the line's list or -1.
        self._spans = np.array(spans, np.int64).reshape(-1, 4)
        super().__init__(path, source, len(self._spans))

    def name(self, index: int) -> str:
        return self._named(*self._spans[index, 2:].tolist())

    def raw(self, index: int) -> Any:
        start, end, _, place = self._spans[index].tolist()
        record = read_json(read_range(as_path(self.path), start, end - start), "", large=True)
        return record if place < 0 else record[place]


class JsonList(Records):
    """A JSON file with one list of records, whose inner lists hold several. It is held in memory."""

    def __init__(self, path: str, source: Source, found: list[Any]):
        self._items: list[tuple[tuple[int, int], Any]] = []
        for number, item in enumerate(found, 1):
            if isinstance(item, list) and item:
                self._items += [((number, place), one) for place, one in enumerate(item)]
            else:
                self._items.append(((number, -1), item))
        super().__init__(path, source, len(self._items))

    def name(self, index: int) -> str:
        return self._named(*self._items[index][0])

    def raw(self, index: int) -> Any:
        return self._items[index][1]


def _json(path: str, source: Source) -> Records:
    """A .json file: one list of records, or a record in each line."""
    with as_path(path).open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return JsonLines(path, source)
        file.seek(0)
        return JsonList(path, source, read_json(file.read(), path, large=True))


class ParquetTable(Records):
    """A Parquet file. Whole row groups are read, so small ones are faster to shuffle."""

    def __init__(self, path: str, source: Source):
        import pyarrow

        try:
            with _parquet(path) as file:
                names, meta = file.schema_arrow.names, file.metadata
                groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
        except pyarrow.ArrowException as error:
            raise InputError(f"{path}: not a parquet file: {error}") from None
        if unknown := set(names) - {*FIELDS, *METADATA, *source.ignore}:
            raise InputError(
                f"{path}: found the columns {', '.join(sorted(unknown))}, which have no meaning here; "
                "name those that are to be passed over in the source's ignore"
            )
        read = [name for name in names if name in FIELDS and name not in source.ignore]
        if not {"messages", "conversations"} & set(read):
            raise InputError(f"{path}: it has neither a column messages nor a column conversations")
        if (largest := max((g.total_byte_size for g in groups), default=0)) > _LARGE:
            slow = "%s: row groups of up to %d MiB, and shuffling reads a whole one for each "
            slow += "record; written with row_group_size=64 or so it is read faster"
            log.warning(slow, path, largest >> 20)
        self._columns = tuple(read)
        # [g] number of rows up to the end of each row group.
        self._ends = np.cumsum([g.num_rows for g in groups], dtype=np.int64)
        super().__init__(path, source, meta.num_rows)

    def raw(self, index: int) -> Any:
        group = int(np.searchsorted(self._ends, index, side="right"))
        rows = _row_group(self.path, group, self._columns)
        at = index - int(self._ends[group]) + rows.num_rows
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


class ArrayRecord(Records):
    """An ArrayRecord file of JSON texts."""

    def __init__(self, path: str, source: Source):
        if is_remote(path):
            raise InputError(f"{path}: ArrayRecord is read from disks; use JSONL or parquet there")
        try:
            super().__init__(path, source, len(_array(path)))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: not an ArrayRecord file: {error}") from None

    def raw(self, index: int) -> Any:
        return read_json(_array(self.path)[index], "", large=True)


@functools.lru_cache(maxsize=64)
def _array(path: str) -> Any:
    import grain

    return grain.sources.ArrayRecordDataSource(path)


class PythonSource(Records):
    """A Python class with __len__ and __getitem__, which gives chat records or ready Samples.

    Items must depend only on the index; workers get the class by pickle. vision_labels: its samples
    have labels of image features.
    """

    def __init__(self, source: Source):
        """Imports the class and calls it with the source's options."""
        path = source.path.removeprefix("python:")
        module, _, name = path.partition(":")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
            expected = "expected python:module:Class that can be imported"
            raise InputError(f"{source.path}: {expected}: {error}") from None
        try:
            self._made = made = kind(**source.options)
        except TypeError as error:
            raise InputError(f"{source.path}: its options do not fit: {error}") from None
        if not hasattr(made, "__len__") or not hasattr(made, "__getitem__"):
            raise InputError(f"{source.path}: expected a class with __len__ and __getitem__")
        self.vision_labels = bool(getattr(made, "vision_labels", False))
        super().__init__(path, source, len(made))

    def read(self, index: int) -> Any:
        record = self._made[index]
        return chat_form(record, self.source) if isinstance(record, Mapping) else record


_KINDS = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _json,
    ".parquet": ParquetTable,
    ".array_record": ArrayRecord,
    ".arrayrecord": ArrayRecord,
}
