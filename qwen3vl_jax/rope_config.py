"""How the decoder's rotary embedding is configured, read from a text_config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.config_checks import flag, integer, items, mapping, number, one_of, warn_once
from qwen3vl_jax.errors import InputError, shown

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# What code and class of transformers 4.57.1 fill in where the keys are absent.
DEFAULT_THETA = 5_000_000.0
DEFAULT_SECTION = (24, 20, 20)
# Of what scales frequencies: more is infinite in fp32.
_MAX_NUMBER = 1e15
# What each scaled rope type needs, beyond what has a default.
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the decoder: base, MRoPE sections (T, H, W) and scaling.

    Fields have the names of Hugging Face's `rope_parameters`; what a type does not use keeps its default.
    """

    rope_type: str = "default"
    theta: float = DEFAULT_THETA
    mrope_section: tuple[int, ...] = DEFAULT_SECTION
    original_max_position_embeddings: int = 0
    factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def to_hf(self) -> dict[str, Any]:
        """`rope_scaling` of the released form: what the type needs and what is not the default."""
        kept = {"rope_type", "mrope_section", *ROPE_NEEDS[self.rope_type]}
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                kept.add(field.name)
        scaling = {name: getattr(self, name) for name in sorted(kept - {"theta"})}
        return {**scaling, "mrope_interleaved": True}


def read_rope(raw: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """RopeConfig of a text_config, in the released form or that of transformers 5; raises InputError.

    With both forms present rope_scaling counts, whole, as in transformers 5.23.
    """
    scaling, parameters = (
        mapping(raw.get(key), f"text_config.{key}") for key in ("rope_scaling", "rope_parameters")
    )
    given = scaling or parameters
    where = f"text_config.{'rope_parameters' if parameters and not scaling else 'rope_scaling'}."
    rope_type = given.get("rope_type", given.get("type", "default"))
    rope_type = "default" if rope_type == "mrope" else rope_type
    one_of(rope_type, where + "rope_type", ROPE_TYPES)
    if given.get("mrope_interleaved", True) is not True:
        found = shown(given["mrope_interleaved"])
        raise InputError(f"config: {where}mrope_interleaved is {found}, implemented: true")
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    one_of(1.0 if partial is None else partial, where + "partial_rotary_factor", (1.0,))
    section = given.get("mrope_section")
    section = items(DEFAULT_SECTION if section is None else section, where + "mrope_section")
    section = tuple(integer(n, where + "mrope_section", at_least=0) for n in section)
    if len(section) != 3:
        raise InputError(
            f"config: {where}mrope_section is {shown(list(section))}, expected three numbers (T, H, W)"
        )
    for key in ROPE_NEEDS[rope_type]:
        if given.get(key) is None:
            raise InputError(f"config: {where}{key} is absent; rope_type {rope_type!r} needs it")
    _warn_of_unused(given, where, rope_type)
    fields = {} if rope_type == "default" else _scaling(given, where, head_dim)
    if rope_type in ("yarn", "longrope", "llama3"):
        original = _original(raw, given, where) or max_positions
        fields["original_max_position_embeddings"] = original
        if rope_type != "llama3" and "factor" not in fields:
            fields["factor"] = max_positions / original
    inside = given.get("rope_theta") is not None
    theta = given["rope_theta"] if inside else raw.get("rope_theta")
    theta = DEFAULT_THETA if theta is None else theta
    theta_key = f"{where if inside else 'text_config.'}rope_theta"
    theta = number(theta, theta_key, above=0, at_most=_MAX_NUMBER)
    rope = RopeConfig(rope_type, theta, section, **fields)
    if rope_type == "llama3" and rope.low_freq_factor == rope.high_freq_factor:
        raise InputError(f"config: {where}low_freq_factor is high_freq_factor, expected less")
    if rope_type == "dynamic" and head_dim <= 2:
        raise InputError(f"config: text_config.head_dim is {head_dim}, 'dynamic' needs more than 2")
    if rope_type == "yarn" and theta == 1:
        raise InputError(f"config: {theta_key} is 1, 'yarn' needs another number")
    if rope_type == "longrope" and rope.original_max_position_embeddings == 1:
        raise InputError(f"config: {where}original_max_position_embeddings is 1, expected more")
    return rope


def _warn_of_unused(given: Mapping[str, Any], where: str, rope_type: str) -> None:
    """Warns of keys that change nothing: misspelt ones, and those of a type that is not named."""
    known = {"rope_type", "type", "mrope_interleaved", "mrope_section", "rope_theta"}
    known.add("partial_rotary_factor")
    if rope_type != "default":
        known |= {field.name for field in dataclasses.fields(RopeConfig)} - {"theta"}
    for key in given:
        if key not in known:
            warn_once(f"config: {where}{key[:80]} is not used with rope_type {rope_type!r}")


def _scaling(given: Mapping[str, Any], where: str, head_dim: int) -> dict[str, Any]:
    """What scales the frequencies, of the fields of RopeConfig that are present."""
    plain = {"rope_type", "theta", "mrope_section"}
    found: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(RopeConfig) if f.name not in plain):
        value, key = given.get(name), where + name
        if value is None:
            continue
        if name in ("short_factor", "long_factor"):
            found[name] = tuple(number(n, key, 0, _MAX_NUMBER) for n in items(value, key))
            if len(found[name]) != head_dim // 2:
                raise InputError(
                    f"config: {key} has {len(found[name])} numbers, expected head_dim / 2 = "
                    f"{head_dim // 2}"
                )
        elif name == "original_max_position_embeddings":
            found[name] = integer(value, key)
        elif name == "truncate":
            found[name] = flag(value, key)
        else:
            above = None if "mscale" in name else 0
            found[name] = number(value, key, above, _MAX_NUMBER)
    return found


def _original(raw: Mapping[str, Any], given: Mapping[str, Any], where: str) -> int | None:
    """The positions before scaling; the top level counts first, as in transformers."""
    name = "original_max_position_embeddings"
    for part, prefix in ((raw, "text_config."), (given, where)):
        if part.get(name) is not None:
            return integer(part[name], prefix + name)
    return None
