"""Loads batches: packs the samples of stream.py into rows, and keeps the position to resume from.

A sample depends only on its place in the stream. Batches are therefore the same for any number of
workers, and the position is the next place and the places of samples that are not packed yet.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.training.data import packing
from qwen3vl_jax.training.data.make_samples import SampleMaker, eight_bit
from qwen3vl_jax.training.data.records import open_records
from qwen3vl_jax.training.data.sample import Refusal, Sample
from qwen3vl_jax.training.data.stream import SHUFFLED, Order, Reader, iterate, make_stream
from qwen3vl_jax.training.recipe import Data, Pack

# data.bad_fraction is of at least this many records.
_FEWEST = 100
# Bad records named in a message.
_SHOWN = 5
# Refusals kept by name.
_KEPT = 1000
# So few records are read faster without workers.
_FEW = 500
_MOST_TOO_LARGE = 0.5
_BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """One batch, the names of each row's samples, and its `packing.fill_of`."""

    # A PackedBatch; None once its step runs.
    packed: Any
    names: list[list[str]]
    stats: dict[str, float]


# (the next batch, or None at the end; the state after it; the error that ended it)
PackResult = tuple[LoadedBatch | None, dict[str, Any], Exception | None]


class DataLoader:
    """An endless iterator of packed batches; with `once` one pass in order, the last batch not full.

    process_index of process_count: the part of every epoch to read. place: applied to every batch as
    soon as it is packed, to send it to a device early. With workers, batches are packed ahead in a
    thread; `close` ends both. Raises InputError for sources that cannot be opened, and from next() if
    more than data.bad_fraction of the records read are bad.
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
        place: Callable[[packing.PackedBatch], packing.PackedBatch] = lambda packed: packed,
    ):
        if not data.sources:
            raise InputError("data.sources is empty, expected at least one file of records")
        self.sources = [open_records(source) for source in data.sources]
        self.order = Order(
            sources=[[given.path, len(found)] for given, found in zip(data.sources, self.sources)],
            weights=[source.weight for source in data.sources],
            shuffle=data.shuffle and not once,
            once=once,
            seed=seed,
            process=[process_index, process_count],
        )
        self._maker = SampleMaker(proc, data, pack)
        stream = make_stream(self.sources, self._maker, self.order)
        labelled = any(getattr(source, "vision_labels", False) for source in self.sources)
        total = sum(map(len, self.sources))
        self._packer = Packer(stream, self._maker, total, labelled, place)
        self._state = self._packer.state()
        self._prefetcher: Prefetcher | None = None
        # The packer is ahead of the state, because a thread that packed ahead was ended.
        self._stale = False

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch. Raises StopIteration after one pass with `once`, InputError for bad records."""
        if self._stale:
            self._packer.restore(self._state)
            self._stale = False
        if self._maker.data.workers and self._prefetcher is None:
            self._prefetcher = Prefetcher(self._packer.step)
        step = self._prefetcher.take if self._prefetcher else self._packer.step
        drawn, self._state, error = step()
        if drawn is None:
            raise error or StopIteration
        return drawn

    def empty(self) -> LoadedBatch:
        """A batch of padding only."""
        return self._packer.built([])

    def global_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state for `set_state`: one loader has all of it (see GlobalFeed)."""
        return state

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON data."""
        return {"order": dataclasses.asdict(self.order), **self._state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where get_state was called. Raises InputError if the data has changed."""
        for key, ours in dataclasses.asdict(self.order).items():
            if (theirs := state["order"].get(key)) != ours:
                raise InputError(
                    f"data position: {key} is {ours}, and {theirs} in the checkpoint; go on with the "
                    "same data, or begin a new run"
                )
        self.close()
        self._packer.restore(state)
        self._state, self._stale = self._packer.state(), False

    def records(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """(name, record in chat form) of the first `count` conversations that end in an answer."""
        found: list[tuple[str, dict[str, Any]]] = []
        for source in self.sources:
            read = Reader(source, self._maker)
            for index in range(len(source)):
                if len(found) == count:
                    return found
                made = read(index)
                if isinstance(made, Refusal):
                    self._packer.keep(made.name, made.reason)
                    continue
                record = source.read(index)
                if not isinstance(record, dict):
                    # A ready sample has no text.
                    break
                messages = record["messages"]
                if len(messages) > 1 and messages[-1].get("role") == "assistant":
                    found.append((source.name(index), record))
        self._state = self._packer.state()
        return found

    @property
    def refused(self) -> list[tuple[str, str]]:
        """(name, reason) of the first thousand records that gave no sample, or a shortened one."""
        return [(name, reason) for name, reason in self._state["refused"]]

    def close(self) -> None:
        """Ends the thread and the workers. The next batch starts them again."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher, self._stale = None, True
            # Their arrays are in the workers' shared memory; `restore` makes them again.
            self._packer.waiting = []
        self._packer.end()


@dataclasses.dataclass
class Packer:
    """Packs the samples of a stream into batches, and keeps the position to resume from."""

    stream: Any
    maker: SampleMaker
    total: int  # records of all sources
    labelled: bool  # batches have vision_labels
    place: Callable[[packing.PackedBatch], packing.PackedBatch]

    def __post_init__(self) -> None:
        self.buffers = packing.BufferPool()
        proc = self.maker.proc
        self.pixel_type = np.float32 if eight_bit(proc) is proc else np.uint8
        self.end: Callable[[], None] = lambda: None
        self._begin(0)

    def step(self) -> PackResult:
        """Packs the next batch."""
        try:
            chosen, self.waiting = packing.choose(self.maker.pack, self.waiting, self._draw)
            return self.built(chosen) if chosen else None, self.state(), None
        except Exception as error:
            # It is raised when the batch is asked for.
            return None, self.state(), error

    def built(self, chosen: Sequence[packing.PackedSample]) -> LoadedBatch:
        """The batch of chosen samples."""
        cfg, pack = self.maker.proc.config, self.maker.pack
        packed = packing.build(cfg, pack, chosen, self.pixel_type, self.labelled, self.buffers)
        names: list[list[str]] = [[] for _ in range(pack.rows)]
        for found in chosen:
            names[found.row].append(found.sample.name)
        return LoadedBatch(self.place(packed), names, packing.fill_of(pack, chosen))

    def state(self) -> dict[str, Any]:
        """The next place, the places of samples not packed yet, and counts, as JSON data."""
        waiting = [drawn.place for drawn in self.waiting]
        refused = [list(pair) for pair in self.refused.items()]
        return {"next": self.next, "waiting": waiting, **self.counts, "refused": refused}

    def restore(self, state: dict[str, Any]) -> None:
        """Makes the samples that were not packed again, and continues at the next place."""
        self._begin(state["next"])
        self.counts = {name: state[name] for name in self.counts}
        self.refused = dict(state["refused"])
        for place in state["waiting"]:
            sample = self.stream[place]
            if isinstance(sample, Refusal):
                raise InputError(f"{sample.name}: was fine before the run stopped: {sample.reason}")
            self.waiting.append(packing.Pending(place, sample))

    def _begin(self, first: int) -> None:
        self.end()
        self.end = lambda: None
        self.coming: Iterator[Sample | Refusal] | None = None
        self.next, self.waiting = first, list[packing.Pending]()
        self.counts = {"read": 0, "bad": 0, "too_large": 0}
        self.refused: dict[str, str] = {}

    def _draw(self) -> packing.Pending | None:
        """The next sample of the stream, None at its end."""
        if self.coming is None:
            self.coming, self.end = iterate(self.stream, self.next, self.maker)
        for made in self.coming:
            self.next += 1
            self.counts["read"] += 1
            if isinstance(made, Refusal):
                self._count(made)
                continue
            if made.note:
                self.keep(made.name, made.note)
            return packing.Pending(self.next - 1, made)
        return None

    def keep(self, name: str, reason: str) -> None:
        """Keeps the reason for a record that was left out or cut."""
        if len(self.refused) < _KEPT:
            self.refused[name] = reason

    def _count(self, refusal: Refusal) -> None:
        """Counts a refusal. Raises InputError if there are too many."""
        self.keep(refusal.name, refusal.reason)
        self.counts[_kind(refusal)] += 1
        read = self.counts["read"]
        least = max(read, min(_FEWEST, self.total))
        first = itertools.islice(self.refused.items(), _SHOWN)
        shown = "; ".join(f"{name}: {reason}" for name, reason in first)
        fraction, epochs = self.maker.data.bad_fraction, -(-read // max(self.total, 1))
        # The limit of the epochs begun, or at the start what chance allows (four standard deviations).
        early = fraction * least + 4 * (fraction * least) ** 0.5
        most = min(fraction * epochs * self.total, early)
        _check_counts(self.counts, most, _MOST_TOO_LARGE * least, fraction, shown)


def _kind(refusal: Refusal) -> str:
    return "bad" if refusal.bad else "too_large"


def _check_counts(
    counts: dict[str, int], most_bad: float, most_too_large: float, fraction: float, shown: str
) -> None:
    """Raises InputError if more records are bad or too large than is allowed."""
    read, bad, too_large = (counts[name] for name in ("read", "bad", "too_large"))
    if bad > most_bad:
        raise InputError(
            f"{bad} of {read} records are bad, more than data.bad_fraction {fraction:g} allows: {shown}"
        )
    if too_large > most_too_large:
        raise InputError(
            f"{too_large} of {read} records do not fit a row; raise pack.length or "
            f"pack.vision_length, or lower data.max_pixels: {shown}"
        )


def survey(data: Data, pack: Pack, proc: Processor, report: Callable[[Refusal], None]) -> None:
    """Reads every record of the sources once and calls `report` for each that gives no sample.

    Endless sources are left out. Raises InputError at the end if a run would refuse the data.
    """
    sources = [found for found in map(open_records, data.sources) if len(found) < SHUFFLED]
    total = sum(map(len, sources))
    counts = {"read": total, "bad": 0, "too_large": 0}
    order = Order([], [1.0] * len(sources), shuffle=False, once=True, seed=0, process=[0, 1])
    workers = data.workers if total > _FEW else 0
    maker = SampleMaker(proc, dataclasses.replace(data, workers=workers), pack)
    coming, end = iterate(make_stream(sources, maker, order), 0, maker)
    try:
        for made in coming:
            if isinstance(made, Refusal):
                counts[_kind(made)] += 1
                report(made)
    finally:
        end()
    most, shown = data.bad_fraction * total, "they are named above"
    _check_counts(counts, most, _MOST_TOO_LARGE * total, data.bad_fraction, shown)


def check_answers(loader: Any, count: int) -> None:
    """Raises InputError if evaluate.generate is set and no record ends in an answer."""
    if count and not loader.records(1):
        raise InputError(
            "evaluate.generate: evaluate.sources hold no conversation that ends in an answer "
            "(ready samples have no words); set it to 0"
        )


class Prefetcher:
    """A thread that packs the next batches, in order."""

    def __init__(self, step: Callable[[], PackResult]):
        self._step, self._thread = step, ThreadPoolExecutor(1)
        self._coming = deque(self._thread.submit(step) for _ in range(_BATCHES_AHEAD))

    def take(self) -> PackResult:
        """What the next step gave. The last one is given again after the end."""
        found = self._coming[0].result()
        if found[0] is not None:
            self._coming.popleft()
            self._coming.append(self._thread.submit(self._step))
        return found

    def stop(self) -> None:
        """Waits for the step that is being made."""
        self._thread.shutdown(cancel_futures=True)
