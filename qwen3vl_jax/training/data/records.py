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
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_CLASS = "python:"
_CHUNK = 1 << 24
_EMPTY = (b"\n", b"\r\n", b"\r")


@dataclasses.dataclass(frozen=True)
class Records:
    """A source by index, which gives the same record in every process. Workers get it by pickle."""

    path: str
    source: Source
    count: int
    # index -> the record as its file has it, or what a Python class made. Raises InputError.
    raw: Callable[[int], Any]
    # [n 2] line number, index in the line's list or -1; None: a record's number is its index from 1.
    places: np.ndarray | None = None
    vision_labels: bool = False  # of a Python class whose samples have labels of image features

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """The name of a record in messages: "chats.jsonl:17", in a list of records "chats.jsonl:17.1"."""
        number, at = (index + 1, -1) if self.places is None else self.places[index].tolist()
        return f"{os.path.basename(self.path)}:{number}" + (f".{at + 1}" if at >= 0 else "")

    def read(self, index: int) -> Any:
        """The record in chat form, or a ready Sample of a Python class. Raises InputError."""
        made = self.raw(index)
        ready = self.source.path.startswith(_CLASS) and not isinstance(made, Mapping)
        return made if ready else chat_form(made, self.source)


def open_records(source: Source) -> Records:
    """Opens a source. Raises InputError if it cannot be read or is empty."""
    if source.path.startswith(_CLASS):
        found = _python(source)
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


def _json_lines(path: str, source: Source) -> Records:
    """A JSONL file, indexed once. Empty lines are skipped; a line with a list holds several records."""
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
    table = np.array(spans, np.int64).reshape(-1, 4)
    # One array of places: workers get a copy of each.
    places = table[:, 2:].copy()
    read = functools.partial(_line, path, table[:, :2].copy(), places)
    return Records(path, source, len(table), read, places)


def _line(path: str, spans: np.ndarray, places: np.ndarray, index: int) -> Any:
    """A record by one read of its line. spans [n 2]: start byte, end byte; places: of Records."""
    (start, end), (_, place) = spans[index].tolist(), places[index].tolist()
    record = read_json(read_range(as_path(path), start, end - start), "", large=True)
    return record if place < 0 else record[place]


def _json(path: str, source: Source) -> Records:
    """A .json file: a record in each line, or one list, held in memory, whose inner lists hold several."""
    with as_path(path).open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return _json_lines(path, source)
        file.seek(0)
        found = read_json(file.read(), path, large=True)
    items, places = [], []
    for number, item in enumerate(found, 1):
        inner = item if isinstance(item, list) and item else None
        items += inner or [item]
        places += [(number, at) for at in range(len(inner))] if inner else [(number, -1)]
    table = np.array(places, np.int64).reshape(-1, 2)
    return Records(path, source, len(items), functools.partial(operator.getitem, items), table)


def _parquet(path: str, source: Source) -> Records:
    """A Parquet file. Whole row groups are read, so small ones are faster to shuffle."""
    import pyarrow

    try:
        with _parquet_file(path) as file:
            names, meta = file.schema_arrow.names, file.metadata
            groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file: {error}") from None
    if unknown := set(names) - {*FIELDS, *METADATA, *source.ignore}:
        raise InputError(
            f"{path}: found the columns {', '.join(sorted(unknown))}, which have no meaning here; "
            "name those that are to be passed over in the source's ignore"
        )
    columns = tuple(name for name in names if name in FIELDS and name not in source.ignore)
    if not {"messages", "conversations"} & set(columns):
        raise InputError(f"{path}: it has neither a column messages nor a column conversations")
    if (largest := max((g.total_byte_size for g in groups), default=0)) > _LARGE:
        slow = "%s: row groups of up to %d MiB, and shuffling reads a whole one for each "
        slow += "record; written with row_group_size=64 or so it is read faster"
        log.warning(slow, path, largest >> 20)
    ends = np.cumsum([g.num_rows for g in groups], dtype=np.int64)
    return Records(path, source, meta.num_rows, functools.partial(_row, path, ends, columns))


def _row(path: str, ends: np.ndarray, columns: tuple[str, ...], index: int) -> Any:
    """A row. ends [g]: number of rows up to the end of each row group."""
    group = int(np.searchsorted(ends, index, side="right"))
    rows = _row_group(path, group, columns)
    at = index - int(ends[group]) + rows.num_rows
    return without_nulls(rows.slice(at, 1).to_pylist()[0])


@functools.lru_cache(maxsize=4)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    with _parquet_file(path) as file:
        return file.read_row_group(group, columns=list(columns))


@contextlib.contextmanager
def _parquet_file(path: str) -> Iterator[Any]:
    """Opens a Parquet file, of a remote one only the ranges that are read."""
    from pyarrow import parquet

    given = as_path(path).open("rb") if is_remote(path) else contextlib.nullcontext(path)
    with given as source, parquet.ParquetFile(source) as file:
        yield file


def _array_record(path: str, source: Source) -> Records:
    """An ArrayRecord file of JSON texts."""
    import grain

    if is_remote(path):
        raise InputError(f"{path}: ArrayRecord is read from disks; use JSONL or parquet there")
    try:
        items: Any = grain.sources.ArrayRecordDataSource(path)
        return Records(path, source, len(items), functools.partial(_array_item, items))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not an ArrayRecord file: {error}") from None


def _array_item(items: Sequence[bytes], index: int) -> Any:
    return read_json(items[index], "", large=True)


def _python(source: Source) -> Records:
    """A Python class with __len__ and __getitem__, called with options; it gives records or Samples.

    Items must depend only on the index.
    """
    path = source.path.removeprefix(_CLASS)
    module, _, name = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        expected = "expected python:module:Class that can be imported"
        raise InputError(f"{source.path}: {expected}: {error}") from None
    try:
        made = kind(**source.options)
    except TypeError as error:
        raise InputError(f"{source.path}: its options do not fit: {error}") from None
    if not hasattr(made, "__len__") or not hasattr(made, "__getitem__"):
        raise InputError(f"{source.path}: expected a class with __len__ and __getitem__")
    read, labelled = functools.partial(operator.getitem, made), getattr(made, "vision_labels", 0)
    return Records(path, source, len(made), read, vision_labels=bool(labelled))


_KINDS: dict[str, Callable[[str, Source], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".array_record": _array_record,
    ".arrayrecord": _array_record,
}
