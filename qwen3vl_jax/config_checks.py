"""Checks of one value of a config.json; each raises InputError with key, found and expected."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from qwen3vl_jax.errors import InputError, shown

MAX_INT = 2**31 - 1
# Names of so many parameters are listed before a file is read.
_MOST = {"num_hidden_layers": 1_000, "depth": 1_000, "num_experts": 10_000,
         "num_local_experts": 10_000}  # fmt: skip
log = logging.getLogger("qwen3vl_jax")


def one_of(value: Any, key: str, allowed: tuple) -> Any:
    """The value, if it is allowed; raises InputError with key, found and allowed."""
    if isinstance(value, bool) or value not in allowed:
        names = ", ".join(map(str, allowed))
        raise InputError(f"config: {key} is {shown(value)}, implemented: {names}")
    return value


@functools.lru_cache(maxsize=256)
def warn_once(text: str) -> None:
    """Warns of what is not used; once, however often a config is read."""
    log.warning("%s", text)


def number(
    value: Any, key: str, above: float | None = None, at_most: float = sys.float_info.max
) -> float:
    """A finite number >= 0, or > `above`; raises InputError with key, found and expected."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 <= value <= at_most and (above is None or value > above):
        return float(value)
    expected = ">= 0" if above is None else f"> {above:g}"
    expected += f" and <= {at_most:g}" if at_most < sys.float_info.max else ""
    raise InputError(f"config: {key} is {shown(value)}, expected a number {expected}")


def integer(value: Any, key: str, at_least: int = 1, at_most: int = MAX_INT) -> int:
    """An integer from `at_least` to `at_most`; raises InputError with key, found and expected."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"config: {key} is {shown(value)}, expected an integer >= {at_least}")
    if value > at_most:
        raise InputError(f"config: {key} is {shown(value)}, expected at most {at_most}")
    return value


def flag(value: Any, key: str) -> bool:
    """True or false; raises InputError with key, found and expected."""
    if not isinstance(value, bool):
        raise InputError(f"config: {key} is {shown(value)}, expected true or false")
    return value


def items(value: Any, key: str) -> tuple[Any, ...]:
    """The items of a list; raises InputError with key, found and expected."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"config: {key} is {shown(value)}, expected a list")
    return tuple(value)


def mapping(value: Any, key: str) -> dict[str, Any]:
    """A copy of an object, empty for null; raises InputError with key, found and expected."""
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"config: {key} is {shown(value)}, expected an object")
    return dict(value or {})


def required_int(
    raw: Mapping[str, Any], key: str, where: str, at_least: int = 1, default: int | None = None
) -> int:
    """`integer` of a key, which has to be there without a default; raises InputError."""
    value = raw.get(key, default)
    if value is None:
        raise InputError(f"config: {where}{key} is absent; it fixes a shape and has no default")
    if isinstance(value, (list, tuple)) and value and all(v == value[0] for v in value):
        value = value[0]  # transformers 5 may write a square patch as [16, 16]
    return integer(value, where + key, at_least, _MOST.get(key, MAX_INT))


def end_ids(value: Any) -> tuple[int, ...]:
    """End ids: none, one, or a list; raises InputError."""
    found = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
    if any(type(i) is not int or not 0 <= i <= MAX_INT for i in found):
        raise InputError(
            f"config: eos_token_id is {shown(value)}, expected a token id, a list or null"
        )
    return tuple(found)


def warn_of_misplaced(raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Warns of settings of the decoder beside text_config, where transformers does not see them either."""
    rope = {"rope_scaling", "rope_parameters", "rope_theta"}
    for key in sorted({*names, *rope} - {"rope"}):
        if raw.get(key) is not None and raw[key] != raw["text_config"].get(key):
            warn_once(
                f"config: {key} {shown(raw[key])} at the top of config.json is not used; "
                "put it into text_config"
            )
