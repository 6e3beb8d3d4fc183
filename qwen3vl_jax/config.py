"""The model's shapes and switches, read from a checkpoint's config.json and nothing else."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax import config_checks as check
from qwen3vl_jax.errors import InputError, shown
from qwen3vl_jax.rope_config import RopeConfig, read_rope
from qwen3vl_jax.storage.json_text import read_json, read_json_file, write_json
from qwen3vl_jax.storage.paths import as_path
from qwen3vl_jax.storage.safetensors_files import holds_head

# The axes of a mesh, from the slowest links to the fastest, and their short names.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
SHORT = {"dp": "data", "ep": "expert", "sp": "sequence", "tp": "tensor"}
# Label of a token that the loss leaves out.
IGNORE_INDEX = -100
TIED = "tie_word_embeddings"
TEXT_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
_TOKENS = {"image_token_id": 151655, "video_token_id": 151656}
_TOKENS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
_EXPERTS = {
    "num_experts": (check.size(10_000), check.REQUIRED),
    "num_experts_per_tok": (check.integer(), check.REQUIRED),
    "moe_intermediate_size": (check.size(), check.REQUIRED),
}


# The released size that the name of a checkpoint tells.
SIZE = re.compile(r"(235b-a22b|30b-a3b|32b|8b|4b|2b)", re.IGNORECASE)

_TEXT_KEYS = """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
    moe_intermediate_size num_experts
    """.split()
_VISION_KEYS = "depth hidden_size intermediate_size num_heads deepstack_visual_indexes".split()
_SIGLIP_LARGE = (24, 1024, 4096, 16, (5, 11, 17))
_SIGLIP_SO400M = (27, 1152, 4304, 16, (8, 16, 24))
# size: (values of _TEXT_KEYS, of _VISION_KEYS, whether the head is tied)
RELEASED = {
    "2b": ((2048, 28, 16, 8, 6144, 0, 0), _SIGLIP_LARGE, True),
    "4b": ((2560, 36, 32, 8, 9728, 0, 0), _SIGLIP_LARGE, True),
    "8b": ((4096, 36, 32, 8, 12288, 0, 0), _SIGLIP_SO400M, False),
    "32b": ((5120, 64, 64, 8, 25600, 0, 0), _SIGLIP_SO400M, False),
    "30b-a3b": ((2048, 48, 32, 4, 6144, 768, 128), _SIGLIP_SO400M, False),
    "235b-a22b": ((4096, 94, 64, 4, 12288, 1536, 128), _SIGLIP_SO400M, False),
}


# Fields with a check are keys of config.json. Those that fix a shape have no default, the others have
# that of transformers 4.57.1.
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder. `num_experts` 0 means dense SwiGLU layers."""

    vocab_size: int = check.field(check.size())
    hidden_size: int = check.field(check.size())
    intermediate_size: int
    num_hidden_layers: int = check.field(check.size(1_000))
    num_attention_heads: int = check.field(check.size())
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = check.field(check.integer(), 128_000)
    rope: RopeConfig
    hidden_act: str = check.field(check.one_of(*TEXT_ACTIVATIONS), "silu")
    rms_norm_eps: float = check.field(check.number(), 1e-6)
    attention_bias: bool = check.field(check.flag, False)
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    initializer_range: float = check.field(check.number(), 0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower (ViT), its patch merger and the DeepStack mergers."""

    depth: int = check.field(check.size(1_000))
    hidden_size: int = check.field(check.size())
    intermediate_size: int = check.field(check.size())
    num_heads: int = check.field(check.size())
    in_channels: int = check.field(check.size())
    patch_size: int = check.field(check.size())
    temporal_patch_size: int = check.field(check.size())
    spatial_merge_size: int = check.field(check.size())
    num_position_embeddings: int = check.field(check.size())
    out_hidden_size: int = check.field(check.size())
    deepstack_visual_indexes: tuple[int, ...] = check.field(check.items)
    hidden_act: str = check.field(check.one_of(*TEXT_ACTIVATIONS), "gelu_pytorch_tanh")
    # In the key rope_parameters.
    rope_theta: float = 10_000.0
    initializer_range: float = check.field(check.number(), 0.02)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches merged into one token."""
        return self.spatial_merge_size**2

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of one patch: the order of its pixels."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)

    @property
    def grid_side(self) -> int:
        """Side of the square position embedding table."""
        return math.isqrt(self.num_position_embeddings)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shapes and switches of a model; hashable, so it can be a static argument of jit."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> "Config":
        """Reads a config.json: its dict, its path, or the directory that holds it.

        Takes the released form (rope_theta, rope_scaling, num_experts) and that of transformers 5
        (rope_parameters, num_local_experts). Raises InputError for an absent key that fixes a shape
        and for a value that is not implemented.
        """
        raw = source if isinstance(source, Mapping) else _read(as_path(source))
        model_type = raw.get("model_type", "qwen3_vl")
        known = isinstance(model_type, str) and model_type.startswith("qwen3_vl")
        check.require(known, "model_type", model_type, "qwen3_vl or qwen3_vl_moe")
        for part in ("text_config", "vision_config"):
            check.require(isinstance(raw.get(part), Mapping), part, raw.get(part), "an object")
        text_raw = raw["text_config"]
        names = {field.name for field in dataclasses.fields(TextConfig)} - {"rope"}
        # transformers does not read them there either.
        for key in sorted({*names, "rope_scaling", "rope_parameters", "rope_theta"}):
            if raw.get(key) is not None and raw[key] != text_raw.get(key):
                beside = f"{key} {shown(raw[key])} at the top of config.json"
                check.warn_once(f"config: {beside} is not used; put it into text_config")
        is_moe = "moe" in model_type or "moe" in str(text_raw.get("model_type", ""))
        text, vision = _text(text_raw, is_moe), _vision(raw["vision_config"])
        width, expected = vision.out_hidden_size, f"text_config.hidden_size = {text.hidden_size}"
        check.require(width == text.hidden_size, "vision_config.out_hidden_size", width, expected)
        if (taps := len(vision.deepstack_visual_indexes)) > text.num_hidden_layers:
            most = f"at most text_config.num_hidden_layers = {text.num_hidden_layers}"
            where = "vision_config.deepstack_visual_indexes"
            raise InputError(f"config: {where}: got {taps} taps, expected {most}")
        required = dict.fromkeys(_TOKENS, (check.integer(at_least=0), check.REQUIRED))
        tokens = check.read_fields({**_TOKENS, **raw}, "", required)
        eos = check.token_ids(text_raw.get("eos_token_id", raw.get("eos_token_id")), "eos_token_id")
        tied = _is_tied(raw, source)
        return cls(text, vision, **tokens, tie_word_embeddings=tied, eos_token_ids=eos)

    @classmethod
    def named(cls, size: str) -> "Config":
        """The config of a released size: 2b, 4b, 8b, 32b, 30b-a3b or 235b-a22b."""
        if size.lower() not in RELEASED:
            raise InputError(f"size {size!r} is unknown; released sizes: {', '.join(RELEASED)}")
        of_text, of_vision, tied = RELEASED[size.lower()]
        text: dict[str, Any] = dict(zip(_TEXT_KEYS, of_text))
        text |= {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 262_144}
        text |= {"num_experts_per_tok": 8 if text["num_experts"] else 0, "rope": RopeConfig()}
        vision: dict[str, Any] = dict(zip(_VISION_KEYS, of_vision))
        vision |= {"in_channels": 3, "patch_size": 16, "temporal_patch_size": 2}
        vision |= {"spatial_merge_size": 2, "num_position_embeddings": 2304}
        vision["out_hidden_size"] = text["hidden_size"]
        ids = {**_TOKENS, "eos_token_ids": (151_645,)}
        return cls(TextConfig(**text), VisionConfig(**vision), tie_word_embeddings=tied, **ids)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this config in the released form: the inverse of `from_hf`."""
        moe, rope, eos = self.text.num_experts > 0, self.text.rope, self.eos_token_ids
        name = "qwen3_vl_moe" if moe else "qwen3_vl"
        left_out = {"rope", *(() if moe else _EXPERTS)}
        text = {k: v for k, v in dataclasses.asdict(self.text).items() if k not in left_out}
        text |= {"rope_theta": rope.theta, "rope_scaling": rope.to_hf()}
        text |= {"model_type": f"{name}_text", TIED: self.tie_word_embeddings}
        text["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos) or None
        top = {k: getattr(self, k) for k in (*_TOKENS, TIED)}
        vision = {**dataclasses.asdict(self.vision), "model_type": name}
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.pop("rope_theta")}
        arch = f"Qwen3VL{'Moe' if moe else ''}ForConditionalGeneration"
        found = {"architectures": [arch], "model_type": name, **top}
        found |= {"text_config": text, "vision_config": vision}
        return read_json(write_json(found, "config"), "config")


def _is_tied(raw: Mapping[str, Any], source: Any) -> bool:
    """Whether the head is the embedding. Raises InputError.

    transformers 5 reads the key at the top, transformers 4 the key in text_config. If only the latter
    is true, the files decide: a directory with a head is not tied. transformers 5 writes such
    mixtures of experts.
    """
    table = {TIED: (check.flag, False)}
    top = check.read_fields(raw, "", table)[TIED]
    text = check.read_fields(raw["text_config"], "text_config.", table)[TIED]
    if top or not text or isinstance(source, Mapping):
        return top
    path = as_path(source)
    return holds_head(path if path.is_dir() else path.parent) is False


def model_folder(directory: Path) -> Path:
    """The folder of a checkpoint's config and tokenizer: its directory, or a run's RUN_DIR/model."""
    return directory / "model" if (directory / "config.toml").is_file() else directory


def is_run(directory: Path) -> bool:
    """Whether a directory is a RUN_DIR of train.py."""
    return (directory / "config.toml").is_file() and (directory / "checkpoints").is_dir()


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        folder, path = path, model_folder(path) / "config.json"
        if not path.is_file():
            none = f"{folder}: no checkpoint and no run in this folder"
            raise InputError(f"{none}; {path}: cannot be read (it does not exist)")
    return read_json_file(path, f"config: {path}")


def _text(raw: Mapping[str, Any], is_moe: bool) -> TextConfig:
    where = "text_config."
    for key in ("head_dim", "num_key_value_heads"):
        if key not in raw:
            raise InputError(f"config: {where}{key} is absent; it fixes a shape (null is allowed)")
    found = check.read_fields(raw, where, TextConfig)
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    divides = raw["head_dim"] is not None or hidden % heads == 0
    expected = f"a multiple of num_attention_heads {heads}"
    check.require(divides, where + "hidden_size", hidden, expected)
    heads_of = {"head_dim": (check.size(), hidden // heads)}
    heads_of["num_key_value_heads"] = (check.size(), heads)
    found |= check.read_fields(raw, where, heads_of)
    if heads % (kv_heads := found["num_key_value_heads"]):
        unequal = f"{heads} is no multiple of num_key_value_heads {kv_heads}"
        raise InputError(f"config: {where}num_attention_heads {unequal}")
    head_dim = found["head_dim"]
    check.require(head_dim % 2 == 0, where + "head_dim", head_dim, "an even number")
    if is_moe:
        layers = raw.get("mlp_only_layers")
        check.require(not layers, where + "mlp_only_layers", layers, "[] (all sparse)")
        check.one_of(1)(raw.get("decoder_sparse_step", 1), where + "decoder_sparse_step")
        given = {"num_experts_per_tok": 4, **raw}
        if given.get("num_experts") is None:
            given["num_experts"] = given.get("num_local_experts")
        found |= check.read_fields(given, where, _EXPERTS)
        count, most = found["num_experts_per_tok"], f"<= num_experts = {found['num_experts']}"
        check.require(count <= found["num_experts"], where + "num_experts_per_tok", count, most)
    # Released mixtures of experts have the key, re-exports may leave it out.
    dense = {"intermediate_size": (check.size(), check.REQUIRED)}
    unused = is_moe and raw.get("intermediate_size") is None
    found |= {"intermediate_size": 0} if unused else check.read_fields(raw, where, dense)
    return TextConfig(**found, rope=read_rope(raw, head_dim, found["max_position_embeddings"]))


def _vision(raw: Mapping[str, Any]) -> VisionConfig:
    where = "vision_config."
    found = check.read_fields(raw, where, VisionConfig)
    rope = check.mapping(raw.get("rope_parameters"), where + "rope_parameters")
    theta = {"rope_theta": (check.number(above=0), VisionConfig.rope_theta)}
    c = VisionConfig(**found, **check.read_fields(rope, where + "rope_parameters.", theta))
    count, square = c.num_position_embeddings, c.grid_side**2 == c.num_position_embeddings
    check.require(square, where + "num_position_embeddings", count, "a square number")
    expected = f"a multiple of 4 x num_heads = {4 * c.num_heads} (2-D rotary splits a head in four)"
    divides = c.hidden_size % (4 * c.num_heads) == 0
    check.require(divides, where + "hidden_size", c.hidden_size, expected)
    taps = c.deepstack_visual_indexes
    layers = all(type(t) is int and 0 <= t < c.depth for t in taps)
    rising = layers and all(a < b for a, b in itertools.pairwise(taps))
    expected = f"increasing layer numbers from 0 to depth - 1 = {c.depth - 1}"
    check.require(rising, where + "deepstack_visual_indexes", list(taps), expected)
    return c
