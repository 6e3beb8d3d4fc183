"""Loads batches: packs the samples of stream.py into rows, and keeps the position to resume from.

A sample depends only on its place in the stream. Batches are therefore the same for any number of
workers, and the position is the next place and the places of samples that are not packed yet.
"""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

    packed: Any  # a PackedBatch; None once its step runs
    names: list[list[str]]
    stats: dict[str, float]


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
        self._maker, self._place = SampleMaker(proc, data, pack), place
        self._stream = make_stream(self.sources, self._maker, self.order)
        self._labelled = any(source.vision_labels for source in self.sources)
        self._total = sum(map(len, self.sources))
        self._pixel_type = np.float32 if eight_bit(proc) is proc else np.uint8
        self._buffers = packing.BufferPool()
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[Any]] = deque()
        self._begin(0)
        # After the batch that was given last; a thread that packs ahead is further.
        self._state = self._position()

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch. Raises StopIteration after one pass with `once`, InputError for bad records."""
        if self._stale:
            self._restore(self._state)
        if self._maker.data.workers:
            self._thread = self._thread or ThreadPoolExecutor(1)
            while len(self._ahead) <= _BATCHES_AHEAD:
                self._ahead.append(self._thread.submit(self._step))
            drawn, self._state, error = self._ahead[0].result()
        else:
            drawn, self._state, error = self._step()
        if drawn is None:
            raise error or StopIteration
        if self._ahead:
            self._ahead.popleft()
        return drawn

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
        self._restore(state)
        self._state = self._position()

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
                    self._keep(made.name, made.reason)
                    continue
                record = source.read(index)
                if not isinstance(record, dict):
                    # A ready sample has no text.
                    break
                messages = record["messages"]
                if len(messages) > 1 and messages[-1].get("role") == "assistant":
                    found.append((source.name(index), record))
        self._state = self._position()
        return found

    @property
    def refused(self) -> list[tuple[str, str]]:
        """(name, reason) of the first thousand records that gave no sample, or a shortened one."""
        return [(name, reason) for name, reason in self._state["refused"]]

    def close(self) -> None:
        """Ends the thread and the workers. The next batch starts them again."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread, self._stale = None, True
            self._ahead.clear()
            # Their arrays are in the workers' shared memory; `_restore` makes them again.
            self._waiting = []
        self._coming.close()
        self._coming = iterate(self._stream, self._next, self._maker)

    def _begin(self, first: int) -> None:
        """Goes to a place of the stream with nothing read."""
        self._coming = iterate(self._stream, first, self._maker)
        self._next, self._waiting, self._stale = first, list[packing.Pending](), False
        self._counts = {"read": 0, "bad": 0, "too_large": 0}
        self._refused: dict[str, str] = {}

    def _position(self) -> dict[str, Any]:
        """The next place, the places of samples not packed yet, and counts, as JSON data."""
        waiting = [drawn.place for drawn in self._waiting]
        refused = [list(pair) for pair in self._refused.items()]
        return {"next": self._next, "waiting": waiting, **self._counts, "refused": refused}

    def _restore(self, state: dict[str, Any]) -> None:
        """Makes the samples that were not packed again, and continues at the next place."""
        self._begin(state["next"])
        self._counts = {name: state[name] for name in self._counts}
        self._refused = dict(state["refused"])
        for place in state["waiting"]:
            sample = self._stream[place]
            if isinstance(sample, Refusal):
                raise InputError(f"{sample.name}: was fine before the run stopped: {sample.reason}")
            self._waiting.append(packing.Pending(place, sample))

    def _step(self) -> tuple[LoadedBatch | None, dict[str, Any], Exception | None]:
        """(the next batch, None at the end; the position after it; an error, for who asks for it)."""
        try:
            chosen, self._waiting = packing.choose(self._maker.pack, self._waiting, self._draw)
            return self.batch_of(chosen) if chosen else None, self._position(), None
        except Exception as error:
            return None, self._position(), error

    def batch_of(self, chosen: Sequence[packing.PackedSample]) -> LoadedBatch:
        """The batch of chosen samples; of none: padding only."""
        cfg, pack = self._maker.proc.config, self._maker.pack
        kinds = self._pixel_type, self._labelled
        packed = packing.build(cfg, pack, chosen, *kinds, self._buffers)
        names: list[list[str]] = [[] for _ in range(pack.rows)]
        for found in chosen:
            names[found.row].append(found.sample.name)
        return LoadedBatch(self._place(packed), names, packing.fill_of(pack, chosen))

    def _draw(self) -> packing.Pending | None:
        """The next sample of the stream, None at its end. Raises InputError for too many refusals."""
        for made in self._coming:
            self._next += 1
            self._counts["read"] += 1
            if isinstance(made, Sample):
                if made.note:
                    self._keep(made.name, made.note)
                return packing.Pending(self._next - 1, made)
            self._keep(made.name, made.reason)
            self._counts["bad" if made.bad else "too_large"] += 1
            self._check_refusals()
        return None

    def _keep(self, name: str, reason: str) -> None:
        """Keeps the reason for a record that was left out or cut."""
        if len(self._refused) < _KEPT:
            self._refused[name] = reason

    def _check_refusals(self) -> None:
        read, fraction = self._counts["read"], self._maker.data.bad_fraction
        least, epochs = max(read, min(_FEWEST, self._total)), -(-read // max(self._total, 1))
        first = itertools.islice(self._refused.items(), _SHOWN)
        shown = "; ".join(f"{name}: {reason}" for name, reason in first)
        # The limit of the epochs begun, or at the start what chance allows (four standard deviations).
        early = fraction * least + 4 * (fraction * least) ** 0.5
        most = min(fraction * epochs * self._total, early)
        _check_counts(self._counts, most, _MOST_TOO_LARGE * least, fraction, shown)


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
    with contextlib.closing(iterate(make_stream(sources, maker, order), 0, maker)) as coming:
        for made in coming:
            if isinstance(made, Refusal):
                counts["bad" if made.bad else "too_large"] += 1
                report(made)
    most, shown = data.bad_fraction * total, "they are named above"
    _check_counts(counts, most, _MOST_TOO_LARGE * total, data.bad_fraction, shown)


def check_answers(loader: Any, count: int) -> None:
    """Raises InputError if evaluate.generate is set and no record ends in an answer."""
    if count and not loader.records(1):
        raise InputError(
            "evaluate.generate: evaluate.sources hold no conversation that ends in an answer "
            "(ready samples have no words); set it to 0"
        )
