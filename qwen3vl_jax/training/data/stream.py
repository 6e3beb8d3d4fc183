"""The sample stream: grain shuffles, mixes and shards the records; workers make the samples.

A worker sends a group of samples with all their arrays in one block, which grain moves through shared
memory. Where that has no room the block is bytes, which go through the pipe.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.encoded_prompt import EncodedImage
from qwen3vl_jax.training.data.make_samples import SampleMaker, TooLarge
from qwen3vl_jax.training.data.packing import one_frame
from qwen3vl_jax.training.data.records import Records
from qwen3vl_jax.training.data.sample import Refusal, Sample

# Samples that a worker hands over at a time.
GROUP = 16
# Groups that a worker has ready.
AHEAD = 2
# A source as long as this, which only a class can be, is not shuffled: it is random itself.
SHUFFLED = 2**31
# Where shared memory is a file system; often a small one, in containers.
_SHARED = "/dev/shm"
# Blocks that must have room: other workers write at the same time.
_SPARE = 16


@dataclasses.dataclass(frozen=True)
class Reader:
    """Index of a source -> its Sample, or a Refusal with the reason. Runs in workers."""

    records: Records
    maker: SampleMaker

    def __call__(self, index: int) -> Sample | Refusal:
        name = self.records.name(index)
        try:
            return self.maker(name, self.records.read(index))
        except InputError as error:
            return Refusal(name, str(error), bad=not isinstance(error, TooLarge))
        except Exception as error:
            # A damaged record can break any decoder, and must be named.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Refusal(name, reason, bad=True)


@dataclasses.dataclass(frozen=True)
class Order:
    """Everything that decides the order of samples. A checkpoint keeps it, as JSON data."""

    sources: list[list[Any]]  # [path, records]
    weights: list[float]
    shuffle: bool
    once: bool
    seed: int
    process: list[int]  # index and count


def make_stream(sources: Sequence[Records], maker: SampleMaker, order: Order) -> Any:
    """A grain dataset: place -> Sample or Refusal.

    Every epoch of a source has each record once, in a new order if shuffled. Processes take every
    count-th place. Sources are mixed by weight; with `once` they follow each other.
    """
    import grain

    index, count = order.process
    parts = []
    for number, records in enumerate(sources):
        part = grain.MapDataset.range(len(records))
        if order.shuffle and len(records) < SHUFFLED:
            words = np.random.SeedSequence([order.seed, number]).generate_state(1)
            part = part.shuffle(seed=int(words[0]))
        part = part if order.once else part.repeat()
        part = part.slice(slice(index, None, count)).map(Reader(records, maker))
        # It is empty in one pass over fewer records than processes.
        parts += [part] if len(part) else []
    if len(parts) < 2:
        return parts[0] if parts else ()
    if order.once:
        return grain.MapDataset.concatenate(parts)
    return grain.MapDataset.mix(parts, order.weights)


def iterate(stream: Any, first: int, maker: SampleMaker) -> Generator[Sample | Refusal]:
    """The samples from place `first` on, in order for any number of workers, which end with it.

    Raises InputError if a worker has died.
    """
    workers, patch_shape = maker.data.workers, maker.proc.config.vision.patch_shape
    if not workers or not len(stream):
        yield from (stream[place] for place in range(first, len(stream)))
        return
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # grain's workers read absl flags, which nothing parses here.
        flags.FLAGS.mark_as_parsed()
    send = functools.partial(SampleBlock.of, patch_shape)
    groups = stream.slice(slice(first, None)).batch(GROUP, batch_fn=send)
    single = groups.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
    iterator: Any = iter(single.mp_prefetch(options, worker_init_fn=_begin_worker))
    try:
        for group, block in iterator:
            yield from group.unpack(block)
    except RuntimeError as error:
        raise InputError(
            f"data.workers: a worker process ended ({error}). Too little memory is the usual reason: "
            "lower data.workers or data.max_pixels"
        ) from error
    finally:
        iterator.close()


def _begin_worker(index: int, count: int) -> None:
    """Starts a worker: no accelerator, no signals; it ends when its parent dies."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    # The parent saves first, and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class SampleBlock:
    """A group of samples and refusals, pickled without the bytes of its arrays."""

    pickled: bytes
    sizes: list[int]  # of each array in the block, in bytes

    @classmethod
    def of(
        cls, patch_shape: tuple[int, ...], group: Sequence[Sample | Refusal]
    ) -> tuple["SampleBlock", np.ndarray | bytes]:
        """A group and its block of arrays. Images are sent as one frame, not two equal ones."""
        # By id: pickle sends what samples share once.
        frames: dict[int, np.ndarray] = {}

        def light(image: EncodedImage) -> EncodedImage:
            if (key := id(image.patches)) not in frames:
                frames[key] = one_frame(image.patches, patch_shape)
            return type(image)(frames[key], image.grid, image.start, image.end)

        sent = [
            dataclasses.replace(item, images=tuple(map(light, item.images)))
            if isinstance(item, Sample)
            else item
            for item in group
        ]
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(sent, protocol=5, buffer_callback=arrays.append)
        parts = [array.raw() for array in arrays]
        block = b"".join(parts)
        given = np.frombuffer(block, np.uint8) if _has_room(block) else block
        return cls(pickled, [len(part) for part in parts]), given

    def unpack(self, block: Any) -> list[Sample | Refusal]:
        """The group. Its arrays are views of the block."""
        view, ends = memoryview(block), np.cumsum(self.sizes, dtype=int).tolist()
        parts = [view[end - size : end] for end, size in zip(ends, self.sizes)]
        return pickle.loads(self.pickled, buffers=parts)


def _has_room(block: bytes) -> bool:
    """Whether shared memory takes a block: a write past its end kills the process."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(_SHARED).free if os.access(_SHARED, os.W_OK) else 0
        return free > _SPARE * len(block)
    return False
