"""The one exception for what a user gave: a file, an argument, a checkpoint."""

from typing import Any


class InputError(ValueError):
    """A one-line message that names the thing, what was expected, what was found, what to do."""


def shown(value: Any, limit: int = 80) -> str:
    """A value as an error line names it: its repr, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]} .."


def not_finite(key: str) -> str:
    """The message for numbers of the model that are NaN or infinite."""
    return (
        f"{key}: got NaN or infinity, expected numbers; use --dtype bfloat16 (dtype=) or float32, and if "
        "they give the same, the checkpoint's weights are damaged"
    )
