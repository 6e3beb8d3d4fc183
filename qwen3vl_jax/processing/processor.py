"""Conversations, or raw text and pictures, to what the model takes; token ids back to text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing import pictures
from qwen3vl_jax.processing.chat import (
    Medium,
    hand_out,
    placeholder_mismatch,
    plain_data,
    read_conversation,
)
from qwen3vl_jax.processing.escape import Escape
from qwen3vl_jax.processing.images import ImageSettings, preprocess
from qwen3vl_jax.processing.template import ChatTemplate
from qwen3vl_jax.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen3vl_jax.structs import Batch

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class _Prompt:
    """One row before it is encoded: its text with marks, and its pictures in order."""

    text: str
    mark: str
    images: list[Medium]


@dataclasses.dataclass
class Processor:
    """A checkpoint's tokenizer, chat template and picture settings in one place."""

    config: Config
    tokenizer: Tokenizer
    template: ChatTemplate
    image_settings: ImageSettings
    stop_ids: tuple[int, ...]  # ids that end an answer
    max_fetch_bytes: int = pictures.MAX_FETCH_BYTES  # of a picture given by URL
    fetch_seconds: float = pictures.FETCH_SECONDS

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        chat_template: str | Path | None = None,
        revision: str | None = None,
    ) -> Processor:
        """Reads a checkpoint directory, Hugging Face's or ours, or a Hub id as `load` does.

        Its config.json, tokenizer, chat template, picture settings (released ones where there is no
        file) and generation_config.json. chat_template: a file, a template's text, or the name of
        one of the checkpoint's. revision: branch, tag or commit of a Hub id, whose weights are
        fetched too. Raises InputError that names what is missing or does not fit.
        """
        from qwen3vl_jax.checkpoint import resolve

        directory = resolve(source, revision)
        config = Config.from_hf(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        vision = config.vision
        _check_token(tokenizer, config.image_token_id, "image_token_id", directory)
        released = ImageSettings(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )
        settings = ImageSettings.from_dir(directory, released)
        for name, theirs in (
            ("patch_size", vision.patch_size),
            ("temporal_patch_size", vision.temporal_patch_size),
            ("merge_size", vision.spatial_merge_size),
        ):
            ours = getattr(settings, name)
            if ours != theirs:
                raise InputError(
                    f"{directory}: {name} is {ours} for pictures and {theirs} in config.json"
                )
        template = ChatTemplate.from_dir(directory, chat_template)
        stop_ids = _stop_ids(directory, config, tokenizer)
        return cls(config, tokenizer, template, settings, stop_ids)

    def render(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_vars: Any,
    ) -> str:
        """The prompt of one conversation, one placeholder a picture.

        continue_final_message leaves the last message open and adds no new turn. The text is what
        the template wrote: a special token that a user spelled looks like one here, which is why
        `__call__` does not encode this string. Raises InputError.
        """
        prompt = self._prompt(
            conversation,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_vars=template_vars,
            allow_special=True,
        )
        return prompt.text

    def inputs(
        self,
        conversations: Any = None,
        *,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        allow_special: bool = False,
        template_vars: Mapping[str, Any] | None = None,
        padding_side: str = "right",
        **image_overrides: Any,
    ) -> Arrays:
        """What transformers' processor would return, as numpy arrays.

        conversations: one (a list of messages) or many; or text: raw prompts with placeholders, in
        which special tokens are special. images: one picture, a list, or a list a row, for raw text
        and for content items without a source. allow_special: user, system and tool text may hold
        special tokens. image_overrides: image settings of this call (min_pixels=...); a content
        item may have its own.
        Returns input_ids, attention_mask, mm_token_type_ids (1 at pictures) [B, T] int64, padded on
        padding_side, and if there are pictures pixel_values [sum patches, C*Tp*P*P] float32 and
        image_grid_thw [n, 3] int64. Raises InputError.
        """
        if (conversations is None) == (text is None):
            raise InputError("processor: expected conversations or text=, one of the two")
        if padding_side not in ("right", "left"):
            raise InputError(f"padding_side is {padding_side!r}, expected right or left")
        settings = self.image_settings.override(**image_overrides)
        if text is not None:
            prompts = self._raw_prompts(text)
        else:
            options = {
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "template_vars": template_vars or {},
                "allow_special": allow_special,
            }
            rows = conversations if _is_many(conversations) else [conversations]
            prompts = [self._prompt(row, tools, **options) for row in rows]
        return self._arrays(prompts, images, settings, padding_side)

    def __call__(self, conversations: Any = None, **options: Any) -> Batch:
        """A Batch of one conversation or many, or of text=; options as in `inputs`, padded right.

        Raises InputError.
        """
        arrays = self.inputs(conversations, **options)
        from qwen3vl_jax.processing.batch import make_batch

        return make_batch(
            self.config,
            input_ids=arrays["input_ids"],
            attention_mask=arrays["attention_mask"],
            pixel_values=arrays.get("pixel_values"),
            image_grid_thw=arrays.get("image_grid_thw"),
        )

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Text of token ids: a string for one row, a list of strings for several."""
        if hasattr(tokens, "__array__"):
            tokens = np.asarray(tokens).tolist()
        if isinstance(tokens, int):
            tokens = [tokens]
        tokens = list(tokens)
        if tokens and not isinstance(tokens[0], int) and getattr(tokens[0], "ndim", 1):
            return [self.decode(row, skip_special_tokens) for row in tokens]
        return self.tokenizer.decode(tokens, skip_special_tokens)

    def _prompt(
        self,
        conversation: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_vars: Mapping[str, Any],
        allow_special: bool,
    ) -> _Prompt:
        messages, media = read_conversation(conversation)
        plain_tools, variables = _plain_tools(tools), plain_data(dict(template_vars))
        escape = None
        if not allow_special:
            seen = json.dumps([messages, plain_tools, variables], ensure_ascii=False)
            seen += self.template.text(bool(tools))
            added = self.tokenizer.added.keys() - self.tokenizer.special.keys()
            escape = Escape(self.tokenizer.special, added, seen)
            messages = [escape.message(message) for message in messages]
            plain_tools = escape.data(plain_tools)
            # Templates are given tokens by such names (bos_token); those are not a user's text.
            variables = {
                k: v if k.endswith("_token") else escape.data(v) for k, v in variables.items()
            }
        names = {"eos_token": self.tokenizer.eos_id, "pad_token": self.tokenizer.pad_id}
        given = {k: self.tokenizer.token_of(i) for k, i in names.items() if i is not None}
        rendered = self.template.render(
            messages,
            plain_tools,
            add_generation_prompt,
            continue_final_message,
            {**given, **variables},
        )
        if escape is None:
            return _Prompt(rendered, "", media)
        return _Prompt(escape.tidy(rendered), escape.mark, media)

    def _raw_prompts(self, text: str | Sequence[str]) -> list[_Prompt]:
        rows = [text] if isinstance(text, str) else list(text)
        for row in rows:
            if not isinstance(row, str):
                raise InputError(f"text: found {type(row).__name__}, expected a string or strings")
        image = self.tokenizer.token_of(self.config.image_token_id)
        return [_Prompt(row, "", [Medium("image", None)] * row.count(image)) for row in rows]

    def _arrays(
        self, prompts: list[_Prompt], images: Any, settings: ImageSettings, padding_side: str
    ) -> Arrays:
        if not prompts:
            raise InputError("processor: found no conversation and no text")
        rows, pixels, grids = [], [], []
        media = hand_out([prompt.images for prompt in prompts], images)
        for number, (prompt, wanted) in enumerate(zip(prompts, media)):
            found = [self._picture(medium, settings) for medium in wanted]
            pixels += [p for p, _ in found]
            grids += [g for _, g in found]
            rows.append(self._row(prompt, [g for _, g in found], f"row {number + 1}"))
        out = self._pad(rows, padding_side)
        if grids:
            out["pixel_values"] = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            out["image_grid_thw"] = np.asarray(grids, np.int64)
        return out

    def _picture(
        self, medium: Medium, settings: ImageSettings
    ) -> tuple[np.ndarray, tuple[int, int, int]]:
        limits = {"max_bytes": self.max_fetch_bytes, "timeout": self.fetch_seconds}
        picture = pictures.load_image(medium.source, **limits)
        return preprocess(picture, settings, **medium.overrides)

    def _row(self, prompt: _Prompt, grids: Iterable[tuple[int, int, int]], name: str) -> list[int]:
        """Ids of a prompt with each placeholder repeated once a token of its picture."""
        ids = self.tokenizer.encode(prompt.text, prompt.mark)
        image = self.config.image_token_id
        counts = [t * h * w // self.config.vision.merge_unit for t, h, w in grids]
        found = ids.count(image)
        if found != len(counts):
            raise InputError(placeholder_mismatch(f"{name}: ", found, len(counts)))
        feed = iter(counts)
        row: list[int] = []
        for token in ids:
            row += [image] * next(feed) if token == image else [token]
        if not row:
            raise InputError(f"{name}: the prompt is empty")
        return row

    def _pad(self, rows: list[list[int]], side: str) -> Arrays:
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_id if self.tokenizer.pad_id is not None else 0
        ids = np.full((len(rows), longest), pad, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            ids[i, at] = row
            mask[i, at] = 1
        kinds = ((ids == self.config.image_token_id) & (mask == 1)).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}


def _is_many(conversations: Any) -> bool:
    """Whether this is a list of conversations, not one conversation (a list of messages)."""
    if isinstance(conversations, (str, Mapping)) or not isinstance(conversations, Sequence):
        raise InputError(
            f"conversations: found {type(conversations).__name__}, expected a list of messages or "
            "of conversations (raw text goes in text=)"
        )
    return bool(conversations) and not isinstance(conversations[0], Mapping)


def _plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> Any:
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools):
        found = f"found {type(tools).__name__}, " if not isinstance(tools, list) else ""
        raise InputError(f"tools: {found}expected a list of JSON schemas (objects)")
    return [plain_data(tool) for tool in tools]


def _check_token(tokenizer: Tokenizer, token_id: int, name: str, directory: Path) -> None:
    if token_id not in tokenizer.added.values():
        raise InputError(
            f"{directory}: config.json's {name} {token_id} is no added token of the tokenizer"
        )


def _stop_ids(directory: Path, config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """End ids of generation_config.json, else of config.json, else the tokenizer's."""
    path = directory / "generation_config.json"
    found: Any = None
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as e:
            raise InputError(f"{path}: cannot read this JSON file: {e}") from e
    if found is None:
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        return config.eos_token_ids or eos
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) for i in found):
        raise InputError(f"{path}: eos_token_id is {found!r}, expected token ids")
    return tuple(found)
