"""A conversation whose cache is kept between turns, so that only new tokens are run."""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.generate import stream
from qwen3vl_jax.model.structs import Batch, KVCache, Params
from qwen3vl_jax.processing import encoded_prompt
from qwen3vl_jax.processing.batch import make_batch
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt
from qwen3vl_jax.processing.positions import rope_index
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import TextStream


@dataclasses.dataclass(frozen=True)
class ChatState:
    """A cache of one row and the prompt in it, without its patches."""

    prompt: EncodedPrompt
    cache: KVCache
    ended: bool = True  # not cut off by a limit of tokens
    answers: tuple[tuple[int, int], ...] = ()  # where tokens that the model wrote begin and end

    @property
    def ids(self) -> np.ndarray:
        """The tokens [n] in the cache."""
        return self.prompt.ids


def take_turn(
    params: Params,
    proc: Processor,
    messages: Sequence[Mapping[str, Any]],
    state: ChatState | None = None,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Generator[str, bool | None, tuple[str, ChatState]]:
    """Answers a conversation: yields text as it comes, returns (answer, next state). `send(True)` stops it.

    messages hold all turns so far. Tokens and images that the rendered conversation shares with `state`
    from the start are not run again. The cache of `state` is donated.
    stop: the answer is cut before the first of these texts. inputs are options of Processor.encode,
    options those of `stream`. Raises InputError.
    """
    (prompt,) = proc.encode(messages, **(inputs or {}))
    prompt, answers = as_written(proc, prompt.with_digests(), state)
    ids = prompt.ids
    limit = options.get("max_len")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))
    if room < 1:
        raise InputError(f"the conversation has {len(ids)} tokens and may have {limit} (max_len)")
    batch, cache = continue_from(proc.config, prompt, state)
    before = None if cache is None else ids[None, : int(cache.length[0])]
    text, pieces, answer = TextStream(proc.tokenizer, stop), [], []
    options |= {"cache": cache, "before": before, "stop_ids": proc.stop_ids}
    chunks = stream(params, proc.config, batch, max_new_tokens=room, **options)
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
    seen = dataclasses.replace(prompt.without_patches(), ids=written)
    return "".join(pieces), ChatState(seen, cache, ended, answers)


def as_written(
    proc: Processor, prompt: EncodedPrompt, state: ChatState | None
) -> tuple[EncodedPrompt, tuple[tuple[int, int], ...]]:
    """A prompt with earlier answers as the tokens that the model wrote, not as the tokens of their text.

    Returns also where these begin and end, up to the first change of the conversation.
    """
    if state is None:
        return prompt, ()
    ids, done, at, spans = prompt.ids, 0, 0, []
    for start, end in state.answers:
        after = at + start - done
        same = np.array_equal(ids[at:after], state.ids[done:start])
        found = _same_text(proc, ids, after, state.ids[start:end]) if same else None
        if found is None:
            break
        done, at = end, found
        spans.append((start, end))
    if not spans:
        return prompt, ()
    written = np.append(state.ids[:done], ids[at:]).astype(ids.dtype)
    return encoded_prompt.place_images(proc.config, written, prompt.images), tuple(spans)


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
    cfg: Config, prompt: EncodedPrompt, state: ChatState | None
) -> tuple[Batch, KVCache | None]:
    """The part of a prompt that a cache lacks, and the cache cut to what they share."""
    start = encoded_prompt.shared_start(prompt, state.prompt, all_of_b=True) if state else 0
    batch = make_batch(cfg, **encoded_prompt.to_hf_arrays(cfg, [prompt.rest(start)]))
    if not state or not start:
        return batch, None
    shared = prompt.first(start)
    positions, _ = rope_index(cfg, shared.ids[None], **encoded_prompt.grids_of(shared.images))
    kept = np.array([[start], [positions.max() + 1 - start]], np.int32)
    return batch, state.cache.replace(length=kept[0], delta=kept[1])
