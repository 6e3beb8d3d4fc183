"""Everything of the demo checkpoint but its weights: config, tokenizer, template, settings.

``python -m demo.files DIR`` writes them; training starts from them.
"""

import json
import shutil
import sys
from itertools import product
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import ByteLevel

from demo import tasks

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
VOCABULARY = 512  # rows of the embedding: merged pieces, then the added tokens, then spare rows

# In Qwen's order. The first 14 are flagged special, the others are added but not special.
SPECIAL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>
""".split()
ADDED = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
    <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>
""".split()

# How Qwen2 cuts text into words before merging; every decimal digit stands alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer of the Qwen2 kind on the demo's own sentences."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in ADDED])
    return tokenizer


def _sentences() -> list[str]:
    """The demo's questions and answers, its template, and what a user may say around them."""
    lines = [*tasks.READ, *tasks.TOTAL, *tasks.HELLO, tasks.INTRODUCTION, tasks.SYSTEM] * 3
    for digit in range(10):
        words = {"d": digit, "one": tasks.ONE[digit], "many": tasks.MANY[digit]}
        lines += [wording.format(**words) for wording in tasks.COUNT + tasks.FIND]
        lines.append(json.dumps([{"bbox_2d": [1, 2, 3, 4], "label": str(digit)}] * 3))
    for wording, row, col in product(tasks.CELL, range(1, 5), range(1, 6)):
        lines.append(wording.format(row=row, col=col))
    lines += ["user\n", "assistant\n", "system\n"] * 20
    lines += ["Picture 1: ", "Video 1: "] * 3
    return lines + TEMPLATE.read_text().splitlines()


def make_config(tokenizer: Tokenizer) -> dict:
    """The ``config.json`` of the demo model, in the form of the released files."""
    names = "endoftext im_end image_pad video_pad vision_start vision_end"
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in names.split()}
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["endoftext"],
        "dtype": "bfloat16",
        "eos_token_id": ids["im_end"],
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 6,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
    vision = {
        "deepstack_visual_indexes": [1, 3],
        "depth": 6,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "model_type": "qwen3_vl",
        "num_heads": 3,
        "num_position_embeddings": 144,
        "out_hidden_size": 192,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": ids["image_pad"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "4.57.1",
        "video_token_id": ids["video_pad"],
        "vision_config": vision,
        "vision_end_token_id": ids["vision_end"],
        "vision_start_token_id": ids["vision_start"],
    }


def _processing(kind: str) -> dict:
    """Settings of the image or video processor; the sizes are areas in pixels."""
    shared = {
        "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    if kind == "image":
        return shared | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    return shared | {"video_processor_type": "Qwen3VLVideoProcessor"}


def _tokenizer_config(tokenizer: Tokenizer) -> dict:
    added = {
        str(tokenizer.token_to_id(name)): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": name in SPECIAL,
        }
        for name in SPECIAL + ADDED
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write(folder: Path) -> None:
    """Write all files of the checkpoint directory but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    end, stop = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    for name, content in (
        ("config.json", make_config(tokenizer)),
        ("preprocessor_config.json", _processing("image")),
        ("video_preprocessor_config.json", _processing("video")),
        ("tokenizer_config.json", _tokenizer_config(tokenizer)),
        (
            "generation_config.json",
            {
                "bos_token_id": end,
                "do_sample": False,
                "eos_token_id": [stop, end],
                "pad_token_id": end,
            },
        ),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(f"wrote the demo's files to {sys.argv[1]}")
