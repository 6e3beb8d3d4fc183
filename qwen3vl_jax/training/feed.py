"""Batches of a run: grain shuffles, mixes, shards and reads in workers; what it gives is packed here.

A sample is a function of its place in the stream, whichever process makes it, so the batches are the
same for any number of workers, and a position is one number and the places of the samples that wait.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.training.packing import PackedBatch, build, choose, fill_of
from qwen3vl_jax.training.recipe import Data, Pack
from qwen3vl_jax.training.records import Records, open_records
from qwen3vl_jax.training.samples import Sample, SampleMaker, TooLarge, eight_bit

GROUP = 16  # samples that a worker hands over at a time
AHEAD = 2  # groups that a worker has ready
SHUFFLED = 2**31  # a longer source, which only a class can be, is its own shuffle
_FEWEST = 100  # records that a fraction is of, at least
_SHOWN = 5  # bad records in a message
_KEPT = 1000  # refusals that are kept by name
_MOST_TOO_LARGE = 0.5


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A record that gives no sample; bad: it is wrong, not too large."""

    name: str
    reason: str
    bad: bool


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One batch, the names of each row's samples, and fill, vision_fill, samples, tokens, patches."""

    packed: PackedBatch
    names: list[list[str]]
    stats: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Index of a source -> its sample, or why there is none. Runs in workers."""

    records: Records
    maker: SampleMaker

    def __call__(self, index: int) -> Sample | Refusal:
        name = self.records.name(index)
        try:
            return self.maker(name, self.records.read(index))
        except TooLarge as error:
            return Refusal(name, str(error), bad=False)
        except InputError as error:
            return Refusal(name, str(error), bad=True)
        except Exception as error:  # a damaged record can break any decoder, and must have a name
            return Refusal(
                name, f"{type(error).__name__}: {' '.join(str(error).split())}", bad=True
            )


class Feed:
    """An endless iterator of packed batches, or with `once` one pass in order whose last is not full.

    process_index of process_count: which part of every epoch is this process's. `refused` lists what
    gave no sample, or a shorter one, as (name, reason). Raises InputError where sources cannot be
    opened, and from next() once more than data.bad_fraction of the records read are bad.
    """

    def __init__(
        self,
        data: Data,
        pack: Pack,
        proc: Processor,
        seed: int,
        *,
        once: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not data.sources:
            raise InputError("data.sources is empty, expected at least one file of records")
        self.data, self.pack, self.config = data, pack, proc.config
        self.sources = [open_records(source) for source in data.sources]
        self.pixel_type = np.float32 if eight_bit(proc) is proc else np.uint8
        self.with_labels = any(getattr(s, "vision_labels", False) for s in self.sources)
        sizes = [[source.path, len(found)] for source, found in zip(data.sources, self.sources)]
        weights = [source.weight for source in data.sources]
        self._of = {
            "sources": sizes, "weights": weights, "shuffle": data.shuffle and not once, "seed": seed,
            "process": [process_index, process_count],
        }  # fmt: skip
        self._stream = _stream(self.sources, SampleMaker(proc, data, pack), weights, self._of, once)
        self._total = sum(size for _, size in sizes)
        self._close: Any = None
        self._start(0)

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        """The next batch. Raises StopIteration at the end of one pass, InputError for bad records."""
        placed, self._waiting = choose(self.pack, self._waiting, self._draw)
        if not placed:
            raise StopIteration
        packed = build(self.config, self.pack, placed, self.pixel_type, self.with_labels)
        names: list[list[str]] = [[] for _ in range(self.pack.rows)]
        for found in placed:
            names[found.row].append(found.sample.name)
            del self._place[id(found.sample)]
        return Drawn(packed, names, fill_of(self.pack, placed))

    def get_state(self) -> dict[str, Any]:
        """Where the feed is, as JSON data."""
        waiting = [self._place[id(sample)] for sample in self._waiting]
        counts = {"read": self._read, "bad": self._bad, "too_large": self._too_large}
        return {
            "of": self._of, "next": self._next, "waiting": waiting, **counts,
            "refused": [list(pair) for pair in self._refused.items()],
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where get_state was called. Raises InputError for the state of other data."""
        for key, ours in self._of.items():
            if (theirs := state["of"].get(key)) != ours:
                raise InputError(
                    f"data position: {key} is {ours}, and {theirs} in the checkpoint; go on with the "
                    "same data, or begin a new run"
                )
        self._start(state["next"])
        self._read, self._bad = state["read"], state["bad"]
        self._too_large = state["too_large"]
        self._refused = dict(state["refused"])
        for place in state["waiting"]:
            sample = self._stream[place]
            if not isinstance(sample, Sample):
                raise InputError(
                    f"{sample.name}: it was fine before the run stopped: {sample.reason}"
                )
            self._waiting.append(sample)
            self._place[id(sample)] = place

    def records(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The first `count` (name, record in chat form) that end in an answer; bad ones are left out."""
        found: list[tuple[str, dict[str, Any]]] = []
        for source in self.sources:
            for index in range(len(source)):
                if len(found) == count:
                    return found
                try:
                    record = source.read(index)
                except InputError:
                    continue
                if isinstance(record, Sample):
                    break  # ready samples have no words
                if record["messages"][-1].get("role") == "assistant":
                    found.append((source.name(index), record))
        return found

    @property
    def refused(self) -> list[tuple[str, str]]:
        return list(self._refused.items())

    def close(self) -> None:
        """Ends the workers."""
        if self._close is not None:
            self._close()
            self._close = None

    def _start(self, first: int) -> None:
        """Makes the next sample that of place `first`, with nothing waiting and nothing counted."""
        self.close()
        self._coming: Iterator[Sample | Refusal] | None = None
        self._next, self._waiting = first, []
        self._place: dict[int, int] = {}  # id of a sample that waits -> its place in the stream
        self._read = self._bad = self._too_large = 0
        self._refused: dict[str, str] = {}

    def _draw(self) -> Sample | None:
        """The next sample of the stream, None behind its end."""
        if self._coming is None:
            self._coming, self._close = _iterate(self._stream, self._next, self.data.workers)
        for made in self._coming:
            self._next += 1
            self._read += 1
            if isinstance(made, Refusal):
                self._count(made)
                continue
            self._place[id(made)] = self._next - 1
            if made.note:
                self._list(made.name, made.note)
            return made
        return None

    def _list(self, name: str, reason: str) -> None:
        if len(self._refused) < _KEPT:
            self._refused[name] = reason

    def _count(self, refusal: Refusal) -> None:
        """Takes note of a refusal. Raises InputError where there are too many."""
        self._list(refusal.name, refusal.reason)
        self._bad += refusal.bad
        self._too_large += not refusal.bad
        least = max(self._read, min(_FEWEST, self._total))
        shown = "".join(f"\n  {n}: {r}" for n, r in itertools.islice(self.refused, _SHOWN))
        if self._bad > self.data.bad_fraction * least:
            raise InputError(
                f"{self._bad} of {self._read} records are bad, more than data.bad_fraction "
                f"{self.data.bad_fraction:g} allows:{shown}"
            )
        if self._too_large > _MOST_TOO_LARGE * least:
            raise InputError(
                f"{self._too_large} of {self._read} records do not fit a row; raise pack.length or "
                f"pack.vision_length, or lower data.max_pixels:{shown}"
            )


def _stream(
    sources: Sequence[Records], maker: SampleMaker, weights: Sequence[float], of: Any, once: bool
) -> Any:
    """A grain data set of samples by place: every epoch of a source has each of its records once."""
    import grain

    index, count = of["process"]
    parts = []
    for number, records in enumerate(sources):
        part = grain.MapDataset.range(len(records))
        if of["shuffle"] and len(records) < SHUFFLED:
            words = np.random.SeedSequence([of["seed"], number]).generate_state(1)
            part = part.shuffle(seed=int(words[0]))
        part = part if once else part.repeat()
        parts.append(part.slice(slice(index, None, count)).map(Reader(records, maker)))
    if len(parts) == 1:
        return parts[0]
    if once:
        return grain.MapDataset.concatenate(parts)
    return grain.MapDataset.mix(parts, weights)


def _iterate(stream: Any, first: int, workers: int) -> tuple[Iterator[Any], Any]:
    """The samples from place `first` on, in order, and what ends the workers."""
    if not workers:
        return (stream[place] for place in range(first, len(stream))), None
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read its flags, which no one sets here
    groups = stream.slice(slice(first, None)).batch(GROUP, batch_fn=tuple)
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
    iterator = iter(groups.to_iter_dataset(reading).mp_prefetch(options))
    return itertools.chain.from_iterable(iterator), functools.partial(_end, iterator)


def _end(iterator: Any) -> None:
    iterator.close()
