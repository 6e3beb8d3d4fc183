"""Strict JSON: the project's one reader and writer. Both raise InputError, a line that names `where`."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.paths import file_size, reached

MAX_DEPTH = 100
MAX_DIGITS = 40
# Of one text: each value takes about 70 bytes of memory at most.
MAX_VALUES = 10_000_000
MAX_BYTES = 1 << 30
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """The error of the parser's hooks, for JSON that Python's reader takes and this one refuses."""


def read_json(text: str | bytes, where: str, large: bool = False) -> Any:
    """The data of a JSON text (bytes are UTF-8); `where` names its source in errors.

    Raises InputError for invalid UTF-8 or JSON, NaN and Infinity, numbers that are infinite as floats,
    integers over 40 digits, a duplicate key, half a surrogate pair, data deeper than 100 levels, and unless
    large (the user's own data files) for more than 1 GiB or 10 million values.
    """
    with _refusals(f"{where}: " if where else ""):
        if len(text) > MAX_BYTES and not large:
            raise _Refused(f"{len(text):,} bytes, expected at most {MAX_BYTES:,}")
        if isinstance(text, str):
            # An error for half of a surrogate pair.
            text.encode()
        else:
            text = text.decode()
        text = text.removeprefix("\ufeff")
        if not large and sum(map(text.count, ",[{")) > MAX_VALUES:
            raise _Refused(f"JSON of more than {MAX_VALUES:,} values")
        found = _STRICT.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH or _HALF.search(text):
            _check(found)
    return found


@contextlib.contextmanager
def _refusals(before: str) -> Iterator[None]:
    """Turns the errors of a text that is read into InputError."""
    try:
        yield
    except json.JSONDecodeError as e:
        place = f"column {e.colno}" if "\n" not in e.doc else f"line {e.lineno}, column {e.colno}"
        raise InputError(f"{before}not JSON ({e.msg.removesuffix(' at')} at {place})") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{before}byte {e.start} is not UTF-8, expected JSON in UTF-8") from None
    except UnicodeEncodeError:
        raise InputError(f"{before}half of a surrogate pair in a text") from None
    except _Refused as e:
        raise InputError(f"{before}{e}") from None
    except (RecursionError, MemoryError):
        raise InputError(f"{before}JSON nested more than {MAX_DEPTH} deep, or too large") from None


def read_regular(path: Path, where: str, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes; where: its name in errors. Raises InputError."""
    try:
        with reached(path):
            if not path.is_file():
                what = "is no regular file" if path.exists() else "does not exist"
                raise InputError(f"{where}: cannot be read (it {what})")
            if (size := file_size(path)) > most:
                raise InputError(f"{where}: {size:,} bytes, expected at most {most:,}")
            return path.read_bytes()
    except OSError as e:
        raise InputError(f"{where}: cannot be read ({e.strerror or e})") from e


def read_json_file(path: Path, where: str = "", kind: type | tuple[type, ...] = dict) -> Any:
    """`read_json` of a regular file that holds an object, or another `kind`. Raises InputError."""
    where = where or str(path)
    found = read_json(read_regular(path, where, MAX_BYTES), where)
    if not isinstance(found, kind):
        expected = "an object" if kind is dict else "a list or an object"
        raise InputError(f"{where}: holds {type(found).__name__}, expected {expected}")
    return found


def read_json_at(text: str, at: int) -> tuple[Any, int]:
    """(data, end) of the JSON at an index of an answer; strings may hold line breaks, as models write."""
    with _refusals(""):
        try:
            found, end = _LENIENT.raw_decode(text, at)
            _check(found)
        except json.JSONDecodeError as e:
            what = f"{e.msg.removesuffix(' at')}, character {e.pos}"
            raise _Refused(f"not JSON ({what})") from None
        except RecursionError:
            raise _Refused(f"JSON nested more than {MAX_DEPTH} deep") from None
    return found, end


def write_json(value: Any, where: str, **options: Any) -> str:
    """The JSON text of a value; options as in json.dumps. Raises InputError for NaN and other types."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{where}: cannot be written as JSON ({e})") from e


def _constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON, expected a number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"an integer of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    if math.isinf(found := float(digits)):
        raise _Refused(f"the number {digits[:20]} is too large")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"the key {twice[:80]!r} is there twice")
    return found


_HOOKS: Any = {"parse_int": _integer, "parse_float": _float, "parse_constant": _constant}
_STRICT = json.JSONDecoder(object_pairs_hook=_object, **_HOOKS)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, strict=False, **_HOOKS)


def _check(found: Any) -> None:
    """Refuses deep data, and half a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    level, depth = [found], 0
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()
            elif isinstance(value, (dict, list)):
                if depth == MAX_DEPTH:
                    raise _Refused(f"JSON nested more than {MAX_DEPTH} deep")
                below += value
                below += value.values() if isinstance(value, dict) else ()
        level, depth = below, depth + 1
