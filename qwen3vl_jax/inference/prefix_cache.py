"""What several prompts begin with (rules, examples, a picture), prefilled once and kept in a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.vision_cache import FeatureStore
from qwen3vl_jax.model.cache import prefill
from qwen3vl_jax.model.structs import KVCache, Params
from qwen3vl_jax.processing.batch import bucket, group_batch
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, shared_start

LEAST = 64  # tokens: fewer are not worth a program of their own
KEPT_PREFIXES, KEPT_BYTES = 4, 1 << 30  # on the device
run_prefill = jax.jit(prefill, static_argnames=("cfg", "max_len", "chunk"))


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
    """The prefixes used last. `made` counts them, `tokens` those that were prefilled for them."""

    def __init__(self, params: Params, cfg: Config, features: FeatureStore, chunk: int | None):
        self.params, self.cfg, self.features, self.chunk = params, cfg, features, chunk
        self.store: list[Prefix] = []  # the last used one last
        self.made = self.tokens = 0

    def kept(self, prompt: EncodedPrompt) -> Prefix | None:
        """The longest prefix that the prompt begins with."""
        found = [p for p in self.store if p.begins(prompt) and self._fits(prompt, p.length)]
        return max(found, key=lambda p: p.length, default=None)

    def _fits(self, prompt: EncodedPrompt, length: int) -> bool:
        """Whether what follows is prefilled whole: behind a prefix there are no chunks."""
        return not self.chunk or bucket(len(prompt.ids) - length) <= self.chunk

    def best(self, prompt: EncodedPrompt, others: Sequence[EncodedPrompt]) -> Prefix | None:
        """What to prefill a prompt behind: kept already, or from now on if it serves others too."""
        kept = self.kept(prompt)
        length = _worth_keeping(prompt, others, 0 if kept is None else kept.length)
        if length and self._fits(prompt, length):
            kept = self._make(prompt.first(length))
        if kept is not None:
            self.store = [*(p for p in self.store if p is not kept), kept][-KEPT_PREFIXES:]
            while len(self.store) > 1 and sum(p.nbytes for p in self.store) > KEPT_BYTES:
                self.store = self.store[1:]
        return kept

    def _make(self, first: EncodedPrompt) -> Prefix:
        length = len(first.ids)
        width = bucket(length)
        cache, _ = run_prefill(
            self.params, self.cfg, group_batch(self.cfg, [first], width), width,
            features=self.features.of([first], width),
            chunk=self.chunk if self.chunk and width > self.chunk else None,
        )  # fmt: skip
        self.made += 1
        self.tokens += length
        return Prefix(first.without_patches(), cache)


def _worth_keeping(prompt: EncodedPrompt, others: Sequence[EncodedPrompt], kept: int) -> int:
    """The tokens whose sharing spares most beyond those kept already; 0 where that is too few."""
    shared = sorted((shared_start(prompt, other) for other in others), reverse=True)
    spared = [(length - kept) * count for count, length in enumerate(shared, 1)]
    best = shared[int(np.argmax(spared))] if spared else 0
    return best if best - kept >= LEAST else 0
