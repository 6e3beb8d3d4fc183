"""A conversation whose cache is kept between turns: only what is new is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.generate import stream
from qwen3vl_jax.model.structs import Batch, KVCache, Params
from qwen3vl_jax.processing.batch import make_batch
from qwen3vl_jax.processing.positions import rope_index
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import TextStream

PICTURES = ("pixel_values", "image_grid_thw")
CLIPS = ("pixel_values_videos", "video_grid_thw")


@dataclasses.dataclass(frozen=True)
class Kept:
    """A cache of one row and the tokens [n] in it; ended: not cut off by a limit of tokens.

    answers: where the tokens that the model wrote begin and end.
    """

    ids: np.ndarray
    cache: KVCache
    ended: bool = True
    answers: tuple[tuple[int, int], ...] = ()


def take_turn(
    params: Params,
    proc: Processor,
    messages: Sequence[Mapping[str, Any]],
    kept: Kept | None = None,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Generator[str, bool | None, tuple[str, Kept]]:
    """Answers a conversation: yields text as it comes, returns (answer, what to keep). `send` ends it.

    messages hold all turns so far, earlier ones unchanged since `kept` was made: what the rendered
    conversation shares with it from the start is not run again, pictures included. Give `kept` away.
    stop: texts that end the answer before them. inputs are options of Processor.inputs, options those
    of `stream`. Raises InputError.
    """
    arrays = proc.inputs(messages, **(inputs or {}))
    ids, answers = as_written(proc, arrays["input_ids"][0], kept)
    arrays["input_ids"] = ids[None]
    limit = options.get("max_len")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))
    if room < 1:
        raise InputError(f"the conversation has {len(ids)} tokens and may have {limit} (max_len)")
    batch, cache = continue_from(proc.config, arrays, kept)
    before = None if cache is None else ids[None, : int(cache.length[0])]
    text, pieces, answer = TextStream(proc.tokenizer, stop), [], []
    chunks = stream(
        params, proc.config, batch, cache=cache, before=before, max_new_tokens=room,
        stop_ids=proc.stop_ids, **options,
    )  # fmt: skip
    enough: Any = None
    while True:
        try:
            last = enough or text.stopped is not None
            new = chunks.send(np.array([True]) if last else None)[0].tolist()
        except StopIteration as end:
            cache = end.value
            break
        answer += new
        pieces.append(text.push(t for t in new if t not in proc.stop_ids))
        enough = yield pieces[-1]
    pieces.append(text.flush())
    yield pieces[-1]
    ended = text.stopped is not None or answer[-1] in proc.stop_ids
    written = np.append(ids, answer[:-1]).astype(ids.dtype)
    answers = (*answers, (len(ids), len(written)))
    return "".join(pieces), Kept(written, cache, ended, answers)


def as_written(
    proc: Processor, ids: np.ndarray, kept: Kept | None
) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """A rendered row [T] with earlier answers as the tokens that the model wrote, not those of their text.

    Also where these lie, up to the first place in which the conversation was changed.
    """
    done, at, spans = 0, 0, []
    for start, end in () if kept is None else kept.answers:
        assert kept
        after = at + start - done
        if not np.array_equal(ids[at:after], kept.ids[done:start]):
            break
        found = _same_text(proc, ids, after, kept.ids[start:end])
        if found is None:
            break
        done, at = end, found
        spans.append((start, end))
    if kept is None or not spans:
        return ids, ()
    return np.append(kept.ids[:done], ids[at:]).astype(ids.dtype), tuple(spans)


def _same_text(proc: Processor, ids: np.ndarray, at: int, answer: np.ndarray) -> int | None:
    """Where the text of an answer, which begins at `at`, ends in a row [T]; None if it is another."""
    if np.isin(answer, (proc.config.image_token_id, proc.config.video_token_id)).any():
        return None
    left = b"".join(map(proc.tokenizer.token_bytes, answer.tolist()))
    while left:
        piece = proc.tokenizer.token_bytes(int(ids[at])) if at < len(ids) else b""
        if not piece or not left.startswith(piece):
            return None
        left, at = left[len(piece) :], at + 1
    return at


def continue_from(
    cfg: Config, arrays: Mapping[str, Any], kept: Kept | None
) -> tuple[Batch, KVCache | None]:
    """The part of one row that a kept cache lacks, and that cache cut to what they share."""
    ids = arrays["input_ids"][0]
    media = {name: arrays[name] for name in (*PICTURES, *CLIPS) if name in arrays}
    start = 0 if kept is None else _shared(cfg, arrays, kept.ids)
    if kept is None or start == 0:
        return make_batch(cfg, input_ids=ids[None], **media), None
    grids = (arrays.get("image_grid_thw"), arrays.get("video_grid_thw"))
    positions, _ = rope_index(cfg, ids[None], *grids)
    delta = np.array([positions[:, 0, :start].max() + 1 - start], np.int32)
    cache = kept.cache.replace(length=np.array([start], np.int32), delta=delta)
    for (pixels, grid), token in ((PICTURES, cfg.image_token_id), (CLIPS, cfg.video_token_id)):
        if pixels not in media:
            continue
        patches = cfg.vision.merge_unit * int((ids[:start] == token).sum())
        done = int((np.cumsum(media[grid].prod(1)) <= patches).sum())
        media[pixels], media[grid] = media[pixels][patches:], media[grid][done:]
        if not len(media[grid]):
            del media[pixels], media[grid]
    return make_batch(cfg, input_ids=ids[start:][None], **media), cache


def _shared(cfg: Config, arrays: Mapping[str, Any], old: np.ndarray) -> int:
    """Tokens that both rows begin with, at least one less than there are, no picture or clip cut."""
    ids = arrays["input_ids"][0]
    count = min(len(ids) - 1, len(old))
    differ = np.flatnonzero(ids[:count] != old[:count])
    start = int(differ[0]) if len(differ) else count
    for (_, grid), token in ((PICTURES, cfg.image_token_id), (CLIPS, cfg.video_token_id)):
        if grid in arrays:
            ends = np.cumsum(arrays[grid].prod(1)) // cfg.vision.merge_unit
            before = np.cumsum(ids == token)  # placeholders up to each token, itself included
            while start and before[start - 1] not in (0, *ends):
                start -= 1
    return start
