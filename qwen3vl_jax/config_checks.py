"""Checks of config.json values. Each raises InputError: "config: <key>: got .., expected ..".

A check is a function (value, key) -> value. `field` gives one to a dataclass field, and `read_fields`
applies a table of them.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from qwen3vl_jax.errors import InputError, shown

MAX_INT = 2**31 - 1
LIST = (list, tuple)
# The default of a key that fixes a shape.
REQUIRED = object()
Check = Callable[[Any, str], Any]
log = logging.getLogger("qwen3vl_jax")


def require(allowed: Any, key: str, value: Any, expected: str) -> None:
    """Raises InputError for a value that is not allowed."""
    if not allowed:
        raise InputError(f"config: {key}: got {shown(value)}, expected {expected}")


def read_fields(raw: Mapping[str, Any], where: str, table: Any) -> dict[str, Any]:
    """The checked values of {key: (check, default)}, or of a dataclass's `field`s; null is absent.

    where: the text before each key in a message.
    """
    if dataclasses.is_dataclass(table):
        table = {f.name: f.metadata["check"] for f in dataclasses.fields(table) if f.metadata}
    found = {}
    for key, (check, default) in table.items():
        if raw.get(key) is None and default is REQUIRED:
            raise InputError(f"config: {where}{key} is absent; it fixes a shape and has no default")
        found[key] = default if raw.get(key) is None else check(raw[key], where + key)
    return found


def field(check: Check, default: Any = REQUIRED) -> Any:
    """A dataclass field with the check of its key in config.json."""
    given = {} if default is REQUIRED else {"default": default}
    return dataclasses.field(metadata={"check": (check, default)}, **given)


def _check(expected: str, allowed: Callable[[Any], Any], read: Callable[[Any], Any]) -> Check:
    """A check that reads the values for which `allowed` is true."""

    def check(value: Any, key: str) -> Any:
        require(allowed(value), key, value, expected)
        return read(value)

    return check


# Checks for true or false, for a list, and for an object or null, which is empty.
flag = _check("true or false", lambda value: isinstance(value, bool), bool)
items = _check("a list", lambda value: isinstance(value, LIST), tuple)
mapping = _check(
    "an object", lambda v: v is None or isinstance(v, Mapping), lambda v: dict(v or {})
)


def one_of(*allowed: Any) -> Check:
    """A check for one of a few values."""
    among = ", ".join(map(str, allowed))
    return _check(among, lambda v: not isinstance(v, bool) and v in allowed, lambda v: v)


def number(above: float | None = None, at_most: float = sys.float_info.max) -> Check:
    """A check for a finite number from 0 or above `above`."""
    expected = "a number >= 0" if above is None else f"a number > {above:g}"
    expected += f" and <= {at_most:g}" if at_most < sys.float_info.max else ""

    def allowed(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and 0 <= value <= at_most and (above is None or value > above)

    return _check(expected, allowed, float)


def integer(at_least: int = 1, at_most: int = MAX_INT) -> Check:
    """A check for an integer in a range."""

    def check(value: Any, key: str) -> int:
        allowed = type(value) is int and value >= at_least
        require(allowed, key, value, f"an integer >= {at_least}")
        require(value <= at_most, key, value, f"at most {at_most}")
        return value

    return check


def size(at_most: int = MAX_INT) -> Check:
    """A check for a length: `integer`, or a list of equal ones (transformers 5: a [16, 16] patch)."""

    def check(value: Any, key: str) -> int:
        equal = isinstance(value, LIST) and value and all(v == value[0] for v in value)
        return integer(1, at_most)(value[0] if equal else value, key)

    return check


def each(check: Check) -> Check:
    """A check for a list whose items pass a check."""
    return lambda value, key: tuple(check(item, key) for item in items(value, key))


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """A check for a token id, a list of them, or null."""
    found = () if value is None else tuple(value) if isinstance(value, LIST) else (value,)
    allowed = all(type(i) is int and 0 <= i <= MAX_INT for i in found)
    require(allowed, key, value, "a token id, a list or null")
    return found


@functools.lru_cache(maxsize=256)
def warn_once(text: str) -> None:
    """Warns of an unused setting, once however often a config is read."""
    log.warning("%s", text)
