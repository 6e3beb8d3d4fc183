"""Orbax checkpoints, read and written with a few tensors in memory, never the whole tree.

Orbax writes all numpy leaves of a tree at once, whatever its limits. Here the leaves are LazyTensors,
and their TypeHandler takes them in groups; `python -m benchmarks.convert` measures the memory. The
files are Orbax's own: `StandardCheckpointer().restore(directory)` reads them without this module.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from qwen3vl_jax.checkpoint import digests
from qwen3vl_jax.checkpoint.digests import DamagedError, digest
from qwen3vl_jax.checkpoint.lazy_tensor import Index, LazyTensor
from qwen3vl_jax.checkpoint.param_paths import TreePath, flatten, path_str
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.json_text import write_json
from qwen3vl_jax.storage.paths import for_orbax

# Bytes of tensors that are written together; a larger one is written alone.
_GROUP = 64 << 20
# Bytes of one stored chunk, the least that a process reads for its shard.
_CHUNK = 128 << 20

# An error of Orbax's threads is also raised: it is not logged.
logging.getLogger("absl").addFilter(lambda x: not (x.exc_info and "orbax" in x.pathname))


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes LazyTensors in groups of _GROUP bytes, then wrote(name, array); opens stored arrays."""

    def __init__(self, wrote: Callable[[str, np.ndarray], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._wrote, self._failed = wrote, []
        # atomic_dir flushes once at the end; a flush for each group is slow.
        cache = {"total_bytes_limit": 100_000_000}
        self._context = tensorstore.Context({"cache_pool#ocdbt": cache, "file_io_sync": False})

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any):
        # Raised after the whole group: the others must not outlive their event loop.
        try:
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
                self._wrote(jax.tree_util.keystr(info.keypath, simple=True, separator="."), array)
            # Before the next group is loaded.
            del arrays, array, future
        return []

    async def deserialize(self, infos: Any, args: Any = None):
        leaves = []
        # One by one, so that a damaged file gives one error.
        for info in infos:
            spec = ocp.type_handlers.get_json_tspec_read(info, info.is_ocdbt_checkpoint)
            store = await tensorstore.open(spec, open=True, read=True, context=info.ts_context)
            parts, dtype = functools.partial(_read_parts, store), store.dtype.numpy_dtype
            load = functools.partial(lambda store: store.read().result(), store)
            leaves.append(LazyTensor(tuple(store.shape), dtype, load, parts))
        return leaves


def _read_parts(store: tensorstore.TensorStore, where: Sequence[Index]) -> list[np.ndarray]:
    """Parts of a stored array. Each stored chunk is read once, or not at all."""
    ranges = [[s.indices(n)[:2] for s, n in zip(index, store.shape)] for index in where]
    out = [np.empty([b - a for a, b in spans], store.dtype.numpy_dtype) for spans in ranges]
    chunk = store.chunk_layout.read_chunk.shape or ()
    steps = [(n, c or n or 1) for n, c in zip(store.shape, chunk)]
    cuts = [[(a, min(a + c, n)) for a in range(0, n, c)] for n, c in steps]
    for piece in itertools.product(*cuts):
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


def _groups(sizes: list[int]) -> Iterator[slice]:
    """Slices of tensors that are written together."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > _GROUP:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _tree_handler(wrote: Callable = lambda name, array: None) -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (LazyTensor, _Handler(wrote))
    )
    # bf16 weights compress little, at a high cost in time and memory.
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def write_tree(
    directory: Path, tree: Any, wrote: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Writes a tree of LazyTensors as an Orbax checkpoint with their digests.

    wrote: called with the bytes of each written tensor. Raises InputError for a full disk.
    """
    found: dict[str, str] = {}

    def note(name: str, array: np.ndarray) -> None:
        found[name] = digest(array)
        wrote(array.nbytes)

    chunked = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    with writable(directory), ocp.Checkpointer(_tree_handler(note)) as checkpointer:
        checkpointer.save(for_orbax(directory), args=ocp.args.PyTreeSave(tree, chunked))
    (directory / digests.DIGESTS).write_text(write_json(found, digests.DIGESTS, indent=0) + "\n")


def open_tree(directory: Path) -> dict[TreePath, LazyTensor]:
    """The arrays of an Orbax checkpoint by path, unread; `load` checks them against their digests.

    An array that is read in parts is not checked. Raises DamagedError, as `load` does.
    """
    saved = digests.saved_digests(directory)

    def load(path: TreePath, leaf: LazyTensor) -> np.ndarray:
        with readable(directory):
            array = leaf.load()
        if saved is not None:
            name = path_str(path)
            digests.check_digests(directory, {name: digest(array)}, {name: saved.get(name)})
        return array

    return {
        path: dataclasses.replace(leaf, load=functools.partial(load, path, leaf))
        for path, leaf in _open(directory)
    }


def _open(directory: Path) -> list[tuple[TreePath, LazyTensor]]:
    # An Orbax that is too old has no such handler, which says nothing of the files.
    handler = _tree_handler()
    with readable(directory):
        stored = handler.metadata(for_orbax(directory)).tree
    as_lazy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=LazyTensor), stored)
    # Other processes may read something else, or nothing: no barrier.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    args = ocp.args.PyTreeRestore(stored, restore_args=as_lazy)
    reader = ocp.Checkpointer(_tree_handler(), multiprocessing_options=alone)
    with readable(directory), reader:
        found = flatten(reader.restore(for_orbax(directory), args=args))
    # Empty nodes, such as those of an optimizer's state, are None.
    return [(path, leaf) for path, leaf in found if isinstance(leaf, LazyTensor)]


def verify_tree(directory: Path) -> tuple[int, int]:
    """(number, bytes) of a checkpoint's arrays, all equal to their digests. Raises InputError."""
    if (saved := digests.saved_digests(directory)) is None:
        found = "got no digests, expected those of convert and train.py"
        raise InputError(f"{directory}: {found}; it is of an older release: write it again")
    leaves = _open(directory)
    with readable(directory):
        read = {path_str(path): digest(leaf.load()) for path, leaf in leaves}
    digests.check_digests(directory, read, saved)
    return len(leaves), sum(leaf.nbytes for _, leaf in leaves)


# Errors of a store that cannot be reached; the checkpoint may be intact.
_AWAY = re.compile("(?i:permission.denied)|UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED")
_FULL = re.compile("No space left|RESOURCE_EXHAUSTED|quota|File too large", re.IGNORECASE)
# Our own errors, and those of a full device or host memory.
_OTHERS = (InputError, RuntimeError, MemoryError)


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turns errors of Orbax and TensorStore for damaged or absent files into InputError."""
    try:
        yield
    except _OTHERS:
        raise
    # Orbax raises plain Exception.
    except Exception as e:
        if _AWAY.search(reason := _reason(e)):
            raise InputError(f"{directory}: cannot be read ({reason})") from e
        raise DamagedError(directory, [f"not a readable Orbax checkpoint ({reason})"]) from e


@contextlib.contextmanager
def writable(directory: Path) -> Iterator[None]:
    """Turns errors of Orbax and TensorStore for a full disk into InputError."""
    try:
        yield
    except Exception as e:
        known = isinstance(e, OSError) or _FULL.search(str(e)) or _AWAY.search(str(e))
        if isinstance(e, _OTHERS) or not known:
            raise
        raise InputError(f"{directory}: cannot be written ({_reason(e)}); make room there") from e


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error.__cause__ or error).split())
    system = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(system[1])) if system else text[:200]
