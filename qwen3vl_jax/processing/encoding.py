"""Rows of token ids from rendered prompts and the pictures and clips in them, and their arrays."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_patches import ImageSettings, preprocess
from qwen3vl_jax.processing.media import opened_image
from qwen3vl_jax.processing.media_rules import short
from qwen3vl_jax.processing.messages import Medium, placeholder_mismatch
from qwen3vl_jax.processing.qwen_items import image_limits
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.processing.video_patches import UsedFrames, VideoSettings, preprocess_video

Arrays = dict[str, Any]
IGNORED = -100  # label of a token that is not scored


@dataclasses.dataclass
class Prompt:
    """One row before it is encoded: its text with marks, and its pictures and clips in order."""

    text: str
    mark: str
    media: list[Medium]


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture or clip as the model sees it; `used` says which frames of a clip."""

    rows: np.ndarray
    grid: tuple[int, int, int]
    used: UsedFrames | None = None


def see_all(
    media: Sequence[Sequence[Medium]],
    image_settings: ImageSettings,
    video_settings: VideoSettings,
    limits: Mapping[str, Any],
) -> list[list[Seen]]:
    """The patches of all media of a call. limits: as `open_source` takes them.

    Raises InputError where all of them are more bytes than the rules allow.
    """
    most, held, seen = limits["rules"].max_batch_bytes, 0, []
    count, several = Counter(), sum(map(len, media)) > 1
    for row in media:
        seen.append([])
        for medium in row:
            kind, source = medium.kind, medium.source
            count[kind] += 1
            try:
                found = see(medium, image_settings, video_settings, limits)
            except InputError as e:
                name = f"{kind} {count[kind]}"
                name = short(str(source)) if isinstance(source, (str, os.PathLike)) else name
                if not several or str(e).startswith(name):
                    raise
                raise InputError(f"{name}: {str(e).removeprefix(f'{kind}: ')}") from e
            seen[-1].append(found)
            held += found.rows.nbytes
            if held > most:
                raise InputError(
                    f"images and videos: more than {most >> 20} MiB of patches in one call; give fewer, "
                    "lower max_pixels, or raise Processor.media_rules.max_batch_bytes"
                )
    return seen


def see(
    medium: Medium,
    image_settings: ImageSettings,
    video_settings: VideoSettings,
    limits: Mapping[str, Any],
) -> Seen:
    """The patches of an image or video. Raises InputError."""
    if isinstance(medium.source, Seen):
        return medium.source
    try:
        if medium.kind == "video":
            return Seen(
                *preprocess_video(medium.source, video_settings, limits, **medium.overrides)
            )
        with opened_image(medium.source, **limits) as image:
            own = image_limits(medium.overrides, image_settings.factor)
            return Seen(*preprocess(image, image_settings, **own))
    except MemoryError as e:
        raise InputError(f"{medium.kind}: not enough memory for it; lower max_pixels") from e


def row_ids(
    tokenizer: Tokenizer, config: Config, prompt: Prompt, seen: list[Seen], wrap: bool, name: str
) -> list[int]:
    """Ids of a prompt with each placeholder repeated once a token of its picture or frame.

    wrap is Processor's wrap_clips. Raises InputError where placeholders and media do not match.
    """
    unit = config.vision.merge_unit
    pictures = [one.grid for one in seen if one.used is None]
    clips = [one for one in seen if one.used]
    frames = [h * w for t, h, w in (one.grid for one in clips) for _ in range(t)]
    counts = {
        config.image_token_id: iter([t * h * w // unit for t, h, w in pictures]),
        config.video_token_id: iter([patches // unit for patches in frames]),
    }
    text = _with_frames(tokenizer, config, prompt.text, clips, wrap, name)
    ids = tokenizer.encode(text, prompt.mark)
    if (found := ids.count(config.image_token_id)) != len(pictures):
        raise InputError(placeholder_mismatch(f"{name}: ", found, len(pictures)))
    row: list[int] = []
    for token in ids:
        row += [token] * next(counts[token]) if token in counts else [token]
    if not row:
        raise InputError(f"{name}: the prompt is empty")
    return row


def _with_frames(
    tokenizer: Tokenizer, config: Config, text: str, clips: list[Seen], wrap: bool, name: str
) -> str:
    """Each clip's placeholder spelled out: time and placeholder of one frame after the other.

    They take the place of the template's vision_start .. vision_end around the clip, as in
    transformers 4.57 and in training; with `wrap` that pair stays, as from 5.10 on.
    """
    ids = (config.vision_start_token_id, config.video_token_id, config.vision_end_token_id)
    start, pad, end = map(tokenizer.token_of, ids)
    if (places := text.count(pad)) != len(clips):
        raise InputError(placeholder_mismatch(f"{name}: ", places, len(clips), "video", "clip"))
    feed = iter(clips)

    def spelled(_: re.Match[str]) -> str:
        used = cast(UsedFrames, next(feed).used)
        return "".join(f"<{t:.1f} seconds>{start}{pad}{end}" for t in used.timestamps)

    pattern = re.escape(pad)
    if not wrap:
        pattern = f"{re.escape(start)}{pattern}{re.escape(end)}|{pattern}"
    return re.sub(pattern, spelled, text)


def text_arrays(
    tokenizer: Tokenizer, config: Config, rows: list[list[int]], side: str, continuations: Any
) -> Arrays:
    """input_ids, attention_mask and mm_token_type_ids [B, T] int64, padded on one side.

    With continuations also labels, -100 but on them. Raises InputError unless they are one a row.
    """
    more = [[] for _ in rows] if continuations is None else _encoded(tokenizer, rows, continuations)
    longer = [row + ids for row, ids in zip(rows, more, strict=True)]
    ids = _padded(longer, side, tokenizer.pad_id if tokenizer.pad_id is not None else 0)
    mask = _padded([[1] * len(row) for row in longer], side, 0)
    kinds = np.zeros_like(ids)
    for kind, token in enumerate((config.image_token_id, config.video_token_id), 1):
        kinds[(ids == token) & (mask == 1)] = kind
    out = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    if continuations is not None:
        labels = [[IGNORED] * len(row) + ids for row, ids in zip(rows, more, strict=True)]
        out["labels"] = _padded(labels, side, IGNORED)
    return out


def _encoded(
    tokenizer: Tokenizer, rows: list[list[int]], continuations: str | Sequence[str]
) -> list[list[int]]:
    texts = [continuations] if isinstance(continuations, str) else list(continuations)
    if len(texts) != len(rows) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(
            f"continuations: {len(texts)} for {len(rows)} row(s), expected one text each"
        )
    return [tokenizer.encode(text, "") for text in texts]


def _padded(rows: list[list[int]], side: str, fill: int) -> np.ndarray:
    longest = max(map(len, rows))
    out = np.full((len(rows), longest), fill, np.int64)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        out[i, at] = row
    return out


def media_arrays(seen: list[Seen]) -> Arrays:
    """pixel_values with image_grid_thw, and pixel_values_videos with video_grid_thw and metadata."""
    out: Arrays = {}
    for suffix, kind, found in (
        ("", "image", [one for one in seen if one.used is None]),
        ("_videos", "video", [one for one in seen if one.used]),
    ):
        if found:
            pixels = [one.rows for one in found]
            out["pixel_values" + suffix] = pixels[0] if len(found) == 1 else np.concatenate(pixels)
            out[kind + "_grid_thw"] = np.asarray([one.grid for one in found], np.int64)
    if used := [one.used for one in seen if one.used]:
        out["video_metadata"] = used
    return out
