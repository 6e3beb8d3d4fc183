"""What is asked for and what comes back: options, requests, finished answers, counters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError, check_int, shown
from qwen3vl_jax.inference.constraints import Constraint, Constraints, start_rows
from qwen3vl_jax.inference.row_answer import check_repeats
from qwen3vl_jax.inference.sampling import Sampling, row_seeds
from qwen3vl_jax.model.structs import Batch
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt

# Decode steps a dispatch: the host looks at the answer in between.
STEPS = 16
# (new tokens, their log-probabilities) -> whether to end the answer there.
Watch = Callable[[Sequence[int], Sequence[float]], bool]
# (logits [B V] after the penalties, DecodeState) -> logits. A pure function; pass the same object each
# time, for a compiled program is found by it.
LogitsFn = Callable[[jax.Array, Any], jax.Array]


class RowOptions(flax.struct.PyTreeNode):
    """Host arrays, one entry a row but for stop_ids: no value of them compiles a new program."""

    sampling: Sampling
    seeds: Any  # [B] uint32
    limit: Any  # [B] int32: answer tokens at which a row ends
    stop_ids: Any  # [S] int32
    logits_fn: LogitsFn | None = flax.struct.field(pytree_node=False, default=None)
    masks: Any = None  # [B ceil(V/32)] uint32: a bit for each token that may come next; None is any


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """The options of `stream`, checked where they are made."""

    max_new_tokens: int
    sampling: Sampling | None = None
    seed: int | Sequence[int] = 0
    stop_ids: int | Sequence[int] | None = None
    max_len: int | None = None
    logits_fn: LogitsFn | None = None
    steps: int = STEPS
    prefill_chunk: int | None = None
    copies: int = 1
    constraint: Constraints = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling | None):
            raise InputError(f"sampling: got {shown(self.sampling)}, expected a Sampling")
        for key in ("max_new_tokens", "copies", "max_len", "prefill_chunk"):
            if (value := getattr(self, key)) is not None or key in ("max_new_tokens", "copies"):
                check_int(key, value)
        check_int("steps", self.steps, STEPS)

    def of_rows(self, cfg: Config, rows: int) -> RowOptions:
        """The same for each of `rows` prompts, copies counted in."""
        rows *= self.copies
        sampling = (self.sampling or Sampling()).rows(rows)
        limit = np.full(rows, self.max_new_tokens, np.int32)
        stop_ids = np.asarray(check_stop_ids(cfg, self.stop_ids), np.int32)
        return RowOptions(sampling, row_seeds(self.seed, rows), limit, stop_ids, self.logits_fn)

    def of_batch(self, cfg: Config, batch: Batch, filled: int = 0) -> RowOptions:
        """`of_rows` of a batch behind `filled` tokens of a cache: it must fit max_len, one prompt a row."""
        segments = np.asarray(batch.segment_ids)
        if segments.max(initial=0) > 1:
            packed = "packed rows (segment_ids over 1) cannot be answered"
            raise InputError(f"generate: {packed}, one prompt a row")
        prompt = filled + int(np.max(np.sum(segments > 0, axis=1)))
        if self.max_len is not None and prompt + self.max_new_tokens > self.max_len:
            needed = f"the prompt has {prompt} tokens and the answer may have {self.max_new_tokens}"
            advice = "shorten the prompt, use fewer pixels, or allow a longer cache"
            raise InputError(f"{needed}, but the cache holds {self.max_len}: {advice}")
        return self.of_rows(cfg, len(segments))

    def constraints(self, batch: Batch, before: np.ndarray | None, stop_ids: Any) -> list:
        """Each row's `RowConstraint` at its start, or None; before [B n]: the tokens in the cache."""
        tokens, real = np.asarray(batch.tokens), np.asarray(batch.segment_ids) > 0
        seen = tokens[:, :0] if before is None else before
        prompts = [np.append(a, row[there]) for a, row, there in zip(seen, tokens, real)]
        prompts = [prompt for prompt in prompts for _ in range(self.copies)]
        return start_rows(self.constraint, prompts, stop_ids)

    def chunk_of(self, width: int) -> int | None:
        """prefill_chunk where rows are wider, else None: they are filled at once."""
        return self.prefill_chunk if self.prefill_chunk and width > self.prefill_chunk else None


def check_stop_ids(cfg: Config, stop_ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ids that end an answer, the config's for None. Raises InputError outside the vocabulary."""
    given = np.ravel(cfg.eos_token_ids if stop_ids is None else stop_ids)
    size = cfg.text.vocab_size
    if given.size and (given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= size):
        expected = f"ids in the vocabulary of {size}"
        raise InputError(f"stop_ids: got {shown(stop_ids)}, expected {expected}")
    return tuple(given.tolist())


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

    arrays: those of `Processor.inputs`, or what `Processor.encode` gives, for one conversation.
    key: anything, it comes back with the answer. watch: is called with an answer's tokens as they come, in
    the thread of `generate_many`, and with none while the prompt waits. True ends it as "cancelled".
    The other fields are those of `generate`, one value each.
    """

    key: Any
    arrays: EncodedPrompt | Mapping[str, Any]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    watch: Watch | None = None
    constraint: Constraint | None = None
    max_repeats: int = 0

    def __post_init__(self) -> None:
        GenerationOptions(self.max_new_tokens, self.sampling)
        check_repeats(self.max_repeats)
        self.sampling.rows(1)
        row_seeds(self.seed, 1)


@dataclasses.dataclass(frozen=True)
class Finished:
    """An answer: its tokens, with the stop id that ended it, and their log-probabilities (fp32).

    finish_reason is "stop", "length", "repetition", "cancelled" (by the request's `watch`), or "error"
    (not finite logits, or no token that a constraint allows): `error` then says so, and tokens are those
    before. Log-probabilities are the model's own, before penalties, temperature, filters and constraints.
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
