"""The six released sizes, for Config.named. Instruct and Thinking models share them."""

import re

# The released size that the name of a checkpoint tells.
SIZE = re.compile(r"(235b-a22b|30b-a3b|32b|8b|4b|2b)", re.IGNORECASE)

TEXT_KEYS = """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
    moe_intermediate_size num_experts
    """.split()
VISION_KEYS = "depth hidden_size intermediate_size num_heads deepstack_visual_indexes".split()
_SIGLIP_LARGE = (24, 1024, 4096, 16, (5, 11, 17))
_SIGLIP_SO400M = (27, 1152, 4304, 16, (8, 16, 24))
# size: (values of TEXT_KEYS, of VISION_KEYS, whether the head is tied)
RELEASED = {
    "2b": ((2048, 28, 16, 8, 6144, 0, 0), _SIGLIP_LARGE, True),
    "4b": ((2560, 36, 32, 8, 9728, 0, 0), _SIGLIP_LARGE, True),
    "8b": ((4096, 36, 32, 8, 12288, 0, 0), _SIGLIP_SO400M, False),
    "32b": ((5120, 64, 64, 8, 25600, 0, 0), _SIGLIP_SO400M, False),
    "30b-a3b": ((2048, 48, 32, 4, 6144, 768, 128), _SIGLIP_SO400M, False),
    "235b-a22b": ((4096, 94, 64, 4, 12288, 1536, 128), _SIGLIP_SO400M, False),
}
