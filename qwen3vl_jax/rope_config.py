"""The rotary embedding of the decoder, read from a text_config."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3vl_jax import config_checks as check
from qwen3vl_jax.errors import InputError

ROPE_TYPES = "default", "linear", "dynamic", "yarn", "longrope", "llama3"
# The keys that a rope type needs.
_NEEDS = {
    **dict.fromkeys(("linear", "dynamic"), ("factor",)),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# A larger scale or base makes infinite frequencies in fp32.
_MAX_NUMBER = 1e15
_POSITIVE, _FROM_0 = check.number(0, _MAX_NUMBER), check.number(None, _MAX_NUMBER)
_PLAIN = "rope_type type mrope_interleaved mrope_section rope_theta partial_rotary_factor".split()


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the decoder: base, MRoPE sections (T, H, W) and scaling.

    Fields have the names of Hugging Face's `rope_parameters`, and the defaults of transformers 4.57.1.
    Those with a check scale frequencies; those that a type does not use keep their default.
    """

    rope_type: str = "default"
    theta: float = 5_000_000.0
    mrope_section: tuple[int, ...] = (24, 20, 20)
    original_max_position_embeddings: int = check.field(check.integer(), 0)
    factor: float = check.field(_POSITIVE, 1.0)
    attention_factor: float | None = check.field(_POSITIVE, None)
    beta_fast: float = check.field(_POSITIVE, 32.0)
    beta_slow: float = check.field(_POSITIVE, 1.0)
    mscale: float = check.field(_FROM_0, 0.0)
    mscale_all_dim: float = check.field(_FROM_0, 0.0)
    truncate: bool = check.field(check.flag, True)
    low_freq_factor: float = check.field(_POSITIVE, 1.0)
    high_freq_factor: float = check.field(_POSITIVE, 4.0)
    short_factor: tuple[float, ...] = check.field(check.each(_POSITIVE), ())
    long_factor: tuple[float, ...] = check.field(check.each(_POSITIVE), ())

    def to_hf(self) -> dict[str, Any]:
        """`rope_scaling` in the released form: keys that the type needs or that are not the default."""
        kept = {"rope_type", "mrope_section", *_NEEDS.get(self.rope_type, ())}
        fields = dataclasses.fields(self)
        kept |= {f.name for f in fields if getattr(self, f.name) != f.default} - {"theta"}
        return {name: getattr(self, name) for name in sorted(kept)} | {"mrope_interleaved": True}


def read_rope(raw: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """RopeConfig of a text_config, in the released form or that of transformers 5.

    If both forms are there, rope_scaling alone counts, as in transformers 5.23. Raises InputError.
    """
    keys = "rope_scaling", "rope_parameters"
    scaling, parameters = (check.mapping(raw.get(key), f"text_config.{key}") for key in keys)
    given, where = scaling or parameters, f"text_config.{keys[bool(parameters and not scaling)]}."
    rope_type = given.get("rope_type", given.get("type", "default"))
    rope_type = "default" if rope_type == "mrope" else rope_type
    check.one_of(*ROPE_TYPES)(rope_type, where + "rope_type")
    interleaved = given.get("mrope_interleaved", True)
    check.require(interleaved is True, where + "mrope_interleaved", interleaved, "true")
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    check.one_of(1.0)(1.0 if partial is None else partial, where + "partial_rotary_factor")
    table = {"mrope_section": (check.each(check.integer(at_least=0)), RopeConfig.mrope_section)}
    section = check.read_fields(given, where, table)["mrope_section"]
    three = "three numbers (T, H, W)"
    check.require(len(section) == 3, where + "mrope_section", list(section), three)
    fields = _scaling(given, where, rope_type, head_dim)
    if rope_type in ("yarn", "longrope", "llama3"):
        name, original = "original_max_position_embeddings", max_positions
        # text_config counts first, as in transformers.
        for part, prefix in ((given, where), (raw, "text_config.")):
            if part.get(name) is not None:
                original = check.integer()(part[name], prefix + name)
        fields[name] = original
        if rope_type != "llama3" and given.get("factor") is None:
            fields["factor"] = max_positions / original
    part, prefix = (raw, "text_config.") if given.get("rope_theta") is None else (given, where)
    theta = {"rope_theta": (_POSITIVE, RopeConfig.theta)}
    found = check.read_fields(part, prefix, theta)["rope_theta"]
    rope = RopeConfig(rope_type, found, section, **fields)
    # Values at which the formula of a rope type divides by zero.
    low, original = rope.low_freq_factor, rope.original_max_position_embeddings
    flat = low == rope.high_freq_factor
    refused = {
        "llama3": (flat, where + "low_freq_factor", low, "less than high_freq_factor"),
        "dynamic": (head_dim <= 2, "text_config.head_dim", head_dim, "more than 2"),
        "yarn": (found == 1, prefix + "rope_theta", 1, "another number"),
        "longrope": (original == 1, f"{where}original_max_position_embeddings", 1, "more"),
    }
    if rope_type in refused:
        wrong, key, value, expected = refused[rope_type]
        check.require(not wrong, key, value, f"{expected} with rope_type {rope_type!r}")
    return rope


def _scaling(given: Mapping[str, Any], where: str, rope_type: str, head_dim: int) -> dict[str, Any]:
    """The fields of RopeConfig that scale frequencies, those that are present; warns of other keys."""
    for key in _NEEDS.get(rope_type, ()):
        if given.get(key) is None:
            raise InputError(f"config: {where}{key} is absent; rope_type {rope_type!r} needs it")
    found = {} if rope_type == "default" else check.read_fields(given, where, RopeConfig)
    for key in given:
        if key not in _PLAIN and key not in found:
            check.warn_once(f"config: {where}{key[:80]} is not used with rope_type {rope_type!r}")
    for key in ("short_factor", "long_factor"):
        if key in found and given.get(key) is not None and len(found[key]) != head_dim // 2:
            counts = f"got {len(found[key])} numbers, expected head_dim / 2 = {head_dim // 2}"
            raise InputError(f"config: {where}{key}: {counts}")
    return found


def powers_of(r: RopeConfig, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The exponents of the H/2 frequencies in fp32, and the base to their power."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return exponents, np.float32(r.theta) ** exponents


def fixed_frequencies(r: RopeConfig, dim: int) -> tuple[np.ndarray, float]:
    """The H/2 inverse frequencies of a type that no position changes, and the factor on cos and sin."""
    powers = powers_of(r, dim)[1]
    if r.rope_type == "linear":
        return 1.0 / powers / np.float32(r.factor), 1.0
    if r.rope_type == "yarn":
        return _yarn(r, powers, dim)
    # Llama 3.1: low frequencies are divided by the factor, high ones kept, smoothed between.
    if r.rope_type == "llama3":
        inverse = 1.0 / powers
        turns = r.original_max_position_embeddings * inverse / np.float32(2 * math.pi)
        smooth = (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)
        smooth = np.clip(smooth, 0, 1).astype(np.float32)
        return (1 - smooth) * inverse / np.float32(r.factor) + smooth * inverse, 1.0
    return 1.0 / powers, 1.0


def longrope_scale(r: RopeConfig) -> float:
    """The factor on cos and sin of LongRoPE."""
    if r.attention_factor is not None:
        return r.attention_factor
    if r.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(r.factor) / math.log(r.original_max_position_embeddings))


def _yarn(r: RopeConfig, powers: np.ndarray, dim: int) -> tuple[np.ndarray, float]:
    """YaRN: low frequencies are interpolated, high ones kept, with a linear ramp between.

    The second result is the factor on cos and sin of YaRN.
    """

    def mscale(m: float) -> float:
        return 1.0 if r.factor <= 1 else 0.1 * m * math.log(r.factor) + 1.0

    def dimension_of(rotations: float) -> float:
        ratio = r.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(r.theta))

    low, high = dimension_of(r.beta_fast or 32.0), dimension_of(r.beta_slow or 1.0)
    if r.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    ramp = ramp.astype(np.float32)
    both = r.mscale and r.mscale_all_dim
    scale = mscale(r.mscale) / mscale(r.mscale_all_dim) if both else mscale(1.0)
    scale = scale if r.attention_factor is None else r.attention_factor
    return 1.0 / (np.float32(r.factor) * powers) * ramp + 1.0 / powers * (1 - ramp), scale
