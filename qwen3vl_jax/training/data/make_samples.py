"""Makes samples of records: token ids, labels, weights, MRoPE positions, images and videos.

Labels cover what the model would write: the text of an assistant turn and its <|im_end|>, without the
template's newline. Turns are found in the rendered conversation. Texts of users, tools and the system are
encoded without special tokens, so each <|im_start|> is the template's own.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_jax.config import IGNORE_INDEX
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.encoded_prompt import grids_of
from qwen3vl_jax.processing.positions import rope_index
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.training.data.packing import FreeSpace
from qwen3vl_jax.training.data.sample import Sample, check_sample
from qwen3vl_jax.training.recipe import Data, Pack, check_vision_length

START, END = "<|im_start|>", "<|im_end|>"
_HEAD = "assistant\n"
# Tokens that no message may contain if its text can hold special tokens.
_RESERVED = (START, END, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_OWN_VALUES = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_MIDDLE = 0.5


class TooLarge(InputError):
    """A good record that does not fit the rows of a batch."""


class Turn(NamedTuple):
    """The tokens of an assistant turn: [start, end), with its <|im_end|>."""

    start: int
    end: int
    prompted: bool  # it follows the template's generation prompt, as a generated answer does


@dataclasses.dataclass(frozen=True)
class SampleMaker:
    """Makes samples of records. Workers get it by pickle."""

    proc: Processor
    data: Data
    pack: Pack

    def __post_init__(self) -> None:
        """Raises InputError for a pack.vision_length that splits merged patches."""
        check_vision_length(self.pack, self.proc.config)

    @functools.cached_property
    def _processor(self) -> Processor:
        return eight_bit(self.proc)

    @functools.cached_property
    def _opening(self) -> str:
        """What the generation prompt adds after the head of a turn: "<think>\\n", or nothing."""
        asked = [{"role": "user", "content": "?"}]
        closed, opened = (self.proc.render(asked, None, prompt) for prompt in (False, True))
        added = opened[len(closed) :]
        if not opened.startswith(closed) or not added.startswith(START + _HEAD):
            raise InputError(
                f"chat template: its generation prompt is {added!r}, expected {START + _HEAD!r} first"
            )
        return added.removeprefix(START + _HEAD)

    def __call__(self, name: str, record: Any) -> Sample:
        """The checked sample of a chat record, or of a ready Sample. Raises InputError, TooLarge."""
        if isinstance(record, Sample):
            sample = self._checked(record)
            if reason := misfit(self.pack, sample):
                raise TooLarge(reason)
            return sample
        if not isinstance(record, dict) or "messages" not in record:
            found = type(record).__name__
            raise InputError(f"found {found}, expected a record in chat form or a Sample")
        messages, tools = record["messages"], record.get("tools")
        sample = self.encode(name, messages, tools)
        if reason := misfit(self.pack, sample):
            sample = self._cut(sample, messages, tools, reason)
        return self._checked(sample)

    def _checked(self, sample: Sample) -> Sample:
        """`check_sample`, and that patches are uint8 if this processor's are."""
        sample = check_sample(sample, self.proc.config)
        for number, image in enumerate(sample.images, 1):
            if self._processor is not self.proc and image.patches.dtype != np.uint8:
                found = image.patches.dtype
                raise InputError(f"images {number}: patches are {found}, expected uint8")
        return sample

    def encode(self, name: str, messages: Sequence[Any], tools: Any) -> Sample:
        """The whole conversation as a sample of any length, without checks."""
        data, proc = self.data, self._processor
        _check_messages(messages, proc is not self.proc, data.allow_special)
        if data.allow_special and (token := _reserved(tools)):
            raise InputError(f"tools: they say {token}, which is the template's")
        options = processor_options(data)
        (prompt,) = proc.encode(
            without_train_flag(messages), tools=tools, add_generation_prompt=False, **options
        )
        ids = prompt.ids
        turns = assistant_turns(proc.tokenizer, ids, self._opening)
        labels, weights = _targets(ids, turns, messages, data.weighting)
        positions, _ = rope_index(proc.config, ids[None], **grids_of(prompt.images))
        return Sample(name, ids, labels, weights, positions[:, 0], prompt.images)

    def _cut(self, whole: Sample, messages: Sequence[Any], tools: Any, reason: str) -> Sample:
        """The longest prefix of the messages that fits, ends after an answer, and has a label."""
        if self.data.too_long != "cut":
            raise TooLarge(reason)
        ends = [turn.end for turn in assistant_turns(self.proc.tokenizer, whole.ids, "")]
        at = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for end, last in reversed(list(zip(ends, at, strict=True))):
            if last == len(messages) - 1 or end > self.pack.length:
                # A prefix rendered alone is never shorter than in the whole conversation.
                continue
            kept = self.encode(whole.name, messages[: last + 1], tools)
            if (kept.labels != IGNORE_INDEX).any() and not misfit(self.pack, kept):
                note = f"cut to {last + 1} of {len(messages)} messages: {reason}"
                return dataclasses.replace(kept, note=note)
        raise TooLarge(f"{reason}; no beginning that ends after an answer fits")


def without_train_flag(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages without the keys train and weight, which templates do not know."""
    return [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in messages]


def processor_options(data: Data) -> dict[str, Any]:
    """The recipe's options for a processor: image and video sizes, special tokens in prompts."""
    video = {"fps": data.fps, "max_frames": data.max_frames, "max_pixels": data.clip_max_pixels}
    return {
        "template_vars": {"add_vision_id": True} if data.add_vision_id else None,
        "videos_kwargs": {k: v for k, v in video.items() if v},
        "min_pixels": data.min_pixels or None,
        "max_pixels": data.max_pixels or None,
        "allow_special": data.allow_special or "assistant",
    }


def misfit(pack: Pack, sample: Sample) -> str:
    """Why a sample does not fit an empty batch, or "". pack: the rows of one group."""
    if len(sample.ids) > pack.length:
        return f"{len(sample.ids)} tokens, pack.length is {pack.length}"
    grids = [image.grid for image in sample.images]
    largest = max((h * w for _, h, w in grids), default=0)
    text = f"an image or frame of {largest} patches"
    if grids and not pack.vision_rows:
        return f"{text}, pack.vision_rows is 0; set it to 1 or more"
    if largest > pack.vision_length:
        room = f"pack.vision_length is {pack.vision_length}"
        return f"{text}, {room}; data.max_pixels makes it smaller"
    empty = FreeSpace(pack)
    if any(empty.fit_frames(grid) is None for grid in grids):
        room = f"each of {pack.groups} groups of a batch has" if pack.groups > 1 else "a batch has"
        total, rows = sum(map(math.prod, grids)), f"{pack.vision_rows} rows of {pack.vision_length}"
        return f"{total} patches in its images and videos, {room} {rows}"
    return ""


def assistant_turns(tokenizer: Tokenizer, ids: np.ndarray, opening: str) -> list[Turn]:
    """The assistant turns in rendered ids [T]. opening: what the generation prompt adds to the head.

    A token that starts in the head belongs to it. Raises InputError for a turn without an end.
    """
    starts, ends = (np.flatnonzero(ids == tokenizer.id_of(token)) for token in (START, END))
    head, full, turns = _HEAD.encode(), (_HEAD + opening).encode(), []
    for start in (starts + 1).tolist():
        after = int(np.searchsorted(ends, start))
        end = int(ends[after]) if after < len(ends) else len(ids)
        # A token is a byte or more.
        shown = ids[start : min(end, start + len(full))].tolist()
        texts = [tokenizer.token_bytes(token, skip_special_tokens=False) for token in shown]
        if not (said := b"".join(texts)).startswith(head):
            continue
        if end == len(ids):
            raise InputError(f"the template leaves an assistant's turn without {END}")
        prompted = said.startswith(full)
        first_bytes = itertools.accumulate(map(len, texts[:-1]), initial=0)
        opened = sum(at < len(full if prompted else head) for at in first_bytes)
        turns.append(Turn(start + opened, end + 1, prompted))
    return turns


def _targets(
    ids: np.ndarray, turns: Sequence[Turn], messages: Sequence[Any], weighting: str
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights [T] of the assistant turns to learn.

    The model never writes a turn that does not follow the generation prompt, such as an earlier turn whose
    reasoning the template drops. Such turns are learned only with "train": true. "train": false switches
    any turn off; "weight" is a factor of its tokens.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(answers) != len(turns):
        raise InputError(
            f"the template writes {len(turns)} assistant turn(s) for {len(answers)} message(s)"
        )
    labels = np.full_like(ids, IGNORE_INDEX)
    weights = np.zeros(len(ids), np.float32)
    for turn, message in zip(turns, answers):
        switch = message.get("train")
        if (turn.prompted if switch is None else switch) and turn.end > turn.start:
            place = slice(turn.start, turn.end)
            labels[place] = ids[place]
            each = (turn.end - turn.start) ** -0.5 if weighting == "sqrt" else 1.0
            weights[place] = each * message.get("weight", 1)
    return labels, weights


def _check_messages(messages: Sequence[dict[str, Any]], own_values: bool, all_roles: bool) -> None:
    """Raises InputError for messages that a processor takes and training does not."""
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if (role == "assistant" or all_roles) and (token := _reserved(message)):
            raise InputError(f"message {number}: the {role} says {token}, which is the template's")
        for item in content if isinstance(content, list) and own_values else ():
            found = [key for key in _OWN_VALUES if isinstance(item, dict) and key in item]
            if found:
                raise InputError(
                    f"message {number}: {found[0]} of a single image, which training has no use for"
                )


def _reserved(given: Any) -> str:
    """The first of `_RESERVED` in a message or tools, also across its text items, or ""."""
    content = given.get("content") if isinstance(given, dict) else None
    items = content if isinstance(content, (list, tuple)) else ()
    texts = (item.get("text", "") if isinstance(item, dict) else item for item in items)
    joined = "".join(text for text in texts if isinstance(text, str))
    said = (json.dumps(given, default=lambda _: "") + joined).lower()
    return next((token for token in _RESERVED if token in said), "")


def eight_bit(proc: Processor) -> Processor:
    """A processor of uint8 patches (the step normalises them) if proc normalises as released; else proc."""
    settings = (proc.image_settings, proc.video_settings)
    for s in settings:
        usual = s.do_rescale and s.do_normalize and abs(s.rescale_factor - 1 / 255) < 1e-9
        if not usual or not np.all(np.equal((s.image_mean, s.image_std), _MIDDLE)):
            return proc
    raw = {"do_rescale": False, "do_normalize": False, "eight_bit": True}
    image, video = (dataclasses.replace(s, **raw) for s in settings)
    return dataclasses.replace(proc, image_settings=image, video_settings=video)
