"""The one exception for what a user gave: a file, an argument, a checkpoint; how values are shown."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """A one-line message that names the thing, what was expected, what was found, what to do.

    Line breaks, and the middle of what is too long for a line, are left out, whatever was quoted.
    """

    def __init__(self, message: object = ""):
        text = " ".join(part for line in str(message).splitlines() if (part := line.strip()))
        super().__init__(text if len(text) <= 1200 else f"{text[:900]} .. {text[-300:]}")


def unexpected(name: str, found: object, expected: str) -> InputError:
    """The error for something found where another was expected."""
    return InputError(f"{name}: got {found}, expected {expected}")


def one_line(error: object) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


class ProblemsError(InputError):
    """A one-line message with the first problem; `problems` holds all, and with several the advice."""

    def __init__(self, what: str, problems: list[str], advice: str = ""):
        self.problems = [*problems, *([advice] if advice and len(problems) > 1 else [])]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{what}: {problems[0]}{more}{advice and '; '}{advice}")


def shown(value: Any, limit: int = 80) -> str:
    """A value as an error line names it: its repr, cut to `limit` characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number too long to print"
    return text if len(text) <= limit else f"{text[:limit]} .."


def brief(self: Any) -> str:
    """The repr of a struct: arrays as dtype[shape], N equal ones as "N x ..", no fields that are None."""
    if dataclasses.is_dataclass(self):
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown = (f"{name}={brief(x)}" for name, x in fields.items() if x is not None)
        return f"{type(self).__name__}({', '.join(shown)})"
    if hasattr(self, "shape") and hasattr(self, "dtype"):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"
    if isinstance(self, (list, tuple)) and self:
        found = [brief(x) for x in self]
        return f"{len(found)} x {found[0]}" if len(set(found)) == 1 else f"[{', '.join(found)}]"
    return repr(self)


def not_finite(key: str) -> str:
    """The message for numbers of the model that are NaN or infinite."""
    advice = "use --dtype bfloat16 (dtype=) or float32"
    damaged = "and if they give the same, the checkpoint's weights are damaged"
    return f"{key}: got NaN or infinity, expected numbers; {advice}, {damaged}"


def check_int(key: str, value: Any, at_most: int = 2**31 - 1) -> int:
    """The value, a whole number from 1. Raises InputError for what is none, and for a larger one."""
    try:
        found = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = 0
    if not 1 <= found <= at_most:
        raise InputError(f"{key}: got {shown(value)}, expected a whole number from 1 to {at_most}")
    return found


def check_types(kinds: Mapping[str, tuple[type, str]], given: Mapping[str, Any]) -> None:
    """Raises InputError for an argument that is not of its type in `kinds`: name -> (type, in words)."""
    for name, value in given.items():
        kind, expected = kinds[name]
        if not isinstance(value, kind):
            is_array = hasattr(type(value), "addressable_shards")
            found = "an array" if is_array else type(value).__name__
            order = f"the order is ({', '.join(given)}, ..)"
            raise InputError(f"{name}: got {found}, expected {expected}; {order}")
