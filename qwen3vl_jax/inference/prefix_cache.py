"""Shared beginnings of prompts (rules, examples, an image), prefilled once and kept in a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.requests import Stats
from qwen3vl_jax.inference.vision_cache import FeatureStore
from qwen3vl_jax.model.cache import prefill
from qwen3vl_jax.model.structs import KVCache, Params
from qwen3vl_jax.processing.batch import bucket, group_batch
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, shared_start

MIN_TOKENS = 64  # fewer are not worth a program of their own
MAX_PREFIXES, MAX_BYTES = 4, 1 << 30  # on the device
# The width of a prompt -> its prefill chunk, None where it is filled at once.
ChunkOf = Callable[[int], int | None]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The first tokens of prompts, and the cache of one row that holds them."""

    prompt: EncodedPrompt
    cache: KVCache

    @property
    def length(self) -> int:
        return len(self.prompt.ids)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.cache))

    def begins(self, prompt: EncodedPrompt) -> bool:
        return shared_start(prompt, self.prompt, all_of_b=True) == self.length


class PrefixStore:
    """The prefixes used last; `stats` counts those that are made."""

    def __init__(
        self, params: Params, cfg: Config, features: FeatureStore, chunk_of: ChunkOf, stats: Stats
    ):
        self.params, self.cfg, self.features, self.chunk_of = params, cfg, features, chunk_of
        self.store: list[Prefix] = []  # the last used one last
        self.stats = stats

    def lookup(self, prompt: EncodedPrompt) -> Prefix | None:
        """The longest prefix that the prompt begins with."""
        found = [p for p in self.store if p.begins(prompt) and self._fits(prompt, p.length)]
        return max(found, key=lambda p: p.length, default=None)

    def _fits(self, prompt: EncodedPrompt, length: int) -> bool:
        """Whether the rest is prefilled at once: behind a prefix there are no chunks."""
        return self.chunk_of(bucket(len(prompt.ids) - length)) is None

    def best(self, prompt: EncodedPrompt, others: Sequence[EncodedPrompt]) -> Prefix | None:
        """The prefix to prefill a prompt behind: one in the store, or a new one that others share too."""
        found = self.lookup(prompt)
        # The length that spares most tokens beyond those that are kept already.
        kept = 0 if found is None else found.length
        shared = sorted((shared_start(prompt, other) for other in others), reverse=True)
        spared = [(length - kept) * count for count, length in enumerate(shared, 1)]
        length = shared[int(np.argmax(spared))] if spared else 0
        if length - kept >= MIN_TOKENS and self._fits(prompt, length):
            first, width = prompt.first(length), bucket(length)
            batch, chunk = group_batch(self.cfg, [first], width), self.chunk_of(width)
            features = self.features.of([first], width)
            cache, _ = prefill(self.params, self.cfg, batch, width, features=features, chunk=chunk)
            self.stats.prefixes += 1
            self.stats.prefilled += length
            found = Prefix(first.without_patches(), cache)
        if found is not None:
            self.store = [*(p for p in self.store if p is not found), found][-MAX_PREFIXES:]
            while len(self.store) > 1 and sum(p.nbytes for p in self.store) > MAX_BYTES:
                self.store = self.store[1:]
        return found
