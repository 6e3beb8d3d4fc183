"""Rendered prompts, the images and videos in them and passed beside them -> encoded prompts."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError, unexpected
from qwen3vl_jax.processing import encoded_prompt
from qwen3vl_jax.processing.encoded_prompt import EncodedImage, EncodedPrompt, EncodedVideo
from qwen3vl_jax.processing.fetching import MediaRules, short
from qwen3vl_jax.processing.image_patches import image_to_patches
from qwen3vl_jax.processing.media import loaded_image
from qwen3vl_jax.processing.messages import MediaSource, read_item
from qwen3vl_jax.processing.qwen_items import with_image_limits
from qwen3vl_jax.processing.settings import ImageSettings, VideoSettings
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.processing.video_patches import is_pair, video_to_patches

_RIVALS = {"fps": ("nframes", "num_frames"), "num_frames": ("nframes", "fps")}
_SIZES = ("min_pixels", "max_pixels", "size", "resized_height", "resized_width")
Rows = list[list[MediaSource]]
Media = Sequence[EncodedImage]


def read_beside(given: Any, waiting: MediaSource) -> MediaSource:
    """An image or video passed beside the text: its source, or an object with settings of its own."""
    kind = waiting.kind
    if not isinstance(given, Mapping):
        own = {k: v for k, v in waiting.settings.items() if k != "item" or v.given}
        return MediaSource(kind, given, own)
    found: list[MediaSource] = []
    read_item({"type": kind, **given}, found, f"{kind}s")
    if [(m.kind, m.source is None) for m in found] != [(kind, False)]:
        raise InputError(f"{kind}s: got an object without its source, expected one of them")
    return MediaSource(kind, found[0].source, {**waiting.settings, **found[0].settings})


def complete(rows: Rows, images: Any, videos: Any, videos_kwargs: Mapping[str, Any]) -> Rows:
    """The images and videos of each row, those without a source from the arguments, with all options.

    images: one, a list taken in order, or a list a row. videos: one (a list of frames, or a video and its
    metadata, is one), or a list taken in order. videos_kwargs: options under each video's own, but
    video_metadata one a video. Raises InputError if they do not come out even.
    """
    if not isinstance(videos_kwargs, Mapping):
        raise unexpected("videos_kwargs", type(videos_kwargs).__name__, "an object")
    videos = [videos] if is_pair(videos) else _as_list(videos)
    if videos and all(isinstance(v, Image.Image) or getattr(v, "ndim", 0) == 3 for v in videos):
        videos = [videos]
    waiting = [x.kind for row in rows for x in row if x.source is None]
    images = _images(rows, images)
    for kind, media in {"video": videos, "image": images}.items():
        check_placeholders(waiting.count(kind), len(media), kind)
    given = {"image": iter(images), "video": iter(videos)}
    options = dict(videos_kwargs)
    metadata = options.pop("video_metadata", None)
    count = sum(x.kind == "video" for row in rows for x in row)
    is_list = isinstance(metadata, (list, tuple))
    described = metadata if is_list else [metadata] * (count if metadata is None else min(count, 1))
    if len(described) != count:
        found = f"{len(described)} for {count} video(s)"
        raise InputError(f"video_metadata: {found}, expected one each")
    remaining = iter(described)

    def completed(x: MediaSource) -> MediaSource:
        x = read_beside(next(given[x.kind]), x) if x.source is None else x
        if x.kind == "image":
            return x
        own = {"video_metadata": next(remaining), **x.settings}
        return dataclasses.replace(x, settings=_with_options(own, options))

    return [[completed(x) for x in row] for row in rows]


def _with_options(own: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A video's own settings over the options of a call that are no rivals of them."""
    rule = own.get("item")
    names = {*own, *(rule.given if rule else ())} - {"video_metadata"}
    under = {k: v for k, v in options.items() if not names & {k, *_RIVALS.get(k, ())}}
    if rule and not names.isdisjoint((*_SIZES, "total_pixels")):
        under = {k: v for k, v in under.items() if k not in _SIZES}
    elif rule and not under.keys().isdisjoint(_SIZES):
        own["item"] = dataclasses.replace(rule, resizes=False)
    return {**under, **own}


def _images(rows: Rows, images: Any) -> list[Any]:
    given = _as_list(images)
    if not any(isinstance(image, (list, tuple)) for image in given):
        return given
    if len(given) != len(rows):
        raise InputError(f"images: found {len(given)} lists for {len(rows)} rows of text")
    lists = [_as_list(row) for row in given]
    for number, (row, found) in enumerate(zip(rows, lists), 1):
        waiting = sum(x.source is None and x.kind == "image" for x in row)
        check_placeholders(waiting, len(found), "image", f"row {number}: ")
    return [image for row in lists for image in row]


def check_placeholders(placeholders: int, found: int, kind: str, where: str = "") -> None:
    """Raises InputError for a prompt that has more or fewer placeholders than images or videos."""
    if placeholders != found:
        given = f"{placeholders} {kind} placeholder(s) in the prompt for {found} {kind}(s)"
        item = f"each {kind} needs a content item of its own ({{type: {kind}}})"
        source = f"and each such item a path, or one of {kind}s= (--{kind})"
        raise InputError(f"{where}{given}; {item}, {source}")


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


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
                return EncodedVideo(*found[:2], frames=found[2])
            with loaded_image(given, self.rules) as image:
                base = with_image_limits(self.image_settings, settings)
                return EncodedImage(*image_to_patches(image, base, **settings))
        except MemoryError as e:
            raise InputError(f"{source.kind}: not enough memory for it; lower max_pixels") from e

    def encode_all(self, rows: Sequence[Sequence[MediaSource]]) -> list[list[EncodedImage]]:
        """The images and videos of each row. Raises InputError for more bytes than the rules allow."""
        most, held, encoded = self.rules.max_batch_bytes, 0, []
        count, several = Counter(), sum(map(len, rows)) > 1
        for row in rows:
            encoded.append([])
            for source in row:
                count[source.kind] += 1
                try:
                    encoded[-1].append(self(source))
                except InputError as e:
                    given, name = source.source, f"{source.kind} {count[source.kind]}"
                    name = short(str(given)) if isinstance(given, (str, os.PathLike)) else name
                    if not several or str(e).startswith(name):
                        raise
                    raise InputError(f"{name}: {str(e).removeprefix(f'{source.kind}: ')}") from e
                held += encoded[-1][-1].patches.nbytes
                if held > most:
                    found = f"images and videos: more than {most >> 20} MiB of patches in one call"
                    advice = "lower max_pixels, or raise Processor.media_rules.max_batch_bytes"
                    raise InputError(f"{found}; give fewer, {advice}")
        return encoded


def encode_prompt(
    tokenizer: Tokenizer, c: Config, wrap: bool, prompt: RenderedPrompt, images: Media, name: str
) -> EncodedPrompt:
    """The prompt with a placeholder for each token of an image or frame. Raises InputError.

    The time and placeholder of each frame are in place of a video's one placeholder, and of vision_start ..
    vision_end around it, as in transformers 4.57; wrap (Processor's wrap_clips) leaves that pair.
    """
    stills, unit = [x.grid for x in images if not x.is_video], c.vision.merge_unit
    videos = [x for x in images if isinstance(x, EncodedVideo)]
    frames = [h * w for t, h, w in (x.grid for x in videos) for _ in range(t)]
    counts = {
        c.image_token_id: iter([h * w // unit for _, h, w in stills]),
        c.video_token_id: iter([patches // unit for patches in frames]),
    }
    ids = (c.vision_start_token_id, c.video_token_id, c.vision_end_token_id)
    start, pad, end = map(tokenizer.token_of, ids)
    check_placeholders(prompt.text.count(pad), len(videos), "video", f"{name}: ")
    remaining = iter(videos)

    def frames_text(_: re.Match[str]) -> str:
        used: Any = next(remaining).frames
        return "".join(f"<{t:.1f} seconds>{start}{pad}{end}" for t in used.timestamps)

    pattern = re.escape(pad)
    if not wrap:
        pattern = f"{re.escape(start)}{pattern}{re.escape(end)}|{pattern}"
    ids = tokenizer.encode(re.sub(pattern, frames_text, prompt.text), prompt.mark)
    check_placeholders(ids.count(c.image_token_id), len(stills), "image", f"{name}: ")
    row: list[int] = []
    for token in ids:
        row += [token] * next(counts[token]) if token in counts else [token]
    if not row:
        raise InputError(f"{name}: the prompt is empty")
    return encoded_prompt.place_images(c, np.array(row, np.int32), images)


def add_continuations(
    tokenizer: Tokenizer, prompts: Sequence[EncodedPrompt], continuations: str | Sequence[str]
) -> list[EncodedPrompt]:
    """Prompts with a text each after them, whose tokens have labels. Raises InputError."""
    texts = [continuations] if isinstance(continuations, str) else list(continuations)
    if len(texts) != len(prompts) or not all(isinstance(text, str) and text for text in texts):
        found = f"{len(texts)} for {len(prompts)} row(s)"
        raise InputError(f"continuations: {found}, expected one text each")
    out = []
    for prompt, text in zip(prompts, texts):
        more = np.array(tokenizer.encode(text, ""), np.int32)
        labels = np.append(np.full(len(prompt.ids), IGNORE_INDEX), more)
        out.append(dataclasses.replace(prompt, ids=np.append(prompt.ids, more), labels=labels))
    return out
