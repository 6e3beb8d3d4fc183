"""Conversations, or raw text and pictures, to what the model takes; token ids back to text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
from qwen3vl_jax.processing.videos import UsedFrames, VideoSettings, preprocess_video

if TYPE_CHECKING:
    from qwen3vl_jax.structs import Batch

Arrays = dict[str, Any]
Grid = tuple[int, int, int]


@dataclasses.dataclass
class _Prompt:
    """One row before it is encoded: its text with marks, and its pictures and clips in order."""

    text: str
    mark: str
    media: list[Medium]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A picture or clip as the model sees it; `used` says which frames of a clip."""

    rows: np.ndarray
    grid: Grid
    used: UsedFrames | None = None


@dataclasses.dataclass
class Processor:
    """A checkpoint's tokenizer, chat template and picture settings in one place."""

    config: Config
    tokenizer: Tokenizer
    template: ChatTemplate
    image_settings: ImageSettings
    video_settings: VideoSettings
    stop_ids: tuple[int, ...]  # ids that end an answer
    wrap_clips: bool = False  # one more vision_start .. vision_end around each whole clip
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
        for name in ("image", "video", "vision_start", "vision_end"):
            _check_token(tokenizer, getattr(config, f"{name}_token_id"), name, directory)
        sizes: dict[str, Any] = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        settings = ImageSettings.from_dir(directory, ImageSettings(**sizes))
        clip_settings = VideoSettings.from_dir(directory, VideoSettings(**sizes))
        for kind in (settings, clip_settings):
            for name, theirs in sizes.items():
                if (ours := getattr(kind, name)) != theirs:
                    raise InputError(
                        f"{directory}: {kind.KIND} {name} is {ours}, and {theirs} in config.json"
                    )
        template = ChatTemplate.from_dir(directory, chat_template)
        stop_ids = _stop_ids(directory, config, tokenizer)
        return cls(config, tokenizer, template, settings, clip_settings, stop_ids)

    def render(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_vars: Any,
    ) -> str:
        """The prompt of one conversation, one placeholder a picture or clip.

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
        videos: Any = None,
        videos_kwargs: Mapping[str, Any] | None = None,
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
        and for content items without a source; videos: one clip or a list. allow_special: user,
        system and tool text may hold special tokens. image_overrides: image settings of this call
        (min_pixels=...), videos_kwargs those of clips (fps=..., video_metadata one a clip); a
        content item may have its own.
        Returns input_ids, attention_mask, mm_token_type_ids (1 at pictures, 2 at clips) [B, T] int64,
        padded on padding_side; if there are pictures pixel_values [sum patches, C*Tp*P*P] float32
        and image_grid_thw [n, 3] int64; if there are clips pixel_values_videos, video_grid_thw and
        video_metadata, a list of UsedFrames. Raises InputError.
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
        media = hand_out([prompt.media for prompt in prompts], images, videos)
        media = _with_options(media, videos_kwargs or {})
        seen = [[self._see(medium, settings) for medium in row] for row in media]
        return self._arrays(prompts, seen, padding_side)

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
            pixel_values_videos=arrays.get("pixel_values_videos"),
            video_grid_thw=arrays.get("video_grid_thw"),
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
        kinds = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        names = {self.tokenizer.token_of(i): kind for kind, i in kinds.items()}
        place = re.compile("|".join(map(re.escape, names)))
        return [_Prompt(r, "", [Medium(names[t], None) for t in place.findall(r)]) for r in rows]

    def _see(self, medium: Medium, settings: ImageSettings) -> _Seen:
        limits = {"max_bytes": self.max_fetch_bytes, "timeout": self.fetch_seconds}
        if medium.kind == "video":
            return _Seen(
                *preprocess_video(medium.source, self.video_settings, limits, **medium.overrides)
            )
        picture = pictures.load_image(medium.source, **limits)
        return _Seen(*preprocess(picture, settings, **medium.overrides))

    def _arrays(self, prompts: list[_Prompt], seen: list[list[_Seen]], side: str) -> Arrays:
        if not prompts:
            raise InputError("processor: found no conversation and no text")
        rows = [
            self._row(prompt, found, f"row {number}")
            for number, (prompt, found) in enumerate(zip(prompts, seen), 1)
        ]
        out = self._pad(rows, side)
        everything = [one for row in seen for one in row]
        for names, found in (
            (("pixel_values", "image_grid_thw"), [s for s in everything if s.used is None]),
            (("pixel_values_videos", "video_grid_thw"), [s for s in everything if s.used]),
        ):
            if found:
                pixels = [one.rows for one in found]
                out[names[0]] = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
                out[names[1]] = np.asarray([one.grid for one in found], np.int64)
        if used := [one.used for one in everything if one.used]:
            out["video_metadata"] = used
        return out

    def _row(self, prompt: _Prompt, seen: list[_Seen], name: str) -> list[int]:
        """Ids of a prompt with each placeholder repeated once a token of its picture or frame."""
        config, unit = self.config, self.config.vision.merge_unit
        clips = [one for one in seen if one.used]
        counts = {
            config.image_token_id: iter([np.prod(s.grid) // unit for s in seen if not s.used]),
            config.video_token_id: iter(
                [h * w // unit for t, h, w in (s.grid for s in clips) for _ in range(t)]
            ),
        }
        ids = self.tokenizer.encode(self._with_frames(prompt.text, clips, name), prompt.mark)
        found, wanted = ids.count(config.image_token_id), len(seen) - len(clips)
        if found != wanted:
            raise InputError(placeholder_mismatch(f"{name}: ", found, wanted))
        row: list[int] = []
        for token in ids:
            row += [token] * int(next(counts[token])) if token in counts else [token]
        if not row:
            raise InputError(f"{name}: the prompt is empty")
        return row

    def _with_frames(self, text: str, clips: list[_Seen], name: str) -> str:
        """Each clip's placeholder spelled out: time and placeholder of one frame after the other.

        They take the place of the template's vision_start .. vision_end around the clip, as in
        transformers 4.57 and in training; with wrap_clips that pair stays, as from 5.10 on.
        """
        start, pad, end = (
            self.tokenizer.token_of(i)
            for i in (
                self.config.vision_start_token_id,
                self.config.video_token_id,
                self.config.vision_end_token_id,
            )
        )
        if (places := text.count(pad)) != len(clips):
            raise InputError(placeholder_mismatch(f"{name}: ", places, len(clips), "video", "clip"))
        feed = iter(clips)

        def spelled(_: re.Match[str]) -> str:
            used = cast(UsedFrames, next(feed).used)
            return "".join(f"<{t:.1f} seconds>{start}{pad}{end}" for t in used.timestamps)

        pattern = re.escape(pad)
        if not self.wrap_clips:
            pattern = f"{re.escape(start)}{pattern}{re.escape(end)}|{pattern}"
        return re.sub(pattern, spelled, text)

    def _pad(self, rows: list[list[int]], side: str) -> Arrays:
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_id if self.tokenizer.pad_id is not None else 0
        ids = np.full((len(rows), longest), pad, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            ids[i, at] = row
            mask[i, at] = 1
        places = (self.config.image_token_id, self.config.video_token_id)
        kinds = sum(n * ((ids == i) & (mask == 1)) for n, i in enumerate(places, 1))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": np.asarray(kinds, np.int64),
        }


def _with_options(
    media: list[list[Medium]], videos_kwargs: Mapping[str, Any]
) -> list[list[Medium]]:
    """The clips with the options of the call under their own; video_metadata is one a clip."""
    options = dict(videos_kwargs)
    metadata = options.pop("video_metadata", None)
    clips = sum(medium.kind == "video" for row in media for medium in row)
    given = list(metadata) if isinstance(metadata, (list, tuple)) else [metadata] * min(clips, 1)
    if metadata is not None and len(given) != clips:
        raise InputError(f"video_metadata: {len(given)} for {clips} clip(s), expected one each")
    feed = iter(given if metadata is not None else [None] * clips)

    def extended(medium: Medium) -> Medium:
        if medium.kind != "video":
            return medium
        both = {"video_metadata": next(feed), **options, **medium.overrides}
        return dataclasses.replace(medium, overrides=both)

    return [[extended(medium) for medium in row] for row in media]


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
            f"{directory}: config.json's {name}_token_id {token_id} is no added token of the tokenizer"
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
