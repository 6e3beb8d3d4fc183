"""Rendered prompts and the images and videos in them -> encoded prompts."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.encoded_prompt import (
    EncodedImage,
    EncodedPrompt,
    EncodedVideo,
    UsedFrames,
    place_images,
)
from qwen3vl_jax.processing.fetching import MediaRules, short
from qwen3vl_jax.processing.image_patches import image_to_patches
from qwen3vl_jax.processing.media import loaded_image
from qwen3vl_jax.processing.media_arguments import placeholder_mismatch
from qwen3vl_jax.processing.messages import MediaSource
from qwen3vl_jax.processing.qwen_items import image_limits
from qwen3vl_jax.processing.settings import ImageSettings, VideoSettings
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.processing.video_patches import video_to_patches


@dataclasses.dataclass(frozen=True)
class RenderedPrompt:
    """One prompt before it is encoded: text with the marks of `Escape`, and its images and videos."""

    text: str
    mark: str
    sources: list[MediaSource]


@dataclasses.dataclass(frozen=True)
class MediaEncoder:
    """Reads images and videos and makes patches of them."""

    image_settings: ImageSettings
    video_settings: VideoSettings
    rules: MediaRules

    def __call__(self, source: MediaSource) -> EncodedImage:
        """The patches of an image or video. Raises InputError."""
        given, settings = source.source, source.settings
        if isinstance(given, EncodedImage):
            return given
        try:
            if source.kind == "video":
                found = video_to_patches(given, self.video_settings, self.rules, **settings)
                patches, grid, frames = found
                return EncodedVideo(patches, grid, frames=frames)
            with loaded_image(given, self.rules) as image:
                own = image_limits(settings, self.image_settings.factor)
                return EncodedImage(*image_to_patches(image, self.image_settings, **own))
        except MemoryError as e:
            raise InputError(f"{source.kind}: not enough memory for it; lower max_pixels") from e

    def encode_all(self, rows: Sequence[Sequence[MediaSource]]) -> list[list[EncodedImage]]:
        """The images and videos of each row.

        Raises InputError where all of them are more bytes than the rules allow.
        """
        most, held, encoded = self.rules.max_batch_bytes, 0, []
        count, several = Counter(), sum(map(len, rows)) > 1
        for row in rows:
            encoded.append([])
            for source in row:
                count[source.kind] += 1
                try:
                    found = self(source)
                except InputError as e:
                    given, name = source.source, f"{source.kind} {count[source.kind]}"
                    name = short(str(given)) if isinstance(given, (str, os.PathLike)) else name
                    if not several or str(e).startswith(name):
                        raise
                    raise InputError(f"{name}: {str(e).removeprefix(f'{source.kind}: ')}") from e
                encoded[-1].append(found)
                held += found.patches.nbytes
                if held > most:
                    raise InputError(
                        f"images and videos: more than {most >> 20} MiB of patches in one call; give "
                        "fewer, lower max_pixels, or raise Processor.media_rules.max_batch_bytes"
                    )
        return encoded


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """Makes token ids of rendered prompts. wrap is Processor's wrap_clips."""

    tokenizer: Tokenizer
    config: Config
    wrap: bool

    def __call__(
        self, prompt: RenderedPrompt, images: Sequence[EncodedImage], name: str
    ) -> EncodedPrompt:
        """A prompt's ids, each placeholder repeated once a token of its image or frame.

        Raises InputError where placeholders and images do not match.
        """
        config, unit = self.config, self.config.vision.merge_unit
        stills = [x.grid for x in images if not x.is_video]
        videos = [cast(EncodedVideo, x) for x in images if x.is_video]
        frames = [h * w for t, h, w in (x.grid for x in videos) for _ in range(t)]
        counts = {
            config.image_token_id: iter([h * w // unit for _, h, w in stills]),
            config.video_token_id: iter([patches // unit for patches in frames]),
        }
        text = self._with_frames(prompt.text, videos, name)
        ids = self.tokenizer.encode(text, prompt.mark)
        if (found := ids.count(config.image_token_id)) != len(stills):
            raise InputError(placeholder_mismatch(f"{name}: ", found, len(stills)))
        row: list[int] = []
        for token in ids:
            row += [token] * next(counts[token]) if token in counts else [token]
        if not row:
            raise InputError(f"{name}: the prompt is empty")
        return place_images(config, np.array(row, np.int32), images)

    def _with_frames(self, text: str, videos: Sequence[EncodedVideo], name: str) -> str:
        """The text with the time and placeholder of each frame in place of a video's one placeholder.

        They replace the template's vision_start .. vision_end around the video, as in transformers
        4.57 and in training; with `wrap` that pair stays, as from 5.10 on.
        """
        c = self.config
        ids = (c.vision_start_token_id, c.video_token_id, c.vision_end_token_id)
        start, pad, end = map(self.tokenizer.token_of, ids)
        if (places := text.count(pad)) != len(videos):
            raise InputError(placeholder_mismatch(f"{name}: ", places, len(videos), "video"))
        remaining = iter(videos)

        def frames_text(_: re.Match[str]) -> str:
            frames = cast(UsedFrames, next(remaining).frames)
            return "".join(f"<{t:.1f} seconds>{start}{pad}{end}" for t in frames.timestamps)

        pattern = re.escape(pad)
        if not self.wrap:
            pattern = f"{re.escape(start)}{pattern}{re.escape(end)}|{pattern}"
        return re.sub(pattern, frames_text, text)

    def add_continuations(
        self, prompts: Sequence[EncodedPrompt], continuations: str | Sequence[str]
    ) -> list[EncodedPrompt]:
        """Prompts with a text each after them, whose tokens have labels. Raises InputError."""
        texts = [continuations] if isinstance(continuations, str) else list(continuations)
        if len(texts) != len(prompts) or not all(isinstance(text, str) and text for text in texts):
            raise InputError(
                f"continuations: {len(texts)} for {len(prompts)} row(s), expected one text each"
            )
        out = []
        for prompt, text in zip(prompts, texts):
            more = np.array(self.tokenizer.encode(text, ""), np.int32)
            labels = np.append(np.full(len(prompt.ids), IGNORE_INDEX), more)
            ids = np.append(prompt.ids, more)
            out.append(dataclasses.replace(prompt, ids=ids, labels=labels))
        return out
