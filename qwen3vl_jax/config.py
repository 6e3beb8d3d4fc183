"""The model's shapes and switches, read from a checkpoint's config.json and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.config_checks import (
    end_ids,
    flag,
    integer,
    items,
    mapping,
    number,
    one_of,
    required_int,
    warn_of_misplaced,
)
from qwen3vl_jax.errors import InputError, shown
from qwen3vl_jax.released import released_config
from qwen3vl_jax.rope_config import RopeConfig, read_rope
from qwen3vl_jax.storage.json_text import read_json, read_json_file, write_json
from qwen3vl_jax.storage.paths import as_path
from qwen3vl_jax.storage.safetensors_files import holds_head

# The axes of a mesh, from the slowest links to the fastest, and their short names.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
SHORT = {"dp": "data", "ep": "expert", "sp": "sequence", "tp": "tensor"}
TIED = "tie_word_embeddings"
TEXT_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
# What the class of transformers 4.57.1 fills in for a key that is absent. Only keys that fix no shape.
_TEXT_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "max_position_embeddings": 128_000,
    "num_experts_per_tok": 4,
    "initializer_range": 0.02,
}
_TOKEN_DEFAULTS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. `num_experts` 0 means dense SwiGLU layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    initializer_range: float = 0.02


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower (ViT), its patch merger and the DeepStack mergers."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    hidden_act: str = "gelu_pytorch_tanh"
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, rows and columns of one patch: the order of a pixel row's features."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)

    @property
    def grid_side(self) -> int:
        """Side of the square table of learned positions."""
        return math.isqrt(self.num_position_embeddings)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything of a checkpoint that the code depends on; hashable, so it can be a static argument."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> Config:
        """Reads a config.json (its dict, its path, or the directory that holds it).

        Takes the released form (rope_theta, rope_scaling, num_experts) and that of transformers 5
        (rope_parameters, num_local_experts). Raises InputError with the key, what was found and
        what is allowed, for an absent key that fixes a shape and for a value not implemented.
        """
        raw = source if isinstance(source, Mapping) else _read(as_path(source))
        model_type = raw.get("model_type", "qwen3_vl")
        if not isinstance(model_type, str) or not model_type.startswith("qwen3_vl"):
            raise InputError(
                f"config: model_type is {shown(model_type)}, expected qwen3_vl or qwen3_vl_moe"
            )
        for part in ("text_config", "vision_config"):
            if not isinstance(raw.get(part), Mapping):
                raise InputError(f"config: {part} is {shown(raw.get(part))}, expected an object")
        warn_of_misplaced(raw, [field.name for field in dataclasses.fields(TextConfig)])
        text_raw = raw["text_config"]
        is_moe = "moe" in model_type or "moe" in str(text_raw.get("model_type", ""))
        text, vision = _text(text_raw, is_moe), _vision(raw["vision_config"])
        _check_towers(text, vision)
        tokens = {
            k: required_int(raw, k, "", at_least=0, default=d) for k, d in _TOKEN_DEFAULTS.items()
        }
        tied = _is_tied(raw, source)
        eos = end_ids(text_raw.get("eos_token_id", raw.get("eos_token_id")))
        return cls(text, vision, **tokens, tie_word_embeddings=tied, eos_token_ids=eos)

    @classmethod
    def named(cls, size: str) -> Config:
        """The config of a released size: 2b, 4b, 8b, 32b, 30b-a3b or 235b-a22b."""
        return cls.from_hf(released_config(size))

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this config, in the released form; `from_hf` gives the same config back."""
        moe = self.text.num_experts > 0
        text = dataclasses.asdict(self.text)
        del text["rope"]
        text["rope_theta"] = self.text.rope.theta
        text["rope_scaling"] = self.text.rope.to_hf()
        if not moe:
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                del text[key]
        name = "qwen3_vl_moe" if moe else "qwen3_vl"
        text |= {"model_type": f"{name}_text", TIED: self.tie_word_embeddings}
        text["eos_token_id"] = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else None
        if len(self.eos_token_ids) > 1:
            text["eos_token_id"] = list(self.eos_token_ids)
        top = {k: getattr(self, k) for k in (*_TOKEN_DEFAULTS, TIED)}
        vision = {**dataclasses.asdict(self.vision), "model_type": name}
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.pop("rope_theta")}
        arch = f"Qwen3VL{'Moe' if moe else ''}ForConditionalGeneration"
        plain = {**top, "text_config": text, "vision_config": vision}
        found = {"architectures": [arch], "model_type": name, **plain}
        return read_json(write_json(found, "config"), "config")


def _is_tied(raw: Mapping[str, Any], source: Any) -> bool:
    """Whether the head is the embedding; raises InputError for what is no flag.

    transformers 5 reads the key at the top, transformers 4 the one in text_config. Where the second
    alone is true, a directory without a head is tied, and one that holds a head (as transformers 5
    writes mixtures of experts) is not.
    """
    places = {TIED: raw, f"text_config.{TIED}": raw["text_config"]}
    top, text = (
        part.get(TIED) is not None and flag(part[TIED], where) for where, part in places.items()
    )
    if top or not text or isinstance(source, Mapping):
        return top
    path = as_path(source)
    return holds_head(path if path.is_dir() else path.parent) is False


def model_folder(directory: Path) -> Path:
    """Where a checkpoint's config and tokenizer are: its directory, of a run of train.py RUN_DIR/model."""
    return directory / "model" if (directory / "config.toml").is_file() else directory


def is_run(directory: Path) -> bool:
    """Whether this is a directory that train.py writes."""
    return (directory / "config.toml").is_file() and (directory / "checkpoints").is_dir()


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        folder, path = path, model_folder(path) / "config.json"
        if not path.is_file():
            raise InputError(
                f"{folder}: no checkpoint and no run in this folder; {path}: cannot be read (it does "
                "not exist)"
            )
    return read_json_file(path, f"config: {path}")


def _text(raw: Mapping[str, Any], is_moe: bool) -> TextConfig:
    where = "text_config."
    get = lambda key: raw[key] if raw.get(key) is not None else _TEXT_DEFAULTS[key]  # noqa: E731
    shape = {
        k: required_int(raw, k, where)
        for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    heads = shape["num_attention_heads"]
    if "head_dim" not in raw or ("num_key_value_heads" not in raw):
        key = "num_key_value_heads" if "head_dim" in raw else "head_dim"
        raise InputError(f"config: {where}{key} is absent; it fixes a shape (null is allowed)")
    head_dim = None if raw["head_dim"] is None else required_int(raw, "head_dim", where)
    if head_dim is None and shape["hidden_size"] % heads:
        raise InputError(
            f"config: {where}head_dim is null and hidden_size {shape['hidden_size']} does not divide "
            f"by num_attention_heads {heads}"
        )
    kv_heads = raw["num_key_value_heads"]
    kv_heads = heads if kv_heads is None else required_int(raw, "num_key_value_heads", where)
    if heads % kv_heads:
        raise InputError(
            f"config: {where}num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    experts = _experts(raw, is_moe)
    no_dense = experts["num_experts"] and raw.get("intermediate_size") is None
    max_positions = get("max_position_embeddings")
    max_positions = integer(max_positions, where + "max_position_embeddings")
    head_dim = head_dim or shape["hidden_size"] // heads
    if head_dim % 2:
        raise InputError(f"config: {where}head_dim is {head_dim}, expected an even number")
    return TextConfig(
        **shape,
        intermediate_size=0 if no_dense else required_int(raw, "intermediate_size", where),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope=read_rope(raw, head_dim, max_positions),
        hidden_act=one_of(get("hidden_act"), where + "hidden_act", TEXT_ACTIVATIONS),
        rms_norm_eps=number(get("rms_norm_eps"), where + "rms_norm_eps"),
        attention_bias=flag(get("attention_bias"), where + "attention_bias"),
        initializer_range=number(get("initializer_range"), where + "initializer_range"),
        **experts,
    )


def _experts(raw: Mapping[str, Any], is_moe: bool) -> dict[str, int]:
    where = "text_config."
    if not is_moe:
        return {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    if found := raw.get("mlp_only_layers"):
        raise InputError(
            f"config: {where}mlp_only_layers is {shown(found)}, implemented: [] (all sparse)"
        )
    one_of(raw.get("decoder_sparse_step", 1), where + "decoder_sparse_step", (1,))
    key = "num_local_experts" if raw.get("num_experts") is None else "num_experts"
    if raw.get(key) is None:
        raise InputError(
            f"config: {where}num_experts is absent; it fixes a shape and has no default"
        )
    experts = required_int(raw, key, where)
    per_token = raw.get("num_experts_per_tok", _TEXT_DEFAULTS["num_experts_per_tok"])
    per_token = integer(per_token, where + "num_experts_per_tok")
    if per_token > experts:
        raise InputError(
            f"config: {where}num_experts_per_tok is {per_token}, expected <= {experts}"
        )
    width = required_int(raw, "moe_intermediate_size", where)
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
    }


def _vision(raw: Mapping[str, Any]) -> VisionConfig:
    where = "vision_config."
    ints = [
        f.name
        for f in dataclasses.fields(VisionConfig)
        if f.name
        not in ("deepstack_visual_indexes", "hidden_act", "rope_theta", "initializer_range")
    ]
    shape = {k: required_int(raw, k, where) for k in ints}
    if math.isqrt(shape["num_position_embeddings"]) ** 2 != shape["num_position_embeddings"]:
        found = shape["num_position_embeddings"]
        raise InputError(
            f"config: {where}num_position_embeddings is {found}, expected a square number"
        )
    if shape["hidden_size"] % (4 * shape["num_heads"]):
        raise InputError(
            f"config: {where}hidden_size is {shape['hidden_size']}, expected a multiple of 4 x num_heads "
            f"= {4 * shape['num_heads']} (2-D rotary splits a head in four)"
        )
    if raw.get("deepstack_visual_indexes") is None:
        raise InputError(
            f"config: {where}deepstack_visual_indexes is absent; it fixes shapes ([] = none)"
        )
    taps = items(raw["deepstack_visual_indexes"], where + "deepstack_visual_indexes")
    depth = shape["depth"]
    if any(type(t) is not int or not 0 <= t < depth for t in taps) or any(
        a >= b for a, b in itertools.pairwise(taps)
    ):
        raise InputError(
            f"config: {where}deepstack_visual_indexes is {shown(list(taps))}, expected increasing layer "
            f"numbers from 0 to depth - 1 = {depth - 1}"
        )
    rope = mapping(raw.get("rope_parameters"), where + "rope_parameters")
    given = {**raw, "rope_theta": rope.get("rope_theta")}
    names = ("hidden_act", "rope_theta", "initializer_range")
    act, theta, spread = (
        getattr(VisionConfig, name) if given.get(name) is None else given[name] for name in names
    )
    return VisionConfig(
        **shape,
        deepstack_visual_indexes=taps,
        hidden_act=one_of(act, where + "hidden_act", TEXT_ACTIVATIONS),
        rope_theta=number(theta, where + "rope_parameters.rope_theta", above=0),
        initializer_range=number(spread, where + "initializer_range"),
    )


def _check_towers(text: TextConfig, vision: VisionConfig) -> None:
    if vision.out_hidden_size != text.hidden_size:
        raise InputError(
            f"config: vision_config.out_hidden_size is {vision.out_hidden_size}, expected "
            f"text_config.hidden_size = {text.hidden_size}"
        )
    taps = len(vision.deepstack_visual_indexes)
    if taps > text.num_hidden_layers:
        raise InputError(
            f"config: vision_config.deepstack_visual_indexes has {taps} taps, expected at most "
            f"text_config.num_hidden_layers = {text.num_hidden_layers}"
        )
