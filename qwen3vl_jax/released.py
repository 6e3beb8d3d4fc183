"""The six released sizes, for Config.named. Instruct and Thinking models share them."""

import re
from typing import Any

from qwen3vl_jax.errors import InputError

# The released size that the name of a checkpoint tells.
SIZE = re.compile(r"(235b-a22b|30b-a3b|32b|8b|4b|2b)", re.IGNORECASE)

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
_SIGLIP_LARGE = (24, 1024, 4096, 16, (5, 11, 17))
_SIGLIP_SO400M = (27, 1152, 4304, 16, (8, 16, 24))
# size: (text values, vision values, tied head)
RELEASED = {
    "2b": ((2048, 28, 16, 8, 6144, 0, 0), _SIGLIP_LARGE, True),
    "4b": ((2560, 36, 32, 8, 9728, 0, 0), _SIGLIP_LARGE, True),
    "8b": ((4096, 36, 32, 8, 12288, 0, 0), _SIGLIP_SO400M, False),
    "32b": ((5120, 64, 64, 8, 25600, 0, 0), _SIGLIP_SO400M, False),
    "30b-a3b": ((2048, 48, 32, 4, 6144, 768, 128), _SIGLIP_SO400M, False),
    "235b-a22b": ((4096, 94, 64, 4, 12288, 1536, 128), _SIGLIP_SO400M, False),
}


def released_sizes(size: str) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Fields of TextConfig and of VisionConfig, and whether the head is tied. Raises InputError."""
    if size.lower() not in RELEASED:
        raise InputError(f"size {size!r} is unknown; released sizes: {', '.join(RELEASED)}")
    text, vision, tied = RELEASED[size.lower()]
    return dict(zip(_TEXT_KEYS, text)), dict(zip(_VISION_KEYS, vision)), tied
