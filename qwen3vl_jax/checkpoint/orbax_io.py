"""Orbax in and out with little memory: a few tensors at a time, never the whole tree.

Orbax writes every numpy leaf of a tree at once, all of them in memory whatever limits it is given,
so leaves are LazyTensors and their TypeHandler takes them in groups: `python -m benchmarks.convert`
measures what that needs. The files are Orbax's own: `StandardCheckpointer().restore(directory)`
reads them without this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from qwen3vl_jax.checkpoint.digests import (
    DIGESTS,
    DamagedError,
    check_digests,
    digest,
    kept_digests,
)
from qwen3vl_jax.checkpoint.lazy_tensor import Index, LazyTensor
from qwen3vl_jax.checkpoint.param_paths import TreePath, at_path, flatten, path_str, tree_path
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.json_text import write_json
from qwen3vl_jax.storage.paths import for_orbax

Sink = Callable[[TreePath, np.ndarray], Any]
_GROUP = 64 << 20  # bytes written together; a single larger tensor goes alone
_CHUNK = 128 << 20  # bytes of one stored piece, the least that a process reads for its shard


def _is_said_once(record: logging.LogRecord) -> bool:
    """Whether Orbax does not also raise what it logs: the errors of its threads come to who waits."""
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_is_said_once)


def _context() -> tensorstore.Context:
    # Whoever writes a checkpoint flushes it once, at the end: a flush a group is slow.
    cache = {"total_bytes_limit": 100_000_000}
    return tensorstore.Context({"cache_pool#ocdbt": cache, "file_io_sync": False})


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes LazyTensors in groups of at most _GROUP bytes, and hands arrays to `sink` one by one.

    One by one also keeps a damaged file's error single: with others in flight, each would be reported.
    """

    def __init__(self, sink: Callable[[TreePath, Any], Any]):
        super().__init__(deepcopy_host_arrays=False)
        self._sink, self._context = sink, _context()
        self._failed: list[Exception] = []

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any):
        try:  # the others of a group are waited for too: they would call a loop that is closed
            await super()._open_and_write(value, tspec, ts_context)
        except Exception as e:
            self._failed.append(e)

    async def metadata(self, infos: Any):
        return [found for info in infos for found in await super(_Handler, self).metadata([info])]

    async def serialize(self, values: Any, infos: Any, args: Any = None):
        args = args or [ocp.SaveArgs()] * len(values)
        infos = [info.replace(ts_context=self._context) for info in infos]
        for group in _groups([value.nbytes for value in values]):
            arrays = [value.load() for value in values[group]]
            for future in await super().serialize(arrays, infos[group], args[group]):
                future.result()
            if self._failed:
                raise self._failed[0]
            for info, array in zip(infos[group], arrays):
                self._sink(tree_path(info.keypath), array)
            del arrays, array, future  # before the next group comes, not after
        return []

    async def deserialize(self, infos: Any, args: Any = None):
        args = args or [ocp.RestoreArgs()] * len(infos)
        leaves = []
        for info, arg in zip(infos, args):
            (array,) = await super().deserialize([info], [arg])
            leaves.append(self._sink(tree_path(info.keypath), array))
            del array  # before the next one comes, not after
        return leaves


class _Opener(_Handler):
    """Hands arrays to `sink` that are not read yet."""

    async def deserialize(self, infos: Any, args: Any = None):
        leaves = []
        for info in infos:
            spec = ocp.type_handlers.get_json_tspec_read(info, info.is_ocdbt_checkpoint)
            store = await tensorstore.open(spec, open=True, read=True, context=info.ts_context)
            leaves.append(self._sink(tree_path(info.keypath), _lazy(store)))
        return leaves


def _lazy(store: tensorstore.TensorStore) -> LazyTensor:
    parts = functools.partial(_read_parts, store)
    dtype = store.dtype.numpy_dtype
    return LazyTensor(tuple(store.shape), dtype, lambda: store.read().result(), parts)


def _read_parts(store: tensorstore.TensorStore, where: Sequence[Index]) -> list[np.ndarray]:
    """Parts of a stored array, from its stored pieces one by one: each is read once, or not at all."""
    ranges = [[s.indices(n)[:2] for s, n in zip(index, store.shape)] for index in where]
    out = [np.empty([b - a for a, b in spans], store.dtype.numpy_dtype) for spans in ranges]
    chunk = store.chunk_layout.read_chunk.shape or ()
    for piece in _pieces(store.shape, [c or n for c, n in zip(chunk, store.shape)]):
        block = None
        for spans, part in zip(ranges, out):
            met = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(spans, piece)]
            if any(a >= b for a, b in met):
                continue
            if block is None:
                block = store[tuple(slice(*span) for span in piece)].read().result()
            to = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(met, spans))
            part[to] = block[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(met, piece))]
    return out


def _pieces(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The (start, stop) of each axis of every piece of an array."""
    cuts = [[(a, min(a + c, n)) for a in range(0, n, max(c, 1))] for n, c in zip(shape, chunk)]
    return itertools.product(*cuts)


def _groups(sizes: list[int]) -> Iterator[slice]:
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > _GROUP:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _tree_handler(sink: Callable, kind: type[_Handler] = _Handler) -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (LazyTensor, kind(sink))
    )
    # Not compressed: bf16 weights shrink little, and compression costs much speed and memory.
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def write_tree(
    directory: Path, tree: Any, wrote: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Writes a tree of LazyTensors as an Orbax checkpoint, and the digest of each.

    `wrote` hears of each tensor's bytes. Raises InputError where there is no room.
    """
    save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    digests: dict[str, str] = {}

    def sink(path: TreePath, array: np.ndarray) -> None:
        digests[path_str(path)] = digest(array)
        wrote(array.nbytes)

    with writable(directory), ocp.Checkpointer(_tree_handler(sink)) as checkpointer:
        checkpointer.save(for_orbax(directory), args=ocp.args.PyTreeSave(tree, save_args))
    (directory / DIGESTS).write_text(write_json(digests, DIGESTS, indent=0) + "\n")


def stored_tensors(directory: Path) -> dict[TreePath, LazyTensor]:
    """Shape and dtype of each array of an Orbax checkpoint, by path; `load` is for read_tree to do.

    Raises InputError for a directory that Orbax cannot read.
    """

    def unreadable() -> np.ndarray:
        raise TypeError("an Orbax checkpoint is read by read_tree")

    return {
        path: LazyTensor(tuple(leaf.shape), np.dtype(leaf.dtype), unreadable)
        for path, leaf in flatten(_metadata(directory))
    }


def read_tree(directory: Path, sink: Sink, under: TreePath = ()) -> Any:
    """Reads each array of a checkpoint; gives the tree of what `sink(path, array)` returned.

    under: reads no array but those at or below this path, and gives what stands there, or None.
    Raises DamagedError for a directory that Orbax cannot read, and for an array that is not the one
    that was saved.
    """
    kept = kept_digests(directory)

    def checked(path: TreePath, array: np.ndarray) -> Any:
        _check(directory, kept, path, array)
        return sink(path, array)

    return _read(directory, _tree_handler(checked), under)


def _check(directory: Path, kept: dict[str, str] | None, path: TreePath, array: np.ndarray) -> None:
    if kept is not None and digest(array) != kept.get(path_str(path)):
        raise DamagedError(directory, [f"{path_str(path)} is not as it was saved"])


def verify_tree(directory: Path) -> tuple[int, int]:
    """(arrays, bytes) of an Orbax checkpoint, all of them read and as they were saved.

    Raises DamagedError that lists those which are not, InputError for a checkpoint without digests.
    """
    kept = kept_digests(directory)
    if kept is None:
        raise InputError(
            f"{directory}: holds no digests, expected those that convert and train.py save; "
            f"it is of an older release: write it again"
        )
    found: dict[str, str] = {}
    sizes: list[int] = []

    def sink(path: TreePath, array: np.ndarray) -> None:
        found[path_str(path)] = digest(array)
        sizes.append(array.nbytes)

    _read(directory, _tree_handler(sink))
    check_digests(directory, found, kept)
    return len(sizes), sum(sizes)


def open_tree(directory: Path, sink: Callable[[TreePath, LazyTensor], Any]) -> Any:
    """`read_tree` whose sink is given each array unread: what it does not read costs nothing.

    An array that is read in parts is not checked.
    """
    kept = kept_digests(directory)

    def checked(path: TreePath, leaf: LazyTensor) -> Any:
        def load() -> np.ndarray:
            with readable(directory):
                array = leaf.load()
            _check(directory, kept, path, array)
            return array

        return sink(path, dataclasses.replace(leaf, load=load))

    return _read(directory, _tree_handler(checked, _Opener))


def read_in_order(directory: Path, sink: Sink, order: Iterable[TreePath]) -> None:
    """`read_tree` in an order of one's own, one array at a time. Raises InputError."""
    found: dict[TreePath, LazyTensor] = {}
    open_tree(directory, found.__setitem__)
    for path in order:
        array = found.pop(path).load()
        sink(path, array)
        del array  # before the next one comes, not after


def _read(directory: Path, handler: ocp.PyTreeCheckpointHandler, under: TreePath = ()) -> Any:
    def wanted(keypath: tuple[Any, ...], leaf: Any) -> Any:
        return leaf if tree_path(keypath)[: len(under)] == under else ocp.PLACEHOLDER

    stored = _metadata(directory)
    as_lazy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=LazyTensor), stored)
    item = jax.tree.map_with_path(wanted, stored)
    me = jax.process_index()  # others may read something else, or nothing: nobody is waited for
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    with (
        readable(directory),
        ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
    ):
        args = ocp.args.PyTreeRestore(item, restore_args=as_lazy)
        found = checkpointer.restore(for_orbax(directory), args=args)
    return at_path(found, under)


def read_part(directory: Path, path: TreePath) -> Any:
    """What stands at a path of a checkpoint, in numpy arrays, or None; nothing else is read."""
    return read_tree(directory, lambda _, array: array, path)


def _metadata(directory: Path) -> Any:
    with readable(directory):
        handler = _tree_handler(lambda path, array: None)
        return handler.metadata(for_orbax(directory)).tree


# How a place that cannot be reached, and may be whole, is spoken of.
_AWAY = re.compile(
    "PERMISSION_DENIED|UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED|Permission denied"
)
_FULL = re.compile("No space left|RESOURCE_EXHAUSTED|quota|File too large", re.IGNORECASE)
_OTHERS = (InputError, RuntimeError, MemoryError)  # of a device without room, and our own


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """What Orbax and TensorStore raise for files that are damaged or gone, as one line."""
    try:
        yield
    except _OTHERS:
        raise
    except Exception as e:  # Orbax raises that class itself
        if _AWAY.search(reason := _reason(e)):
            raise InputError(f"{directory}: cannot be read ({reason})") from e
        raise DamagedError(directory, [f"not a readable Orbax checkpoint ({reason})"]) from e


@contextlib.contextmanager
def writable(directory: Path) -> Iterator[None]:
    """What Orbax and TensorStore raise for a disk without room, as one line."""
    try:
        yield
    except _OTHERS:
        raise
    except Exception as e:
        if not (isinstance(e, OSError) or _FULL.search(str(e)) or _AWAY.search(str(e))):
            raise
        raise InputError(f"{directory}: cannot be written ({_reason(e)}); make room there") from e


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error.__cause__ or error).split())
    system = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(system[1])) if system else text[:200]
