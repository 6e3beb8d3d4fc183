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
# The default of a key that fixes a shape.
REQUIRED = object()
Check = Callable[[Any, str], Any]
log = logging.getLogger("qwen3vl_jax")


def refused(key: str, value: Any, expected: str) -> InputError:
    """The error for a value that is not allowed."""
    return InputError(f"config: {key}: got {shown(value)}, expected {expected}")


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
    return dataclasses.field(metadata={"check": check}, **given)


def field_table(cls: type) -> dict[str, tuple[Check, Any]]:
    """{key: (check, default)} of the `field` fields of a dataclass, for `read_fields`."""
    fields = [field for field in dataclasses.fields(cls) if "check" in field.metadata]
    missing = dataclasses.MISSING
    return {
        f.name: (f.metadata["check"], REQUIRED if f.default is missing else f.default)
        for f in fields
    }


def one_of(*allowed: Any) -> Check:
    """A check for one of a few values."""

    def check(value: Any, key: str) -> Any:
        if isinstance(value, bool) or value not in allowed:
            raise refused(key, value, ", ".join(map(str, allowed)))
        return value

    return check


def number(above: float | None = None, at_most: float = sys.float_info.max) -> Check:
    """A check for a finite number from 0 or above `above`."""
    expected = "a number >= 0" if above is None else f"a number > {above:g}"
    expected += f" and <= {at_most:g}" if at_most < sys.float_info.max else ""

    def check(value: Any, key: str) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and 0 <= value <= at_most) or (above is not None and value <= above):
            raise refused(key, value, expected)
        return float(value)

    return check


def integer(at_least: int = 1, at_most: int = MAX_INT) -> Check:
    """A check for an integer in a range."""

    def check(value: Any, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise refused(key, value, f"an integer >= {at_least}")
        if value > at_most:
            raise refused(key, value, f"at most {at_most}")
        return value

    return check


def size(at_most: int = MAX_INT) -> Check:
    """A check for a length: `integer`, or a list of equal ones (transformers 5: a [16, 16] patch)."""

    def check(value: Any, key: str) -> int:
        if isinstance(value, (list, tuple)) and value and all(v == value[0] for v in value):
            value = value[0]
        return integer(1, at_most)(value, key)

    return check


def each(check: Check) -> Check:
    """A check for a list whose items pass a check."""
    return lambda value, key: tuple(check(item, key) for item in items(value, key))


def flag(value: Any, key: str) -> bool:
    """A check for true or false."""
    if not isinstance(value, bool):
        raise refused(key, value, "true or false")
    return value


def items(value: Any, key: str) -> tuple[Any, ...]:
    """A check for a list."""
    if not isinstance(value, (list, tuple)):
        raise refused(key, value, "a list")
    return tuple(value)


def mapping(value: Any, key: str) -> dict[str, Any]:
    """A check for an object or null, which is empty."""
    if value is not None and not isinstance(value, Mapping):
        raise refused(key, value, "an object")
    return dict(value or {})


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """A check for a token id, a list of them, or null."""
    found = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
    if any(type(i) is not int or not 0 <= i <= MAX_INT for i in found):
        raise refused(key, value, "a token id, a list or null")
    return tuple(found)


@functools.lru_cache(maxsize=256)
def warn_once(text: str) -> None:
    """Warns of an unused setting, once however often a config is read."""
    log.warning("%s", text)


def warn_of_misplaced(raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Warns of decoder settings beside text_config, which transformers does not read either."""
    rope = {"rope_scaling", "rope_parameters", "rope_theta"}
    for key in sorted({*names, *rope} - {"rope"}):
        if raw.get(key) is not None and raw[key] != raw["text_config"].get(key):
            warn_once(
                f"config: {key} {shown(raw[key])} at the top of config.json is not used; "
                "put it into text_config"
            )
