"""Values of the settings of images and videos: each is what its name means, or refused."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.media_rules import short

_RESAMPLE = {int(r): r for r in Image.Resampling}
_MOST = 2**40  # of settings that count; what they ask for has a limit in bytes
# Frames a second that mean something; beyond them are typing errors.
_SLOWEST, _FASTEST = 1e-6, 1e6


def check_bool(name: str, value: Any) -> bool:
    """The value of a setting that is true or false. Raises InputError."""
    if not isinstance(value, (bool, np.bool_)):
        raise _not(name, value, "true or false")
    return bool(value)


def check_int(name: str, value: Any) -> int:
    """The value of a setting that counts from 1. Raises InputError."""
    found = check_number(name, value)
    if found != int(found) or not 1 <= found <= _MOST:
        raise _not(name, value, f"a whole number from 1 to {_MOST}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """The value of a setting that is a finite number. Raises InputError."""
    kinds = (int, float, np.integer, np.floating)
    try:
        if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond all floats
        pass
    raise _not(name, value, "a number")


def _not(name: str, value: Any, expected: str) -> InputError:
    return InputError(f"{name} is {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """A value as a message shows it, whatever it is."""
    try:
        return short(repr(value), 60)
    except ValueError:  # an integer of thousands of digits
        return "a number too long to print"


def check_channels(name: str, value: Any) -> tuple[float, ...] | float:
    """The value of a setting that is a number, or one a channel. Raises InputError."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, (list, tuple)):
        found = tuple(check_number(name, v) for v in value)
    else:
        found = check_number(name, value)
    if name.endswith("image_std") and 0 in (found if isinstance(found, tuple) else (found,)):
        raise _not(name, value, "no zero")
    return found


def check_filter(name: str, value: Any) -> int:
    """The value of a setting that is a filter of Pillow, by number or name. Raises InputError."""
    if isinstance(value, str) and value.upper() in Image.Resampling.__members__:
        return int(Image.Resampling[value.upper()])
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or value not in _RESAMPLE:
        names = (f"{n} {r.name.lower()}" for n, r in sorted(_RESAMPLE.items()))
        raise _not(name, value, f"one of {', '.join(names)}")
    return int(value)


def frame_rate(name: str, value: Any) -> float:
    """Frames a second, from a number or its text. Raises InputError."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    found = check_number(name, value)
    if not _SLOWEST <= found <= _FASTEST:
        raise InputError(
            f"{name} is {found:g}, expected frames a second from {_SLOWEST:g} to {_FASTEST:g}"
        )
    return found


def checks(settings: type) -> dict[str, Callable[[str, Any], Any]]:
    """The check of each setting of a dataclass of them, by its name or else its annotation."""
    fields = dataclasses.fields(settings)
    return {f.name: _BY_NAME.get(f.name) or _BY_TYPE[str(f.type)] for f in fields}


_BY_NAME = {"resample": check_filter, "fps": frame_rate}
_BY_TYPE = {
    "bool": check_bool,
    "int": check_int,
    "int | None": check_int,
    "float": check_number,
    "tuple[float, ...] | float": check_channels,
}
