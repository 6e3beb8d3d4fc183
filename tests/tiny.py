"""Tiny Qwen3-VL configs, weights and inputs in plain numpy, shared by every reference.

Weights are a function of (config, seed) alone: transformers 5.23, transformers 4.57.1 and this
project all build the same model from them, so no golden file has to hold a weight.
"""

import copy
import math
import zlib
from typing import Any

import numpy as np

END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 300, 301, 302, 303, 304
PAD = 299
TEXT_IDS = (5, 290)  # ordinary tokens are drawn from this range

# No two axes of one tensor are equal, and heads * head_dim (96) is not hidden_size (40).
TEXT = {
    "vocab_size": 320,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "use_cache": True,
    "rope_theta": 7000.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}
MOE = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
VISION = {
    "depth": 6,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_heads": 3,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 81,
    "out_hidden_size": 40,
    "deepstack_visual_indexes": [1, 2, 4],
    "hidden_act": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
}
ROPE_LIMIT = 32  # positions; the scaled rope types change at it

# name -> (text overrides, vision overrides, top-level overrides)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}, {}),
    "tied": ({"tie_word_embeddings": True}, {}, {"tie_word_embeddings": True}),
    "mha": ({"num_key_value_heads": 6}, {}, {}),
    "mqa": ({"num_key_value_heads": 1}, {}, {}),
    "no_taps": ({}, {"deepstack_visual_indexes": []}, {}),
    "one_tap": ({}, {"deepstack_visual_indexes": [3]}, {}),
    "four_taps": ({}, {"deepstack_visual_indexes": [0, 2, 3, 5]}, {}),
    "pos_5x5": ({}, {"num_position_embeddings": 25}, {}),
    "attention_bias": ({"attention_bias": True}, {}, {}),
    "merge_3": (
        {},
        {"spatial_merge_size": 3, "temporal_patch_size": 1, "patch_size": 5, "in_channels": 4},
        {},
    ),
    "activations": ({"hidden_act": "gelu"}, {"hidden_act": "silu"}, {}),
    "mha_bias_no_taps": (
        {"num_key_value_heads": 6, "attention_bias": True},
        {"deepstack_visual_indexes": []},
        {},
    ),
    "mqa_tied_one_tap": (
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"deepstack_visual_indexes": [3], "num_position_embeddings": 25},
        {"tie_word_embeddings": True},
    ),
    "shallow": (
        {"num_hidden_layers": 2},
        {"depth": 2, "deepstack_visual_indexes": [0]},
        {},
    ),
    "golden": (
        {"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16},
        {"depth": 3, "deepstack_visual_indexes": [0, 1]},
        {},
    ),
}
_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.6, 1.8, 2.1, 2.2, 2.5]}
_LONG["long_factor"] = [1.5, 2.0, 2.5, 3.5, 4.5, 6.0, 7.0, 9.0]
# "plain" is a default rope with the base of the scaled ones, which they are to be told apart from.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 3.0, "original_max_position_embeddings": ROPE_LIMIT},
    "yarn_options": {
        "factor": 4.0,
        "original_max_position_embeddings": ROPE_LIMIT,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "factor": 2.0,
        "original_max_position_embeddings": ROPE_LIMIT,
        "attention_factor": 1.3,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": ROPE_LIMIT, **_LONG},
    "longrope_attention_factor": {
        "factor": 4.0,
        "original_max_position_embeddings": ROPE_LIMIT,
        "attention_factor": 0.9,
        **_LONG,
    },
    "longrope_no_factor": {"original_max_position_embeddings": ROPE_LIMIT, **_LONG},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ROPE_LIMIT,
    },
}


def config_dict(variant: str = "base", moe: bool = False, rope: str = "default") -> dict[str, Any]:
    """A config.json in the released form (rope_theta and rope_scaling apart), as a new dict.

    variant: a key of VARIANTS; rope: a key of ROPES, whose limit is ROPE_LIMIT positions.
    """
    text_over, vision_over, top_over = VARIANTS[variant]
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    text = {"model_type": f"{kind}_text", **TEXT, **(MOE if moe else {}), **text_over}
    vision = {"model_type": kind, **VISION, **vision_over}
    if rope != "default":
        rope_type = "default" if rope == "plain" else rope.split("_", maxsplit=1)[0]
        text["rope_theta"] = 50.0  # every frequency turns within a few tokens, so scaling shows
        text["rope_scaling"] = {**text["rope_scaling"], **ROPES[rope], "rope_type": rope_type}
        # A dynamic rope changes at the longest length; the others are told of the shorter one.
        factor = 1 if rope_type == "dynamic" else ROPES[rope].get("factor", 4.0)
        text["max_position_embeddings"] = int(factor * ROPE_LIMIT)
    name = "Qwen3VLMoe" if moe else "Qwen3VL"
    return copy.deepcopy(
        {
            "architectures": [f"{name}ForConditionalGeneration"],
            "model_type": kind,
            "image_token_id": IMAGE_PAD,
            "video_token_id": VIDEO_PAD,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "tie_word_embeddings": False,
            "text_config": {"eos_token_id": END, "bos_token_id": PAD, **text},
            "vision_config": vision,
            **top_over,
        }
    )


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a released checkpoint (experts [E, in, out])."""
    return {**_text_shapes(config), **_vision_shapes(config["vision_config"])}


def _text_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    text = config["text_config"]
    d, h, vocab = text["hidden_size"], text["head_dim"], text["vocab_size"]
    n, k, f = text["num_attention_heads"], text["num_key_value_heads"], text["intermediate_size"]
    root = "model.language_model."
    shapes: dict[str, tuple[int, ...]] = {f"{root}embed_tokens.weight": (vocab, d)}
    for i in range(text["num_hidden_layers"]):
        layer = f"{root}layers.{i}."
        attn, mlp = f"{layer}self_attn.", f"{layer}mlp."
        for part, out, inner in (
            ("q", n * h, d),
            ("k", k * h, d),
            ("v", k * h, d),
            ("o", d, n * h),
        ):
            shapes[f"{attn}{part}_proj.weight"] = (out, inner)
            if text["attention_bias"]:
                shapes[f"{attn}{part}_proj.bias"] = (out,)
        shapes |= {f"{attn}{part}_norm.weight": (h,) for part in "qk"}
        shapes |= {f"{layer}{part}_layernorm.weight": (d,) for part in ("input", "post_attention")}
        if "num_experts" in text:
            e, m = text["num_experts"], text["moe_intermediate_size"]
            shapes[f"{mlp}gate.weight"] = (e, d)
            shapes[f"{mlp}experts.gate_up_proj"] = (e, d, 2 * m)
            shapes[f"{mlp}experts.down_proj"] = (e, m, d)
        else:
            shapes |= {f"{mlp}{part}_proj.weight": (f, d) for part in ("gate", "up")}
            shapes[f"{mlp}down_proj.weight"] = (d, f)
    shapes[f"{root}norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    return shapes


def _vision_shapes(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, f, p = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    wide = d * vision["spatial_merge_size"] ** 2
    patch = (vision["in_channels"], vision["temporal_patch_size"], p, p)
    linear: dict[str, tuple[int, ...]] = {"patch_embed.proj": (d, *patch)}
    norm: dict[str, tuple[int, ...]] = {}
    for j in range(vision["depth"]):
        block = f"blocks.{j}."
        linear |= {f"{block}attn.qkv": (3 * d, d), f"{block}attn.proj": (d, d)}
        linear |= {f"{block}mlp.linear_fc1": (f, d), f"{block}mlp.linear_fc2": (d, f)}
        norm |= {f"{block}norm1": (d,), f"{block}norm2": (d,)}
    taps = len(vision["deepstack_visual_indexes"])
    for merger in ("merger", *(f"deepstack_merger_list.{t}" for t in range(taps))):
        linear[f"{merger}.linear_fc1"] = (wide, wide)
        linear[f"{merger}.linear_fc2"] = (vision["out_hidden_size"], wide)
        norm[f"{merger}.norm"] = (d,) if merger == "merger" else (wide,)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.weight": (vision["num_position_embeddings"], d)
    }
    for name, shape in (linear | norm).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors of a released checkpoint; biases and norms are random too.

    Each tensor has a stream of its own, so its values do not depend on which others exist.
    """
    return {name: _tensor(name, shape, seed) for name, shape in tensor_shapes(config).items()}


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # RandomState, because numpy promises that its streams never change; Generator's may.
    rng = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % 2**32)
    normal = rng.standard_normal(shape)
    if name.endswith(".bias"):
        values = 0.2 * normal
    elif "norm" in name:
        values = 1.0 + 0.3 * normal
        if name == "model.language_model.norm.weight":
            # Random signs: a tied head would otherwise answer each token with itself.
            values = values * np.sign(rng.standard_normal(shape))
    elif name.endswith(("embed_tokens.weight", "pos_embed.weight")):
        values = normal
    elif ".experts." in name:
        values = normal * 1.5 / math.sqrt(shape[1])
    else:
        gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight", "mlp.gate.weight")) else 1.5
        values = normal * gain / math.sqrt(math.prod(shape[1:]))
    return values.astype(np.float32)


# ---- inputs: what a processor returns, as a dict of arrays ----
# ("text", tokens) or ("image", (1, h, w)) or ("clip", (t, h, w)), h and w in merged cells.
Row = list[tuple[str, Any]]

ROWS: dict[str, Row] = {
    "one_picture": [("text", 4), ("image", (1, 3, 5)), ("text", 7)],
    "three_pictures": [
        ("text", 2),
        ("image", (1, 1, 6)),
        ("image", (1, 4, 2)),
        ("text", 3),
        ("image", (1, 3, 3)),
        ("text", 5),
    ],
    "text": [("text", 13)],
    "clip": [("text", 3), ("clip", (3, 2, 4)), ("text", 4)],
    "clips_and_picture": [
        ("text", 2),
        ("clip", (2, 3, 2)),
        ("image", (1, 2, 3)),
        ("clip", (3, 1, 2)),
        ("text", 4),
    ],
    "short": [("text", 3), ("image", (1, 2, 3)), ("text", 4)],
    "long": [("text", 20), ("image", (1, 3, 5)), ("text", 25)],
    "long_text": [("text", 57)],
}


def inputs(config: dict[str, Any], row: str | Row, seed: int = 0) -> dict[str, np.ndarray]:
    """One prompt of a kind in ROWS (or a list of segments), batch of one, no padding.

    Returns input_ids, attention_mask, mm_token_type_ids [1, T] int64 and, where the prompt has
    them, pixel_values [N, C*Tp*P*P] float32 with image_grid_thw [n, 3], and the two of clips.
    """
    segments = ROWS[row] if isinstance(row, str) else row
    rng = np.random.RandomState(seed + 1)
    vision = config["vision_config"]
    ids: list[int] = []
    pixels: dict[str, list[np.ndarray]] = {"image": [], "clip": []}
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "clip": []}

    def text(count: int) -> None:
        ids.extend(rng.randint(*TEXT_IDS, size=count).tolist())

    for kind, what in segments:
        if kind == "text":
            text(what)
            continue
        frames, high, wide = what
        for _ in range(frames):
            if kind == "clip":
                text(2)  # stands for the frame's timestamp
            pad = IMAGE_PAD if kind == "image" else VIDEO_PAD
            ids += [VISION_START, *[pad] * (high * wide), VISION_END]
        merge = vision["spatial_merge_size"]
        grid = (frames, high * merge, wide * merge)
        width = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        grids[kind].append(grid)
        pixels[kind].append(rng.standard_normal((math.prod(grid), width)).astype(np.float32))

    tokens = np.asarray([ids], np.int64)
    out = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    out["mm_token_type_ids"] = (tokens == IMAGE_PAD) + 2 * (tokens == VIDEO_PAD)
    for kind, suffix, grid_key in (
        ("image", "", "image_grid_thw"),
        ("clip", "_videos", "video_grid_thw"),
    ):
        if grids[kind]:
            out[f"pixel_values{suffix}"] = np.concatenate(pixels[kind])
            out[grid_key] = np.asarray(grids[kind], np.int64)
    return out


def pad_batch(rows: list[dict[str, np.ndarray]], side: str = "left") -> dict[str, np.ndarray]:
    """Several prompts as one batch, padded to the longest on side ("left" or "right")."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    out: dict[str, np.ndarray] = {}
    for key, fill in (("input_ids", PAD), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        padded = []
        for row in rows:
            gap = longest - row[key].shape[1]
            width = (gap, 0) if side == "left" else (0, gap)
            padded.append(np.pad(row[key], ((0, 0), width), constant_values=fill))
        out[key] = np.concatenate(padded)
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        found = [row[key] for row in rows if key in row]
        if found:
            out[key] = np.concatenate(found)
    return out


def blank(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same prompt with every picture and clip turned to plain grey."""
    return {key: np.zeros_like(a) if key.startswith("pixel") else a for key, a in row.items()}
