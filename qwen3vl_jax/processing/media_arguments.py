"""Images and videos passed beside the text: images=, videos= and videos_kwargs= of the processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.messages import MediaSource, read_item
from qwen3vl_jax.processing.video_patches import is_pair

_RIVALS = {"fps": ("nframes", "num_frames"), "num_frames": ("nframes", "fps")}
_SIZES = ("min_pixels", "max_pixels", "size", "resized_height", "resized_width")
Rows = list[list[MediaSource]]


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


def hand_out(rows: Rows, images: Any, videos: Any = None) -> Rows:
    """The images and videos of each row, the ones without a source taken from the arguments.

    images: one, a list taken in order, or a list a row. videos: one video (a list of frames that are
    not text is one, and so are a video and its metadata), or a list of them taken in order. Raises
    InputError if they do not come out even.
    """
    clips = [videos] if is_pair(videos) else _as_list(videos)
    if clips and all(isinstance(v, Image.Image) or getattr(v, "ndim", 0) == 3 for v in clips):
        clips = [clips]
    if len(clips) != (wanted := sum(_waiting(rows, "video"))):
        raise InputError(placeholder_mismatch("", wanted, len(clips), "video"))
    given = {"image": iter(_images(rows, images)), "video": iter(clips)}
    return [
        [read_beside(next(given[x.kind]), x) if x.source is None else x for x in row]
        for row in rows
    ]


def with_video_options(rows: Rows, videos_kwargs: Mapping[str, Any]) -> Rows:
    """The videos with the options of the call under their own; video_metadata is one a video.

    A video's own fps takes the place of the call's num_frames, and its num_frames that of fps.
    Raises InputError.
    """
    if not isinstance(videos_kwargs, Mapping):
        raise InputError(f"videos_kwargs: got {type(videos_kwargs).__name__}, expected an object")
    options = dict(videos_kwargs)
    metadata = options.pop("video_metadata", None)
    count = sum(x.kind == "video" for row in rows for x in row)
    given = list(metadata) if isinstance(metadata, (list, tuple)) else [metadata] * min(count, 1)
    if metadata is not None and len(given) != count:
        raise InputError(f"video_metadata: {len(given)} for {count} video(s), expected one each")
    remaining = iter(given if metadata is not None else [None] * count)

    def extended(source: MediaSource) -> MediaSource:
        if source.kind != "video":
            return source
        own, rule = dict(source.settings), source.settings.get("item")
        names = {*own, *(rule.given if rule else ())}
        under = {k: v for k, v in options.items() if not names & {k, *_RIVALS.get(k, ())}}
        if rule and not names.isdisjoint((*_SIZES, "total_pixels")):
            under = {k: v for k, v in under.items() if k not in _SIZES}
        elif rule and not under.keys().isdisjoint(_SIZES):
            own["item"] = dataclasses.replace(rule, resizes=False)
        settings = {"video_metadata": next(remaining), **under, **own}
        return dataclasses.replace(source, settings=settings)

    return [[extended(source) for source in row] for row in rows]


def _waiting(rows: Rows, kind: str) -> list[int]:
    return [sum(x.source is None and x.kind == kind for x in row) for row in rows]


def _images(rows: Rows, images: Any) -> list[Any]:
    waiting, given = _waiting(rows, "image"), _as_list(images)
    if any(isinstance(image, (list, tuple)) for image in given):
        if len(given) != len(rows):
            raise InputError(f"images: found {len(given)} lists for {len(rows)} rows of text")
        for number, (image, count) in enumerate(zip(given, waiting), 1):
            if len(_as_list(image)) != count:
                where = f"row {number}: "
                raise InputError(placeholder_mismatch(where, count, len(_as_list(image))))
        given = [image for row in given for image in _as_list(row)]
    if len(given) != sum(waiting):
        raise InputError(placeholder_mismatch("", sum(waiting), len(given)))
    return given


def placeholder_mismatch(where: str, placeholders: int, found: int, kind: str = "image") -> str:
    """The error of a prompt that has more or fewer placeholders than images or videos."""
    return (
        f"{where}{placeholders} {kind} placeholder(s) in the prompt for {found} {kind}(s); each {kind} "
        f"needs a content item of its own ({{type: {kind}}}), and each such item a path, "
        f"or one of {kind}s= (--{kind})"
    )


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]
