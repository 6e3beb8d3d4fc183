"""Values of the settings of images and videos: each is what its name means, or refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.media_rules import short

_RESAMPLE = {int(r): r for r in Image.Resampling}
_MOST = 2**40  # of settings that count; what they ask for has a limit in bytes


def yes_or_no(name: str, value: Any) -> bool:
    """The value of a setting that is true or false. Raises InputError."""
    if not isinstance(value, (bool, np.bool_)):
        raise _not(name, value, "true or false")
    return bool(value)


def whole(name: str, value: Any) -> int:
    """The value of a setting that counts from 1. Raises InputError."""
    found = number(name, value)
    if found != int(found) or not 1 <= found <= _MOST:
        raise _not(name, value, f"a whole number from 1 to {_MOST}")
    return int(value)


def number(name: str, value: Any) -> float:
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


def channels(name: str, value: Any) -> tuple[float, ...] | float:
    """The value of a setting that is a number, or one a channel. Raises InputError."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, (list, tuple)):
        found = tuple(number(name, v) for v in value)
    else:
        found = number(name, value)
    if name.endswith("image_std") and 0 in (found if isinstance(found, tuple) else (found,)):
        raise _not(name, value, "no zero")
    return found


def resampling(name: str, value: Any) -> int:
    """The value of a setting that is a filter of Pillow, by number or name. Raises InputError."""
    if isinstance(value, str) and value.upper() in Image.Resampling.__members__:
        return int(Image.Resampling[value.upper()])
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or value not in _RESAMPLE:
        names = (f"{n} {r.name.lower()}" for n, r in sorted(_RESAMPLE.items()))
        raise _not(name, value, f"one of {', '.join(names)}")
    return int(value)
