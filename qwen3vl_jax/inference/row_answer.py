"""The answer of one row on the host: its tokens as they come, and why it ends."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen3vl_jax.errors import not_finite, shown, unexpected
from qwen3vl_jax.processing.tokenizer import find_stop

Decode = Callable[[list[int]], str]  # tokens -> text
# In place of a token: the row had ended; its logits were not finite (NOT_FINITE), or were so only after
# penalties, constraint and logits_fn; the row's constraint refuses it.
ENDED, NOT_FINITE_AFTER, REFUSED = -1, -3, -4
# Tokens: the longest block that a loop repeats, and the fewest of a loop.
LONGEST_BLOCK, LOOP = 64, 256


class RowAnswer:
    """The answer of one row as its tokens come; `finish_reason` is "" until it ends."""

    def __init__(
        self, max_new_tokens: int, stop_strings: Sequence[str] = (), max_repeats: int = 0
    ) -> None:
        self.max_new_tokens, self.stop_strings = max_new_tokens, stop_strings
        self.max_repeats = max_repeats
        # For each length of block: how many of the last tokens equal the one a block before.
        self.equal = np.zeros(LONGEST_BLOCK, np.int32)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason = self.error = ""

    def add(self, new: np.ndarray, stop_ids: Sequence[int], decode: Decode | None = None) -> int:
        """Takes tokens [n] of `decode_steps`; gives how many belong to the answer."""
        before, strings = len(self.tokens), self.stop_strings
        span = 4 * max(map(len, strings), default=0) + 4  # a character is at most four tokens
        for token in new[new >= 0].tolist():
            self.tokens.append(token)
            text = decode(self.tokens[-span:]) if decode and strings else ""
            if token in stop_ids or find_stop(text, strings)[1] is not None:
                self.finish_reason = "stop"
                return len(self.tokens) - before
            if self.max_repeats and self._is_loop():
                self.finish_reason = "repetition"
                return len(self.tokens) - before
        self.error = fault_of(new, before)
        if self.error or len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "error" if self.error else "length"
        return len(self.tokens) - before

    def _is_loop(self) -> bool:
        """Whether the tokens end with a block so many times, in at least LOOP tokens."""
        last = np.full(LONGEST_BLOCK, -1)
        tail = self.tokens[-2 : -2 - LONGEST_BLOCK : -1]
        last[: len(tail)] = tail
        self.equal = np.where(last == self.tokens[-1], self.equal + 1, 0)
        sizes = np.arange(1, LONGEST_BLOCK + 1)
        return bool(np.any(self.equal + sizes >= np.maximum(self.max_repeats * sizes, LOOP)))


def fault_of(tokens: np.ndarray, count: int) -> str:
    """What is wrong with a row's new tokens [n], "" if nothing is; count: tokens answered before."""
    wrong = np.flatnonzero(tokens < ENDED)
    if not len(wrong):
        return ""
    place = f"logits of answer token {count + int(wrong[0]) + 1}"
    kind = tokens[wrong[0]]
    if kind == REFUSED:
        refused = (
            "got one that llguidance allowed and refuses, expected another; change the grammar"
        )
        return f"answer token {count + int(wrong[0]) + 1}: {refused}"
    after = "got no finite number after penalties, constraint and logits_fn, expected one"
    return f"{place}: {after}; use milder ones" if kind == NOT_FINITE_AFTER else not_finite(place)


def check_repeats(count: Any) -> int:
    """max_repeats: 0, or how many equal blocks of tokens end an answer, from 2. Raises InputError."""
    if type(count) is not int or count < 0 or count == 1:
        raise unexpected("max_repeats", shown(count), "0 (off) or a whole number from 2")
    return count
