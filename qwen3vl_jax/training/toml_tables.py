"""TOML tables as frozen dataclasses. A field's annotation is the type of its key."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from qwen3vl_jax.errors import InputError

_T = TypeVar("_T")


def apply_change(kind: type, raw: dict[str, Any], change: str) -> None:
    """Writes one ``table.key=value`` into the raw tables. Raises InputError that names the change."""
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise InputError(f"{change!r}: expected key=value or table.key=value")
    _apply(kind, raw, name.strip().split("."), "", text, change)


def _apply(hint: Any, at: Any, parts: list[str], prefix: str, text: str, change: str) -> None:
    """Writes a change into a raw table or list `at`. parts: what is left of its key."""
    part, *rest = parts
    key: Any = part
    if dataclasses.is_dataclass(hint) and isinstance(at, dict):
        _check_keys([part], hint, prefix, change)
        inner = typing.get_type_hints(hint)[part]
        if rest and part not in at:
            is_list = typing.get_origin(inner) is tuple
            at[part] = list(getattr(hint, part, ())) if is_list else {}
    elif typing.get_origin(hint) is tuple and isinstance(at, list):
        if not part.isdecimal() or int(part) > len(at):
            raise InputError(f"{change}: {part!r} is no place in a list of {len(at)} (from 0)")
        key, inner = int(part), typing.get_args(hint)[0]
        # The place after the last one is new.
        at += [{}] * (key == len(at))
    elif isinstance(at, dict) and (hint is Any or typing.get_origin(hint) is dict):
        inner = Any if hint is Any else typing.get_args(hint)[1]
        if inner is not Any:
            # Names of parameters have dots.
            key, rest = ".".join(parts), []
        at.setdefault(key, {})
    else:
        name = prefix.rstrip(".")
        raise InputError(f"{change}: {name} is no table, expected key=value or table.key=value")
    if rest:
        _apply(inner, at[key], rest, f"{prefix}{part}.", text, change)
    else:
        at[key] = _changed(inner, text, f"{prefix}{key}", change)


def _changed(hint: Any, text: str, name: str, change: str) -> Any:
    """A change's value: TOML of the key's type, or the text itself for a string."""
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        value = text
    if hint is str and not isinstance(value, str):
        value = text
    _value(hint, value, name, change)
    return value


def _check_keys(keys: Iterable[str], kind: Any, prefix: str, where: str) -> None:
    """Raises InputError for an unknown key."""
    fields = [f.name for f in dataclasses.fields(kind)]
    for key in keys:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1) or _tables_with(kind, key)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise InputError(f"{where}: unknown key {prefix}{key}; {hint}")


def _tables_with(kind: Any, key: str) -> list[str]:
    """The tables of a kind that have this key, as optimizer.learning_rate."""
    hints = typing.get_type_hints(kind)
    tables = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return [f"{name}.{key}" for name, hint in tables.items() if key in typing.get_type_hints(hint)]


def build(kind: type[_T], raw: Any, prefix: str, where: str) -> _T:
    """A dataclass from a table. Raises InputError for missing or unknown keys and wrong types."""
    if not isinstance(raw, Mapping):
        key = f"{prefix}{dataclasses.fields(typing.cast(Any, kind))[0].name}"
        found = f"{prefix.rstrip('.')} is {raw!r}, expected a table of keys, as {key}"
        raise InputError(f"{where}: {found}")
    hints = typing.get_type_hints(kind)
    _check_keys(raw, kind, prefix, where)
    for field in dataclasses.fields(typing.cast(Any, kind)):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in raw:
            raise InputError(f"{where}: {prefix}{field.name} is missing and has no default")
    values = {k: _value(hints[k], v, f"{prefix}{k}", where) for k, v in raw.items()}
    return kind(**values)


def _value(hint: Any, found: Any, name: str, where: str) -> Any:
    """One value in the type of its annotation."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(Any, hint), found, f"{name}.", where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(found, (list, tuple)):
        return tuple(_value(inner[0], x, f"{name}[{i}]", where) for i, x in enumerate(found))
    if origin is dict and isinstance(found, Mapping):
        return {str(k): _value(inner[1], v, f"{name}.{k}", where) for k, v in found.items()}
    if hint is float and type(found) is int:
        return float(found)
    if hint is Any or type(found) is hint or (origin is Literal and found in inner):
        return found
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    expected = words.get(hint, "a list" if origin is tuple else "a table")
    if origin is Literal:
        expected = f"one of {', '.join(inner)}"
    raise InputError(f"{where}: {name} is {found!r}, expected {expected}")
