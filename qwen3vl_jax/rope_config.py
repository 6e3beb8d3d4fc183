"""How the decoder's rotary embedding is configured, read from a text_config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# What code and class of transformers 4.57.1 fill in where the keys are absent.
DEFAULT_THETA = 5_000_000.0
DEFAULT_SECTION = (24, 20, 20)


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


def one_of(value: Any, key: str, allowed: tuple) -> Any:
    """The value, if it is allowed; raises InputError with key, found and allowed."""
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        raise InputError(f"config: {key} is {value!r}, implemented: {names}")
    return value


def read_rope(raw: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """RopeConfig of a text_config, in the released form or that of transformers 5; raises InputError."""
    where = "text_config.rope_scaling."
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    rope_type = given.get("rope_type", given.get("type", "default"))
    rope_type = "default" if rope_type == "mrope" else rope_type
    one_of(rope_type, where + "rope_type", ROPE_TYPES)
    if given.get("mrope_interleaved", True) is not True:
        found = given["mrope_interleaved"]
        raise InputError(f"config: {where}mrope_interleaved is {found!r}, implemented: true")
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    one_of(1.0 if partial is None else partial, where + "partial_rotary_factor", (1.0,))
    section = tuple(given.get("mrope_section") or DEFAULT_SECTION)
    if len(section) != 3 or sum(section) * 2 != head_dim:
        raise InputError(
            f"config: {where}mrope_section is {list(section)}, expected three numbers (T, H, W) "
            f"that sum to head_dim / 2 = {head_dim / 2:g}"
        )
    for key in ROPE_NEEDS[rope_type]:
        if given.get(key) is None:
            raise InputError(f"config: {where}{key} is absent; rope_type {rope_type!r} needs it")
    original = raw.get("original_max_position_embeddings")
    original = original or given.get("original_max_position_embeddings") or max_positions
    theta = given.get("rope_theta", raw.get("rope_theta"))
    fields = {f.name for f in dataclasses.fields(RopeConfig)} - {"theta", "rope_type"}
    scaling = {k: v for k, v in given.items() if k in fields and v is not None}
    if rope_type == "default":
        scaling = {}
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            scaling[key] = tuple(map(float, scaling[key]))
            if len(scaling[key]) != head_dim // 2:
                raise InputError(
                    f"config: {where}{key} has {len(scaling[key])} numbers, expected head_dim / 2 = "
                    f"{head_dim // 2}"
                )
    if rope_type in ("yarn", "longrope", "llama3"):
        scaling["original_max_position_embeddings"] = original
        if rope_type != "llama3" and scaling.get("factor") is None:
            scaling["factor"] = max_positions / original
    scaling["mrope_section"] = section
    theta = DEFAULT_THETA if theta is None else float(theta)
    return RopeConfig(rope_type, theta, **scaling)
