"""What the engine takes and gives: requests, finished answers, counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.inference.options import GenerationOptions
from qwen3vl_jax.inference.sampling import Sampling, row_seeds
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

    arrays: those of `Processor.inputs`, or what `Processor.encode` gives, for one conversation.
    key: anything, it comes back with the answer. The other fields are those of `generate`, one value
    each.
    """

    key: Any
    arrays: EncodedPrompt | Mapping[str, Any]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        GenerationOptions(self.max_new_tokens, self.sampling)
        self.sampling.rows(1)
        row_seeds(self.seed, 1)


@dataclasses.dataclass(frozen=True)
class Finished:
    """An answer: its tokens, with the stop id that ended it, and their log-probabilities (fp32).

    finish_reason is "stop", "length", or "error" where logits were not finite: `error` then says so, and
    tokens are those before. Log-probabilities are the model's own, before penalties, temperature and
    filters.
    """

    key: Any
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    error: str = ""


@dataclasses.dataclass
class Stats:
    """What was done so far, counted."""

    rows: int = 0
    steps: int = 0  # decode steps, each of all rows
    row_steps: int = 0  # of steps * rows, those that gave a token
    tokens: int = 0  # answer tokens
    prefilled: int = 0  # prompt tokens that were run, those of kept prefixes too
    reused: int = 0  # prompt tokens that a kept prefix spared
    prefixes: int = 0  # kept prefixes made
    encoded: int = 0  # images and videos that the vision tower ran on
    shown: int = 0  # images and videos of the prompts

    @property
    def busy(self) -> float:
        """The share of all rows of all decode steps that gave a token."""
        return self.row_steps / max(self.steps * self.rows, 1)
