"""A checkpoint directory without weights: a small vocabulary with Qwen's added tokens."""

import functools
import json
from pathlib import Path
from typing import Any

import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

SPECIAL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
    <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
    <|vision_pad|> <|image_pad|> <|video_pad|>
""".split()
ORDINARY = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
    <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>
""".split()
# What the vocabulary is made of, and the texts that are compared with transformers.
TEXTS: list[str] = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
TEMPLATE = """\
{%- set seen = namespace(pictures=0) %}
{%- macro show(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if item.type == 'image' or 'image' in item or 'image_url' in item %}
                {%- set seen.pictures = seen.pictures + 1 %}
                {%- if add_vision_id %}Picture {{ seen.pictures }}: {% endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif item.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in item %}
                {{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + show(message.content) }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- if message.content %}
            {{- show(message.content) }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# The released turn formats, in words of our own where tools are introduced.
_TESTS = Path(__file__).resolve().parent
RELEASED_TEMPLATES = {
    "instruct": (_TESTS.parent / "demo" / "chat_template.jinja").read_text(),
    "thinking": (_TESTS / "thinking.jinja").read_text(),
}
IMAGES = {
    "size": {"shortest_edge": 64, "longest_edge": 4096},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(model: models.BPE, train: bool = False) -> str:
    """tokenizer.json of a byte-level BPE, trained here or not, with Qwen's added tokens behind it."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    tokenizer.decoder = decoders.ByteLevel()
    if train:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(TEXTS[:12] * 3, trainer)
    for names, special in ((SPECIAL, True), (ORDINARY, False)):
        tokens = [AddedToken(name, normalized=False, special=special) for name in names]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return tokenizer.to_str()


@functools.cache
def tokenizer_json() -> str:
    """tokenizer.json of the small vocabulary."""
    return tokenizer_of(models.BPE(), train=True)


@functools.lru_cache(maxsize=2)
def token_ids(tokenizer: str | None = None) -> dict[str, int]:
    """Spelling -> id of the 26 added tokens, of a tokenizer.json or of the small vocabulary's."""
    added = Tokenizer.from_str(tokenizer or tokenizer_json()).get_added_tokens_decoder()
    return {token.content: i for i, token in added.items()}


def tokenizer_config(tokenizer: str | None = None, **changes: Any) -> dict[str, Any]:
    """A tokenizer_config.json as released."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(i): {"content": name, **flags, "special": name in SPECIAL}
        for name, i in token_ids(tokenizer).items()
    }
    return {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 262144,
        **changes,
    }


def save_tokenizer(
    path: Path, form: str = "json", tokenizer: str | None = None, **config: Any
) -> Path:
    """Writes a tokenizer: "json" (tokenizer.json), "vocab" (vocab.json + merges.txt and the added
    tokens in tokenizer_config.json) or "old" (the added tokens in added_tokens.json)."""
    path.mkdir(parents=True, exist_ok=True)
    settings, text = tokenizer_config(tokenizer, **config), tokenizer or tokenizer_json()
    if form == "json":
        (path / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        model = json.loads(text)["model"]
        (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        merges = [" ".join(pair) for pair in model["merges"]]
        lines = "\n".join(["#version: 0.2", *merges, ""])
        (path / "merges.txt").write_text(lines, encoding="utf-8")
    if form == "old":
        del settings["added_tokens_decoder"]
        (path / "added_tokens.json").write_text(json.dumps(token_ids(tokenizer)))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def config(moe: bool = False, tokenizer: str | None = None) -> dict[str, Any]:
    """The config.json of the tiny model with a vocabulary's ids."""
    ids = token_ids(tokenizer)
    raw = tiny.config_dict("base", moe)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    raw.update({key: ids[f"<|{name}|>"] for key, name in zip(keys, names)})
    raw["text_config"]["vocab_size"] = max(ids.values()) + 1
    raw["text_config"]["eos_token_id"] = ids["<|im_end|>"]
    return raw


def save(
    path: Path,
    form: str = "json",
    template: str | None = TEMPLATE,
    tokenizer: str | None = None,
) -> Path:
    """Writes every file of a checkpoint that a processor reads, weights left out."""
    save_tokenizer(path, form, tokenizer)
    (path / "config.json").write_text(json.dumps(config(tokenizer=tokenizer)))
    (path / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path
