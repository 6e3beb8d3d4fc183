"""The six released sizes, for Config.named. Instruct and Thinking models share them."""

from __future__ import annotations

from typing import Any

from qwen3vl_jax.errors import InputError

_TEXT_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
)
_VISION_KEYS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "deepstack_visual_indexes",
)
_SIGLIP_LARGE = (24, 1024, 4096, 16, [5, 11, 17])
_SIGLIP_SO400M = (27, 1152, 4304, 16, [8, 16, 24])
# size: (text values, vision values, tied head)
RELEASED = {
    "2b": ((2048, 28, 16, 8, 6144, 0, 0), _SIGLIP_LARGE, True),
    "4b": ((2560, 36, 32, 8, 9728, 0, 0), _SIGLIP_LARGE, True),
    "8b": ((4096, 36, 32, 8, 12288, 0, 0), _SIGLIP_SO400M, False),
    "32b": ((5120, 64, 64, 8, 25600, 0, 0), _SIGLIP_SO400M, False),
    "30b-a3b": ((2048, 48, 32, 4, 6144, 768, 128), _SIGLIP_SO400M, False),
    "235b-a22b": ((4096, 94, 64, 4, 12288, 1536, 128), _SIGLIP_SO400M, False),
}


def released_config(size: str) -> dict[str, Any]:
    """The config.json of a released size, as a dict. Raises InputError for an unknown size."""
    if size.lower() not in RELEASED:
        raise InputError(f"size {size!r} is unknown; released sizes: {', '.join(RELEASED)}")
    text_row, vision_row, tied = RELEASED[size.lower()]
    text = dict(zip(_TEXT_KEYS, text_row, strict=True))
    moe = {"num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if text["num_experts"] == 0:
        moe = {}
        del text["num_experts"], text["moe_intermediate_size"]
    name = "qwen3_vl_moe" if moe else "qwen3_vl"
    section = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return {
        "model_type": name,
        "architectures": [f"Qwen3VL{'Moe' if moe else ''}ForConditionalGeneration"],
        "tie_word_embeddings": tied,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config": {
            **text,
            **moe,
            "model_type": f"{name}_text",
            "vocab_size": 151936,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "rope_theta": 5_000_000,
            "rope_scaling": section,
            "attention_bias": False,
            "max_position_embeddings": 262144,
            "eos_token_id": 151645,
        },
        "vision_config": {
            **dict(zip(_VISION_KEYS, vision_row, strict=True)),
            "model_type": name,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "hidden_act": "gelu_pytorch_tanh",
        },
    }
