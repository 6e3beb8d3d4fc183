"""TOML tables as frozen dataclasses. A field's annotation is the type of its key."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from qwen3vl_jax.errors import InputError

_T = TypeVar("_T")
_NO_TABLE = "is no table, expected key=value or table.key=value"


def apply_change(kind: type, raw: dict[str, Any], change: str) -> None:
    """Writes one ``table.key=value`` into the raw tables. Raises InputError that names the change."""
    name, equals, text = change.partition("=")
    name = name.strip()
    if not equals or not name:
        raise InputError(f"{change!r}: expected key=value or table.key=value")
    at, hint, prefix, parts = raw, kind, "", name.split(".")
    while True:
        part, table = parts.pop(0), hint
        if typing.get_origin(hint) is dict and typing.get_args(hint)[1] is not Any:
            part, parts = ".".join([part, *parts]), []
        hint = _hint_inside(hint, part, prefix, change, at)
        prefix += f"{part}."
        key: Any = int(part) if isinstance(at, list) else part
        held = at[key : key + 1] if isinstance(at, list) else [at[key]] if key in at else []
        if not parts:
            break
        is_list = typing.get_origin(hint) is tuple
        fresh: Any = list(getattr(table, part, ())) if is_list else {}
        _put(at, key, held[0] if held else fresh)
        at = at[key]
        if not isinstance(at, (dict, list)):
            raise InputError(f"{change}: {prefix[:-1]} {_NO_TABLE}")
    _put(at, key, _changed(hint, text, name, change))


def _put(at: Any, key: Any, value: Any) -> None:
    """Sets a key of a table or an index of a list. The index after the last one appends."""
    if isinstance(at, list) and key == len(at):
        at.append(value)
    else:
        at[key] = value


def _hint_inside(hint: Any, part: str, prefix: str, change: str, at: Any) -> Any:
    """The type of one part of a change's key. Raises InputError for an unknown key or index."""
    inner = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        _check_keys([part], hint, prefix, change)
        return typing.get_type_hints(hint)[part]
    if typing.get_origin(hint) is tuple and isinstance(at, list):
        if not part.isdecimal() or int(part) > len(at):
            raise InputError(f"{change}: {part!r} is no place in a list of {len(at)} (from 0)")
        return inner[0]
    if typing.get_origin(hint) is dict or (hint is Any and isinstance(at, dict)):
        return inner[1] if inner else Any
    name = prefix.rstrip(".")
    raise InputError(f"{change}: {name} {_NO_TABLE}")


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
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise InputError(f"{where}: unknown key {prefix}{key}; {hint}")


def build(kind: type[_T], raw: Any, prefix: str, where: str) -> _T:
    """A dataclass from a table. Raises InputError for missing or unknown keys and wrong types."""
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: {prefix.rstrip('.')} is {raw!r}, expected a table of keys")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    hints = typing.get_type_hints(kind)
    _check_keys(raw, kind, prefix, where)
    for name, field in fields.items():
        plain = field.default is dataclasses.MISSING
        if plain and field.default_factory is dataclasses.MISSING and name not in raw:
            raise InputError(f"{where}: {prefix}{name} is missing and has no default")
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
    if hint is Any:
        return found
    if hint is float and type(found) is int:
        return float(found)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and type(found) is hint:
        return found
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    expected = words.get(hint, "a list" if origin is tuple else "a table")
    raise InputError(f"{where}: {name} is {found!r}, expected {expected}")
