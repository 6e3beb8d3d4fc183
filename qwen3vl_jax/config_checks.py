"""Checks of config.json values. Each raises InputError: "config: <key>: got .., expected ..".

A check is a function (value, key) -> value. `field` gives one to a dataclass field, and `read_fields`
applies a table of them.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qwen3vl_jax.errors import InputError, shown

MAX_INT = 2**31 - 1
REQUIRED = object()  # the default of a key that fixes a shape
Check = Callable[[Any, str], Any]
log = logging.getLogger("qwen3vl_jax")


def require(allowed: Any, key: str, value: Any, expected: str) -> None:
    """Raises InputError for a value that is not allowed."""
    if not allowed:
        raise InputError(f"config: {key}: got {shown(value)}, expected {expected}")


def read_fields(
    raw: Mapping[str, Any], where: str, table: Mapping[str, tuple[Check, Any]]
) -> dict[str, Any]:
    """The checked values of a table {key: (check, default)}; null counts as absent.

    where: the text before each key in a message.
    """
    found = {}
    for key, (check, default) in table.items():
        value = default if raw.get(key) is None else raw[key]
        if value is REQUIRED:
            raise InputError(f"config: {where}{key} is absent; it fixes a shape and has no default")
        found[key] = check(value, where + key)
    return found


def field(check: Check, default: Any = REQUIRED) -> Any:
    """A dataclass field with the check of its key in config.json."""
    given = {} if default is REQUIRED else {"default": default}
    return dataclasses.field(metadata={"check": (check, default)}, **given)


def field_table(cls: type) -> dict[str, tuple[Check, Any]]:
    """{key: (check, default)} of the `field` fields of a dataclass, for `read_fields`."""
    return {f.name: f.metadata["check"] for f in dataclasses.fields(cls) if f.metadata}


def _check(expected: str, allowed: Callable[[Any], Any], read: Callable[[Any], Any]) -> Check:
    """A check that reads the values for which `allowed` is true."""

    def check(value: Any, key: str) -> Any:
        require(allowed(value), key, value, expected)
        return read(value)

    return check


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


# Checks for true or false, for a list, and for an object or null, which is empty.
flag = _check("true or false", lambda value: isinstance(value, bool), bool)
items = _check("a list", _is_list, tuple)
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
        equal = _is_list(value) and value and all(v == value[0] for v in value)
        return integer(1, at_most)(value[0] if equal else value, key)

    return check


def each(check: Check) -> Check:
    """A check for a list whose items pass a check."""
    return lambda value, key: tuple(check(item, key) for item in items(value, key))


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """A check for a token id, a list of them, or null."""
    found = () if value is None else tuple(value) if _is_list(value) else (value,)
    allowed = all(type(i) is int and 0 <= i <= MAX_INT for i in found)
    require(allowed, key, value, "a token id, a list or null")
    return found


@functools.lru_cache(maxsize=256)
def warn_once(text: str) -> None:
    """Warns of an unused setting, once however often a config is read."""
    log.warning("%s", text)


def warn_of_misplaced(raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Warns of decoder settings beside text_config, which transformers does not read either."""
    for key in sorted({*names, "rope_scaling", "rope_parameters", "rope_theta"} - {"rope"}):
        if raw.get(key) is not None and raw[key] != raw["text_config"].get(key):
            where = f"{key} {shown(raw[key])} at the top of config.json"
            warn_once(f"config: {where} is not used; put it into text_config")
